"""What only the original's files have: two spellings, wrappers, averaged weights, quantizers, optimizer state."""

import pytest
import torch
from random_weights import assert_same, random_state

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.conversion import load_foreign, write_folder, write_foreign
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.errors import UserError
from effnet_hf.quantization import quantizers, set_quantizers


CONFIG = EfficientNetNVConfig.from_variant("b0", num_labels=5)


@pytest.fixture(scope="module")
def ours():
    return random_state(CONFIG)


@pytest.fixture
def theirs(ours):
    return NVIDIA.write(ours, CONFIG)


@pytest.fixture
def load(tmp_path):
    def save_and_load(content, **options):
        torch.save(content, tmp_path / "checkpoint.pth.tar")
        return load_foreign(tmp_path / "checkpoint.pth.tar", **options)

    return save_and_load


def respelled(theirs):
    """The spelling of the original's code since 2021: layers.0, and linear squeeze-excite layers."""
    return {
        key.replace("layer", "layers.", 1).replace(key[5], str(int(key[5]) - 1), 1)
        if key.startswith("layer")
        else key: tensor[:, :, 0, 0] if ".se." in key and tensor.dim() == 4 else tensor
        for key, tensor in theirs.items()
    }


def test_both_spellings_and_both_squeeze_excite_shapes(ours, theirs, load):
    newer = respelled(theirs)
    assert "layers.0.block0.depsep.conv.weight" in newer and newer["layers.6.block0.se.squeeze.weight"].dim() == 2
    for state in (theirs, newer):
        found = load(state)
        assert (found.dialect, found.config.variant, found.config.num_labels, found.exact) == ("nvidia", "b0", 5, True)
        assert (found.config.padding, found.config.batch_norm_eps) == ("symmetric", 1e-3)
        assert (found.processor.size, found.processor.crop_size["height"]) == ({"shortest_edge": 256}, 224)
        assert_same(found.state_dict, ours)


@pytest.mark.parametrize("prefix", ["module.", "model.", "model.module.", "_orig_mod.module."])
def test_prefixes_of_wrappers(prefix, ours, theirs, load):
    assert_same(load({"state_dict": {prefix + key: tensor for key, tensor in theirs.items()}}).state_dict, ours)


