"""A quantized folder is an ordinary one: plain files, opened by everything that opens a float one, to the bit."""

import copy
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageClassification

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.quantization import quantizers

from ..child_path import child_path


@pytest.mark.parametrize(
    "settings",
    [{}, {"placement": "cpu", "batch_norm": "folded"}, {"batch_norm": "frozen", "float_layers": ["encoder.stem.*"]}],
    ids=str,
)
def test_folder_returns_the_model_to_the_bit(settings, tiny_quantized, tmp_path):
    model, x = tiny_quantized(**settings), torch.randn(3, 3, 32, 32)
    model.save_pretrained(tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".safetensors", ".py"}  # nothing pickled
    section = json.loads((tmp_path / "config.json").read_text())["quantization"]
    assert section.items() >= settings.items() and section["calibration_pictures"] == 8
    ranges = {key for key in load_file(tmp_path / "model.safetensors") if key.endswith("_quantizer._amax")}
    assert len(ranges) == len(quantizers(model))
    again, info = EfficientNetNVForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for opened in (again, AutoModelForImageClassification.from_pretrained(tmp_path)):
        assert torch.equal(opened(x).logits, model(x).logits)
    features = model.efficientnet(x).pooler_output
    assert torch.equal(AutoModel.from_pretrained(tmp_path)(x).pooler_output, features)
    assert quantizers(EfficientNetNVBackbone.from_pretrained(tmp_path))


def test_copies_and_half_precision_keep_the_ranges(tiny_quantized, tmp_path):
    model, x = tiny_quantized(), torch.randn(2, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x).logits, model(x).logits)
    model.save_pretrained(tmp_path)
    half = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half(x.bfloat16()).logits.dtype == torch.bfloat16
    for name, quantizer in quantizers(half).items():
        assert torch.equal(quantizer._amax, quantizers(model)[name]._amax), name


def test_gradient_checkpointing_changes_nothing(tiny_quantized):
    plain, recomputed, x = tiny_quantized().train(), tiny_quantized().train(), torch.randn(4, 3, 32, 32)
    enable = getattr(recomputed, "activation_checkpointing_enable", None) or recomputed.gradient_checkpointing_enable
    enable()
    for model in (plain, recomputed):
        torch.manual_seed(1)
        model(x).logits.logsumexp(1).mean().backward()
    for (name, a), b in zip(plain.named_parameters(), recomputed.parameters()):
        assert torch.equal(a.grad, b.grad), name
    for a, b in zip(plain.buffers(), recomputed.buffers()):
        assert torch.equal(a, b)


def test_channels_last_is_not_copied_and_changes_nothing(tiny_quantized):
    model, x = tiny_quantized(), torch.randn(2, 3, 32, 32)
    before = model(x).logits
    seen = []
    model.efficientnet.encoder.stem.conv.register_forward_hook(
        lambda m, args, y: seen.append(y.is_contiguous(memory_format=torch.channels_last))
    )
    after = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)).logits
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.02)
    assert seen == [True]


def test_missing_range_is_an_error(tiny_quantized, tmp_path):
    tiny_quantized().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.input_quantizer._amax"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 quantizers of this checkpoint have no range, e.g. classifier.input"):
        EfficientNetNVForImageClassification.from_pretrained(tmp_path)


def test_without_modelopt_it_says_what_to_install(tiny_quantized, tmp_path, monkeypatch):
    tiny_quantized().save_pretrained(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "modelopt"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="pip install nvidia-modelopt requests"):
        AutoModelForImageClassification.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="is quantized and needs .* pip install nvidia-modelopt requests"):
        open_checkpoint(str(tmp_path))
    EfficientNetNVForImageClassification(EfficientNetNVConfig(num_block_repeats=[1] * 7))  # a float one does not ask


def test_opens_where_the_package_does_not_exist(tiny_quantized, tmp_path):
    model, x = tiny_quantized(), torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path / "model")
    torch.save(x, tmp_path / "x.pt")
    script = (
        "import sys; sys.modules['effnet_hf'] = None\n"
        "import torch; from transformers import AutoModelForImageClassification\n"
        "model = AutoModelForImageClassification.from_pretrained('model', trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "model.save_pretrained('again')\n"
        "with torch.no_grad(): torch.save(model(torch.load('x.pt')).logits, 'logits.pt')\n"
    )
    environment = {**os.environ, "PYTHONPATH": child_path(), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(x).logits)
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again(x).logits, model(x).logits)
