"""`--layout transformers.js`: names that the library knows, and a graph that prepares images to Pillow's very bytes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import EfficientNetConfig

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, ONNXEfficientNet, export_model
from effnet_hf.export.check import whole_pixels_of

from ..data.torture import photo
from .conftest import NAMES, make_checkpoint


@pytest.fixture(scope="module")
def written(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("layout") / "js"
    export_model(str(checkpoint), folder, layout="transformers.js", num_images=4)
    return folder


def test_its_pipeline_hands_the_image_over_as_it_is(written):
    assert {path.relative_to(written).as_posix() for path in written.rglob("*.*")} == {
        *("onnx/model.onnx", "config.json", "preprocessor_config.json", "README.md", "manifest.json"),
    }
    config = json.loads((written / "config.json").read_text())
    assert config["model_type"] == "efficientnet" and config["transformers.js_config"] == {"dtype": "fp32"}
    assert EfficientNetConfig.from_pretrained(written).id2label == dict(enumerate(NAMES))
    processor = json.loads((written / "preprocessor_config.json").read_text())
    assert processor["image_processor_type"] == "CLIPImageProcessor"
    assert not any(processor[step] for step in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"))
    assert "await pipeline('image-classification'" in (written / "README.md").read_text()


def test_logits_of_an_image_of_any_size_are_the_checkpoints(checkpoint, written):
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()
    processor = EfficientNetNVImageProcessor.from_pretrained(checkpoint)
    session = onnxruntime.InferenceSession(written / "onnx/model.onnx")
    for i, size in enumerate([(500, 375), (64, 64), (40, 33), (900, 100)]):
        image = photo(i, *size)
        (found,) = session.run(None, {"pixel_values": whole_pixels_of([image])})
        with torch.no_grad():
            np.testing.assert_allclose(found, model(**processor(image, return_tensors="pt")).logits, atol=1e-4)


def test_half_precision_has_the_name_of_its_dtype(checkpoint, tmp_path):
    found = export_model(str(checkpoint), tmp_path / "js", layout="transformers.js", dtype="fp16", num_images=2)
    assert found.file == tmp_path / "js/onnx/model_fp16.onnx" and found.file.is_file()
    assert json.loads((tmp_path / "js/config.json").read_text())["transformers.js_config"] == {"dtype": "fp16"}


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"layout": "keras.js"}, "--layout keras.js: there are transformers.js"),
        ({"format": "pt2"}, "goes with --format onnx"),
        ({"dtype": "bf16"}, "goes with --format onnx, and --dtype fp32"),
        ({"int8": "tensorrt"}, "--int8 ort-cpu"),
        ({"with_softmax": True}, "goes without --with_probabilities"),
        ({"with_preprocessing": True}, "goes without --with_probabilities, --dynamic_image_size and --with_prep"),
        ({"opset": 17}, "needs --opset 18"),
    ],
    ids=str,
)
def test_what_it_cannot_be_is_refused(settings, said):
    with pytest.raises(UserError, match=said):
        ExportOptions(**{"layout": "transformers.js", **settings})


def test_several_labels_and_other_filters_are_refused(tmp_path):
    names = dict(enumerate(NAMES))
    several = make_checkpoint(tmp_path / "several", id2label=names, problem_type="multi_label_classification")
    lanczos = make_checkpoint(tmp_path / "lanczos", EfficientNetNVImageProcessor(size=96, crop_size=64, resample=1))
    with pytest.raises(UserError, match="may have several labels, and the pipeline there always takes a softmax"):
        export_model(str(several), tmp_path / "out", layout="transformers.js")
    with pytest.raises(UserError, match="--layout transformers.js: .* resizes by lanczos"):
        export_model(str(lanczos), tmp_path / "out", layout="transformers.js")
    assert not (tmp_path / "out").exists()


def test_python_says_what_it_is(written):
    with pytest.raises(UserError, match="is laid out for transformers.js; Python takes what .* without --layout"):
        ONNXEfficientNet.from_pretrained(written)