def test_averaged_weights_are_chosen_by_flag(ours, theirs, load):
    averaged = {
        f"model.{key}": torch.tensor(6.6) if key.endswith("num_batches_tracked") else tensor + 1  # averaged as a float
        for key, tensor in theirs.items()
    }
    content = {"state_dict": theirs, "state_dict_ema": averaged, "epoch": 3}
    plain, ema = load(content), load(content, ema=True)
    assert_same(plain.state_dict, ours)
    assert any("--ema takes them" in note for note in plain.notes)
    assert_same(ema.state_dict, {k: v if k.endswith("num_batches_tracked") else v + 1 for k, v in ours.items()})
    assert ema.state_dict["efficientnet.encoder.stem.bn.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(UserError, match="holds no averaged .EMA. weights, only state_dict, epoch; leave out --ema"):
        load({"state_dict": theirs, "epoch": 3}, ema=True)
    with pytest.raises(UserError, match="only averaged weights .state_dict_ema.; add --ema"):
        load({"state_dict_ema": averaged})


def test_half_precision_is_widened_and_said(theirs, load):
    found = load({key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in theirs.items()})
    assert all(tensor.dtype in (torch.float32, torch.int64) for tensor in found.state_dict.values())
    assert any("float16" in note for note in found.notes)


def test_quantizers_are_named_by_module_and_argument():
    names = NVIDIA.quantizer_names(EfficientNetNVConfig.from_variant("b0"))
    block = "efficientnet.encoder.stages.1.blocks.1"
    assert {ours: names[ours] for ours in names if ours.startswith(block)} == {
        f"{block}.expand.conv.input": "layer2.block1.expand.conv._input_quantizer",
        f"{block}.expand.conv.weight": "layer2.block1.expand.conv._weight_quantizer",
        f"{block}.depthwise.conv.input": "layer2.block1.depsep.conv._input_quantizer",
        f"{block}.depthwise.conv.weight": "layer2.block1.depsep.conv._weight_quantizer",
        f"{block}.se.reduce.input": "layer2.block1.se.squeeze._input_quantizer",
        f"{block}.se.reduce.weight": "layer2.block1.se.squeeze._weight_quantizer",
        f"{block}.se.expand.input": "layer2.block1.se.expand._input_quantizer",
        f"{block}.se.expand.weight": "layer2.block1.se.expand._weight_quantizer",
        f"{block}.project.conv.input": "layer2.block1.proj.conv._input_quantizer",
        f"{block}.project.conv.weight": "layer2.block1.proj.conv._weight_quantizer",
        f"{block}.se.pool.input": "layer2.block1.se.pooling._input_quantizer",
        f"{block}.se.scale.gate": "layer2.block1.se.mul_a_quantizer",
        f"{block}.se.scale.x": "layer2.block1.se.mul_b_quantizer",
        f"{block}.add.identity": "layer2.block1.residual_quantizer",
    }
    assert "efficientnet.encoder.stages.1.blocks.0.add.identity" not in names
    assert names["efficientnet.pooler.input"] == "classifier.pooling._input_quantizer"
    assert names["classifier.weight"] == "classifier.fc._weight_quantizer"
    kinds = [name.rsplit(".", 1)[1] for name in names]
    assert [kinds.count(kind) for kind in ("weight", "input", "gate", "x", "identity")] == [82, 99, 16, 16, 9]


def test_quantizer_names_are_places_of_the_model():
    """Each name is a module and an argument of its forward, or a parameter of it."""
    import inspect

    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(CONFIG)
    for name in NVIDIA.quantizer_names(CONFIG):
        path, port = name.rsplit(".", 1)
        module = model.get_submodule(path)
        assert port in dict(module.named_parameters()) or port in inspect.signature(module.forward).parameters, name


@pytest.fixture
def amax(ours):
    """A range for every quantizer, under the original's names and in its shapes."""
    generator, found = torch.Generator().manual_seed(1), {}
    for name, theirs in NVIDIA.quantizer_names(CONFIG).items():
        shape = ()
        if name.endswith(".weight"):
            weight = ours[name]
            shape = (len(weight), 1, 1, 1) if weight.dim() == 4 or ".se." in name else (len(weight), 1)
        found[f"{theirs}._amax"] = torch.rand(shape, generator=generator) + 0.5
    return found


def test_quantized_checkpoint_becomes_a_quantized_model(ours, theirs, amax, load, tmp_path):
    pytest.importorskip("modelopt", reason="needs the quant extra")
    found = load({f"module.{key}": tensor for key, tensor in {**theirs, **amax}.items()})
    assert_same(found.state_dict, ours)
    assert len(found.quantizer_amax) == len(amax) == 222
    section = found.config.quantization
    assert (section["placement"], section["narrow_range"], section["num_bits"]) == ("nvidia", True, 8)
    assert found.quantizer_amax["efficientnet.encoder.stages.0.blocks.0.se.reduce.weight"].shape == (8, 1)

    write_folder(found, tmp_path / "folder")
    model = EfficientNetNVForImageClassification.from_pretrained(tmp_path / "folder").eval()
    names = NVIDIA.quantizer_names(CONFIG)
    for name, quantizer in quantizers(model).items():
        assert quantizer._amax.flatten().tolist() == amax[f"{names[name]}._amax"].flatten().tolist()
        assert quantizer.narrow_range
    with torch.no_grad():
        x = torch.randn(2, 3, 64, 64)
        assert torch.equal(model(x).logits, found.model()(x).logits)
        set_quantizers(model, False)
        assert not torch.equal(model(x).logits, found.model()(x).logits)

    line = write_foreign(load_foreign(tmp_path / "folder"), "nvidia", tmp_path / "back.pth")
    assert line.startswith("python quant_main.py --arch efficientnet-quant-b0 ")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert set(back) == set(theirs) | set(amax)
    assert all(torch.equal(back[key], tensor) for key, tensor in {**theirs, **amax}.items())


def test_damaged_quantizers_are_refused(theirs, amax, load):
    with pytest.raises(UserError, match="layer1.block0.residual_quantizer._amax belongs to no quantizer of a b0"):
        load({**theirs, **amax, "layer1.block0.residual_quantizer._amax": torch.tensor(1.0)})
    with pytest.raises(UserError, match=r"_amax is \(4,\), should be \(5, 1\)"):
        load({**theirs, **amax, "classifier.fc._weight_quantizer._amax": torch.rand(4)})
    del amax["stem.conv._input_quantizer._amax"]
    with pytest.raises(UserError, match="221 of 222 quantizers, not that of stem.conv._input_quantizer"):
        load({**theirs, **amax})


def original_optimizer(theirs, swap=False):
    """RMSprop as the original builds it: batch norm without weight decay, in a group of its own."""
    parameters = {
        key: torch.nn.Parameter(tensor)
        for key, tensor in theirs.items()
        if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    groups = [
        {"params": [p for key, p in parameters.items() if "bn" in key], "weight_decay": 0.0},
        {"params": [p for key, p in parameters.items() if "bn" not in key], "weight_decay": 1e-5},
    ]
    optimizer = torch.optim.RMSprop(groups[::-1] if swap else groups, lr=0.08, alpha=0.9, eps=0.01, momentum=0.9)
    for i, parameter in enumerate(parameters.values()):
        parameter.grad = torch.full_like(parameter, 0.01 * (i + 1))
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("swap", [False, True])
def test_training_checkpoint_keeps_optimizer_under_our_names(swap, ours, theirs, load):
    optimizer = original_optimizer(theirs, swap)
    found = load({"epoch": 12, "state_dict": theirs, "best_prec1": 77.5, "optimizer": optimizer}).trainer_state
    assert (found.epoch, found.best_top1) == (12, 77.5)
    groups = {group["weight_decay"]: group["params"] for group in found.param_groups}
    assert (
        len(groups[0.0]) == 98 and len(groups[1e-5]) == 115 and groups[0.0][0] == "efficientnet.encoder.stem.bn.weight"
    )
    assert found.param_groups[0]["lr"] == 0.08
    shapes = {name: tuple(state["square_avg"].shape) for name, state in found.optimizer_state.items()}
    assert shapes == {name: tuple(ours[name].shape) for name in shapes} and len(shapes) == 213

    keys = [key for key in theirs if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    their_names = {theirs_: ours_ for ours_, theirs_ in NVIDIA.key_names(CONFIG).items()}
    for i, key in enumerate(keys):  # the same parameter has the same value, whatever its number was
        average = found.optimizer_state[their_names[key]]["square_avg"]
        torch.testing.assert_close(average, torch.full_like(average, 0.1 * (0.01 * (i + 1)) ** 2))


@pytest.mark.parametrize("damage", [{"stem.conv.weight": torch.full((32, 3, 3, 3), torch.nan)}, {"fc.weight": "text"}])
def test_averaged_weights_that_do_not_fit_are_left_out_and_said(damage, ours, theirs, load):
    found = load({"epoch": 1, "state_dict": theirs, "state_dict_ema": {**theirs, **damage}})
    assert_same(found.state_dict, ours)
    assert found.trainer_state.epoch == 1 and found.trainer_state.averaged is None
    assert any("averaged weights do not fit and were left out" in note for note in found.notes)


def test_only_a_float_run_with_an_epoch_can_be_resumed(theirs, amax, load):
    assert load({"epoch": 1, "state_dict": theirs}).can_be_resumed
    assert not load({"state_dict": theirs, "best_prec1": 70.0}).can_be_resumed
    assert not load({"epoch": 1, "state_dict": {**theirs, **amax}}).can_be_resumed


def test_optimizer_that_does_not_fit_is_left_out_and_said(theirs, load):
    optimizer = original_optimizer(theirs)
    optimizer["param_groups"][0]["params"].pop()
    found = load({"epoch": 1, "state_dict": theirs, "optimizer": optimizer, "scaler": {"scale": 128.0}})
    assert found.trainer_state.epoch == 1 and not found.trainer_state.optimizer_state
    assert any("groups hold [97, 115] tensors" in note for note in found.notes)
    assert any("Left out of the training checkpoint: scaler" in note for note in found.notes)


def test_ngc_path_is_the_folder_that_the_ngc_client_makes(ours, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = "nvidia/efficientnet_b0_pyt_amp:20.12.0"
    with pytest.raises(UserError, match="ngc registry model download-version nvidia/efficientnet_b0_pyt_amp:20.12.0"):
        monkeypatch.setenv("PATH", "")
        load_foreign(path)
    (tmp_path / "efficientnet_b0_pyt_amp_v20.12.0").mkdir()
    torch.save(theirs, tmp_path / "efficientnet_b0_pyt_amp_v20.12.0" / "nvidia_efficientnet-b0_210412.pth")
    assert_same(load_foreign(path).state_dict, ours)


def test_ngc_client_is_called_when_it_is_there(ours, theirs, tmp_path, monkeypatch):
    torch.save(theirs, tmp_path / "weights.pth")
    client = tmp_path / "bin" / "ngc"
    client.parent.mkdir()
    client.write_text(
        '#!/bin/sh\ncase "$*" in *missing*) echo "Model not found." >&2; exit 1;; esac\n'
        f'mkdir "$6/efficientnet_b0_pyt_amp_v1" && cp {tmp_path}/weights.pth "$6/efficientnet_b0_pyt_amp_v1/w.pth"\n'
    )
    client.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{client.parent}:/usr/bin:/bin")
    assert_same(load_foreign("ngc:nvidia/efficientnet_b0_pyt_amp:1").state_dict, ours)
    with pytest.raises(UserError, match="failed: Model not found."):
        load_foreign("nvidia/missing:1")
