"""Every setting of the image processor: the exported file computes from an image what PyTorch computes from the
processor's own pixels of it, whichever way it was exported, or the export is refused in a sentence."""

import json
import shutil

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.errors import UserError
from effnet_hf.export import ExportOptions, ONNXEfficientNet, export_model
from effnet_hf.export.check import pixels_of
from effnet_hf.export.preprocessing import preprocessing_graph
from effnet_hf.export.runners import pt2_runner

from ..data.torture import photo
from .conftest import make_checkpoint


SETTINGS = {
    "as published": {},
    "bilinear": {"resample": 2},
    "Lanczos": {"resample": 1},
    "box": {"resample": 4},
    "nearest": {"resample": 0},
    "wide crop": {"crop_size": {"height": 64, "width": 96}},
    "tall crop": {"crop_size": {"height": 96, "width": 64}},
    "crop beyond the resized image": {"size": 48, "crop_size": {"height": 64, "width": 81}},
    "no resize": {"do_resize": False},
    "other factor": {"rescale_factor": 1 / 127.5, "image_mean": 1.0, "image_std": 1.0},
    "no rescale": {"do_rescale": False, "image_mean": 120.0, "image_std": 60.0},
    "no normalisation": {"do_normalize": False},
    "neither": {"do_rescale": False, "do_normalize": False},
    "other statistics": {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.25]},
}
NOT_IN_A_GRAPH = {"Lanczos", "box", "nearest"}
SIZES = [(150, 110), (64, 64), (61, 140), (97, 96), (40, 33)]


@pytest.fixture(params=SETTINGS, scope="module")
def setting(request):
    return request.param


@pytest.fixture(scope="module")
def prepared(setting, tmp_path_factory):
    """A checkpoint that was made for images prepared like this."""
    processor = EfficientNetNVImageProcessor(**{"size": 96, "crop_size": 64, **SETTINGS[setting]})
    return make_checkpoint(tmp_path_factory.mktemp("prepared") / "model", processor)


@pytest.fixture(scope="module")
def expected(prepared):
    """(images, logits): what PyTorch gives for the processor's own pixels."""
    processor = EfficientNetNVImageProcessor.from_pretrained(prepared)
    model = EfficientNetNVForImageClassification.from_pretrained(prepared).eval()
    images = [photo(i, *size) for i, size in enumerate(SIZES)]
    with torch.inference_mode():
        pixels = np.stack(processor(images)["pixel_values"]).astype(np.float32)
        return images, pixels, model(torch.from_numpy(pixels)).logits.numpy()


def softmax(logits):
    return torch.from_numpy(logits).softmax(-1).numpy()


def test_onnx_file_and_its_wrapper(setting, prepared, expected, photos, tmp_path):
    images, pixels, logits = expected
    found = export_model(prepared, tmp_path / "out", data_dir=str(photos), num_images=9)
    assert found.comparison.certain_agreement == 100 and found.top1[0] == found.top1[1]
    session = onnxruntime.InferenceSession(str(found.file), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, {"pixel_values": pixels})[0], logits, rtol=1e-4, atol=1e-4)
    model = ONNXEfficientNet.from_pretrained(tmp_path / "out")
    for image, probabilities in zip(images, softmax(logits)):
        scores = {entry["label"]: entry["score"] for entry in model.classify(image)}
        named = dict(zip(model.config.id2label.values(), probabilities))
        assert scores == pytest.approx(named, abs=1e-3)
    said, processor = model.metadata, model.processor
    height, width = processor.crop_size.values()
    assert said["image_size"] == (height if height == width else [height, width])
    assert said["resample"] == Image.Resampling(processor.resample).name.lower()
    names = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std")
    assert {name: said[name] for name in names} == {name: getattr(processor, name) for name in names}


def test_preprocessing_in_the_graph(setting, prepared, expected, tmp_path):
    images, _, logits = expected
    if setting in NOT_IN_A_GRAPH:
        with pytest.raises(UserError, match=rf"resizes by {setting.lower()}, .* export without --with_preprocessing"):
            export_model(prepared, tmp_path / "out", with_preprocessing=True)
        assert list(tmp_path.iterdir()) == []
        return
    export_model(prepared, tmp_path / "out", with_preprocessing=True)
    model = ONNXEfficientNet.from_pretrained(tmp_path / "out")
    for image, probabilities in zip(images, softmax(logits)):
        (found,) = model.session.run(None, {"image": np.asarray(image)[None]})
        np.testing.assert_allclose(found[0], probabilities, atol=1e-4 if image.height < 1.4 * image.width else 2e-2)
        best = model.classify(image, top_k=1)[0]
        assert best["score"] == pytest.approx(found.max(), abs=1e-6)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name not in NOT_IN_A_GRAPH])
def test_the_graphs_pixels_are_the_processors(setting):
    processor = EfficientNetNVImageProcessor(**{"size": 96, "crop_size": 64, **SETTINGS[setting]})
    session = onnxruntime.InferenceSession(preprocessing_graph(processor, ExportOptions()).SerializeToString())
    factor = processor.rescale_factor if processor.do_rescale else 1
    step = factor / min(processor.image_std) if processor.do_normalize else factor  # of one byte
    for i, size in enumerate([*SIZES, (500, 375), (1200, 50), (33, 700)]):
        image = photo(i, *size)
        (pixels,) = session.run(None, {"image": np.asarray(image)[None]})
        difference = np.abs(pixels - pixels_of(processor)([image]))
        # Every byte is Pillow's, but of what is far taller than wide, which Pillow resizes by columns first since 13.
        assert difference.max() < (1e-3 if image.height < 1.4 * image.width else 2.1) * step


@pytest.mark.parametrize("setting", ["wide crop", "no normalisation", "neither", "Lanczos"], scope="module")
def test_torch_export_program(setting, prepared, expected, tmp_path):
    _, pixels, logits = expected
    run = pt2_runner(export_model(prepared, tmp_path / "out", format="pt2").file)
    np.testing.assert_allclose(run(pixels), logits, rtol=1e-4, atol=1e-4)


def test_without_a_crop_it_is_refused_when_written_and_when_opened(checkpoint, exported, tmp_path):
    for source, name in ((checkpoint, "model"), (exported, "onnx")):
        shutil.copytree(source, tmp_path / name)
        said = json.loads((source / "preprocessor_config.json").read_text()) | {"do_center_crop": False}
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match="do_center_crop false"):
        export_model(tmp_path / "model", tmp_path / "out")
    with pytest.raises(UserError, match="do_center_crop false"):
        ONNXEfficientNet.from_pretrained(tmp_path / "onnx")


def test_free_sides_start_from_a_crop_that_is_not_square(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "model")
    EfficientNetNVImageProcessor(size=96, crop_size={"height": 64, "width": 96}).save_pretrained(tmp_path / "model")
    found = export_model(tmp_path / "model", tmp_path / "out", dynamic_image_size=True)
    assert found.comparison.difference < 1e-4
