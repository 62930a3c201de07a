"""`export` for phones and small devices, with the converters and runtimes themselves: which formats run, in which
environment, depends on what is installed there (`make interop`)."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.errors import UserError
from effnet_hf.export import export_model
from effnet_hf.export.devices import DEVICES, proof
from effnet_hf.export.options import ExportOptions

from ..data.torture import photo
from ..export.conftest import NAMES, checkpoint, make_checkpoint, photos  # noqa: F401  (fixtures)


KINDS = [
    ("executorch", {}),
    ("executorch", {"with_softmax": True}),
    ("executorch", {"int8": "xnnpack"}),
    ("coreml", {}),
    ("coreml", {"dtype": "fp16"}),
    ("coreml", {"int8": "weights"}),
    ("litert", {}),
    ("litert", {"int8": "weights"}),
    ("litert", {"int8": "xnnpack"}),
    ("ncnn", {}),
    ("ncnn", {"dtype": "fp16", "with_softmax": True}),
]
NAMED = [pytest.param(*kind, id=" ".join([kind[0], *map(str, kind[1].values())])) for kind in KINDS]
FORMATS = [pytest.param(format, id=format) for format in DEVICES]


def require(format):
    for package in DEVICES[format].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")


@pytest.fixture
def clean(tmp_path, monkeypatch):
    """An empty working directory and an empty place for temporary files."""
    for name in ("here", "temporary"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return SimpleNamespace(here=tmp_path / "here", temporary=tmp_path / "temporary")


@pytest.mark.parametrize(("format", "settings"), NAMED)
def test_a_file_is_written_proved_and_run_by_its_card(format, settings, checkpoint, photos, clean, capfd):  # noqa: F811
    require(format)
    exported = export_model(checkpoint, "out", format=format, data_dir=str(photos), model_id=None, **settings)
    said = exported.summary()
    assert "takes one image at a time" in said and f"{DEVICES[format].file}" in said
    assert ("was not run by Core ML" in said) == (format == "coreml")
    out, err = capfd.readouterr()
    assert out + err == ""  # neither pages nor progress bars
    assert sorted(path.name for path in clean.here.iterdir() if not path.name.endswith(".lock")) == ["out"]
    assert list(clean.temporary.iterdir()) == []
    names = {path.name for path in (clean.here / "out").iterdir()}
    beside = {"model.ncnn.bin"} if format == "ncnn" else set()
    assert names == beside | {
        *(DEVICES[format].file, "labels.txt", "config.json", "preprocessor_config.json", "README.md", "manifest.json"),
        *("configuration.py", "image_processing_efficientnet_nv.py"),
    }
    assert (clean.here / "out/labels.txt").read_text().split() == NAMES
    if "int8" not in settings:
        assert exported.comparison.agreement == 100
    assert exported.comparison.snr > 10 and exported.top1 is not None
    if format != "coreml":  # which runs on a Mac only
        _run_the_card(clean.here / "out", checkpoint, exported)


def _python(code):
    """What a program prints, in a process of its own: the runtimes warn as they are imported, and stay imported."""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def _run_the_card(folder, checkpoint, exported):  # noqa: F811
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    photo(7, 150, 110).save("image.jpg", quality=95)
    keep = f"import numpy\nnumpy.save('found.npy', numpy.asarray({exported.options.output_name}, 'float32'))\n"
    _python(code.replace("path/to/this/folder", str(folder)) + keep)
    found = np.load("found.npy").reshape(1, -1)

    pixels = EfficientNetNVImageProcessor.from_pretrained(checkpoint)(Image.open("image.jpg"), return_tensors="pt")
    with torch.no_grad():
        model = EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()
        wanted = model(pixels["pixel_values"]).logits
    wanted = wanted.softmax(-1) if exported.options.probabilities else wanted
    tolerance = 0.5 if exported.options.int8 else 2e-2 if exported.options.dtype == "fp16" else 1e-3
    np.testing.assert_allclose(found, wanted, atol=tolerance * max(1, float(wanted.abs().max())))


@pytest.mark.parametrize("format", FORMATS)
def test_a_wrong_program_is_refused_and_leaves_nothing(format, checkpoint, clean, monkeypatch):  # noqa: F811
    require(format)

    class Wrong(proof.ExportedNetwork):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            with torch.no_grad():
                self.model.efficientnet.encoder.stem.conv.weight[0] *= 1.1

    monkeypatch.setattr(proof, "ExportedNetwork", Wrong)
    with pytest.raises(UserError, match="does not compute what the checkpoint does"):
        export_model(checkpoint, "out", format=format, num_images=2)
    assert [path for path in clean.here.iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize("format", FORMATS)
def test_several_labels_and_a_temperature(format, tmp_path, clean):
    require(format)
    settings = {"problem_type": "multi_label_classification", "thresholds": [0.3, 0.5, 0.7]}
    model = make_checkpoint(tmp_path / "model", **settings)
    exported = export_model(model, "out", format=format, num_images=3, with_softmax=True)
    assert exported.comparison.several and exported.options.output_name == "probabilities"
    single = make_checkpoint(tmp_path / "single", softmax_temperature=2.0)
    said = export_model(single, "warm", format=format, num_images=3).summary()
    assert "divided by the checkpoint's temperature, 2" in said


@pytest.mark.parametrize("format", FORMATS)
def test_a_network_with_padding_by_the_image_s_size(format, tmp_path, clean):
    """As Lite0's: ReLU6, no squeeze-excite, TensorFlow's padding."""
    require(format)
    model = make_checkpoint(tmp_path / "model", padding="same", hidden_act="relu6", se_ratio=0.0)
    assert export_model(model, "out", format=format, num_images=3).comparison.agreement == 100


def test_what_core_ml_s_package_says(checkpoint, clean):  # noqa: F811
    require("coreml")
    export_model(checkpoint, "out", format="coreml", num_images=2)
    code = """
