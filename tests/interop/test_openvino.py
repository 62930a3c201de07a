"""OpenVINO and optimum-intel. Accuracy is looked at in float32: on processors with bf16 OpenVINO computes in that."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .conftest import CLASSES, SIZE


pytestmark = pytest.mark.filterwarnings("ignore")
openvino = pytest.importorskip("openvino", reason="pip install openvino")
IMAGES = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
MODES = {"gradients": torch.enable_grad, "inference_mode": torch.inference_mode}


def same(found, model):
    with torch.no_grad():
        logits = model(IMAGES).logits
    torch.testing.assert_close(torch.as_tensor(np.asarray(found)), logits, atol=1e-4, rtol=1e-3)


@pytest.mark.client("openvino.convert_model", "openvino", group="OpenVINO")
@pytest.mark.parametrize("mode", MODES)
def test_convert_model(classifier, mode):
    with MODES[mode]():
        converted = openvino.convert_model(classifier, example_input=IMAGES)
    same(openvino.compile_model(converted, "CPU", EXACT)(IMAGES.numpy())[0], classifier)


@pytest.fixture
def intel():
    return pytest.importorskip("optimum.intel", reason="pip install optimum-intel")


@pytest.mark.client("OVModelForImageClassification(export=True)", "optimum-intel", "openvino", group="OpenVINO",
                    step="`import effnet_hf.export.optimum`")  # fmt: skip
def test_optimum_export(classifier, folder, intel, photo, side):
    if side == "ours":
        import effnet_hf.export.optimum  # noqa: F401
    from transformers import AutoImageProcessor, pipeline

    model = intel.OVModelForImageClassification.from_pretrained(folder, export=True, ov_config=EXACT)
    same(model(pixel_values=IMAGES).logits, classifier)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert len(pipeline("image-classification", model=model, image_processor=processor)(photo)) == 5


@pytest.mark.client("OVModelForImageClassification(load_in_8bit=True)", "optimum-intel", "nncf", group="OpenVINO",
                    step="`import effnet_hf.export.optimum`")  # fmt: skip
def test_optimum_8bit(classifier, folder, intel, side):
    if side == "ours":
        import effnet_hf.export.optimum  # noqa: F401

    model = intel.OVModelForImageClassification.from_pretrained(folder, export=True, load_in_8bit=True, ov_config=EXACT)
    with torch.no_grad():
        assert (model(pixel_values=IMAGES).logits - classifier(IMAGES).logits).abs().max() < 0.1


@pytest.mark.client("optimum-cli export openvino", "optimum-intel", "openvino", group="OpenVINO")
def test_optimum_cli(classifier, folder, intel, tmp_path):
    cli = Path(sys.executable).with_name("optimum-cli")
    task = ["--task", "image-classification"]
    run = [cli, "export", "openvino", "--model", folder, *task, tmp_path / "ov"]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-1000:]
    model = intel.OVModelForImageClassification.from_pretrained(tmp_path / "ov", ov_config=EXACT)
    same(model(pixel_values=IMAGES).logits, classifier)


@pytest.mark.client("OVModelForImageClassification, a folder of effnet-hf export", "optimum-intel", group="OpenVINO")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
def test_our_folder(classifier, folder, intel, tmp_path):
    from effnet_hf.export import export_model

    export_model(folder, tmp_path / "ov", format="openvino", num_images=2)
    model = intel.OVModelForImageClassification.from_pretrained(tmp_path / "ov", ov_config=EXACT)
    same(model(pixel_values=IMAGES).logits, classifier)


@pytest.mark.client("effnet-hf export --int8 openvino, of a float checkpoint", "openvino", "nncf", group="OpenVINO")
@pytest.mark.parametrize("side", ["ours"], indirect=True)
@pytest.mark.parametrize("reduce_range", [True, False])
def test_int8_by_nncf(classifier, folder, tmp_path, reduce_range, monkeypatch):
    pytest.importorskip("nncf", reason="pip install nncf")
    from effnet_hf.export import export_model, openvino_int8
    from effnet_hf.export.check import LEAST_SNR
    from effnet_hf.export.runners import openvino_compiled

    noise = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val"), CLASSES):
        (tmp_path / "data" / split / name).mkdir(parents=True)
        for i in range(3):
            pixels = noise.integers(0, 256, (96, 128, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{i}.png")
    if not reduce_range:  # right or wrong, by the machine
        monkeypatch.setitem(LEAST_SNR, "nncf", -20)
    out = tmp_path / "ov"
    found = export_model(
        folder, out, int8="openvino", reduce_range=reduce_range, data_dir=str(tmp_path / "data"), num_images=9
    )
    assert [row.name for row in found.rows][0] == "checkpoint, float, PyTorch" and found.notes[0].startswith(
        "INT8 is NNCF"
    )
    if reduce_range:
        assert found.comparison.snr > 5
    kernels = openvino_int8.kernels(openvino_compiled(str(found.file)))
    assert kernels["Convolution", "f32"] == 1 and kernels["Convolution", "u8"] > 3
    told = openvino.Core().read_model(found.file).get_rt_info(["framework", "labels"])
    assert json.loads(told.astype(str)) == CLASSES
    model = openvino.compile_model(found.file, "CPU", EXACT)
    assert model(IMAGES.numpy())[0].shape == (2, len(CLASSES))