import json
import coremltools

model = coremltools.models.MLModel("out/model.mlpackage", skip_model_load=True)
description = model.get_spec().description
image = description.input[0].type.imageType
sides = image.height, image.width, image.colorSpace == image.RGB
print(json.dumps([*sides, description.predictedFeatureName, model.user_defined_metadata["labels"]]))
"""
    said = json.loads(_python(code).splitlines()[-1])
    assert said == [64, 64, True, "classLabel", json.dumps(NAMES)]


def test_a_full_disk_is_one_line(checkpoint, tmp_path):  # noqa: F811
    """Large enough for the program that goes to the converter, too small for what that writes."""
    format = next((name for name in ("ncnn", "litert") if _has(name)), None)
    if format is None:
        pytest.skip("needs ncnn or litert")
    place = tmp_path / "place"
    place.mkdir()
    size = 300_000
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("only root may mount a small disk")
    try:
        with pytest.raises(UserError, match="No space left on device"):
            export_model(checkpoint, place / "out", format=format, num_images=2)
        assert [name for name in os.listdir(place) if not name.endswith(".lock")] == []
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def _has(format):
    return all(importlib.util.find_spec(package) for package in DEVICES[format].packages)


def test_torch_is_what_it_was_afterwards(checkpoint, clean):  # noqa: F811
    """The converters change torch's export, its default device, its number of threads; in a process of their own."""
    format = next(filter(_has, DEVICES), None) or pytest.skip("needs a format's packages")

    def state():
        return torch.get_num_threads(), torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()

    modules, settings = set(sys.modules), state()
    export_model(checkpoint, "out", format=format, num_images=2)
    new = {name.split(".")[0] for name in set(sys.modules) - modules}
    assert not set(DEVICES[format].packages) & new - {"torchao"}  # which transformers imports itself
    assert state() == settings
    assert ExportOptions(format=format).file_name == DEVICES[format].file
