"""Images of 12 bits in 16: what a folder's own card says to do with them gives the checkpoint's answer."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet, export_model
from effnet_hf.hub import CardFacts, render_card
from effnet_hf.inference import Classifier

from ..data.torture import photo
from .conftest import NAMES, make_checkpoint


TWELVE = {"bit_depth": 12}


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """A checkpoint for 12 bits, and in it a picture of 12 bits, which is called as the cards call theirs."""
    folder = tmp_path_factory.mktemp("deep") / "model"
    make_checkpoint(folder, EfficientNetNVImageProcessor.for_image_size(64, **TWELVE))
    grey = np.asarray(photo(7, 150, 110).convert("L"), np.uint16) * 16
    for name in ("image.jpg", "cat.jpg"):  # whatever it is called
        Image.fromarray(grey).save(folder / name, "PNG")
    return folder


@pytest.fixture(scope="module")
def right(deep):
    """The probabilities of the classes by hand."""
    picture = np.asarray(Image.open(deep / "image.jpg"))
    processor = EfficientNetNVImageProcessor.from_pretrained(deep)
    network = EfficientNetNVForImageClassification.from_pretrained(deep).eval()

    def ask(grey):
        pixels = processor(Image.fromarray(grey).convert("RGB"), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return network(pixels).logits[0].softmax(-1).tolist()

    found, clipped = ask((picture // 16).astype(np.uint8)), ask(np.minimum(picture, 255).astype(np.uint8))
    assert np.abs(np.subtract(found, clipped)).max() > 0.1
    return dict(zip(NAMES, found))


def scores(predictions):
    return {each["label"]: each["score"] for each in predictions}


@pytest.fixture(scope="module")
def exported(deep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("deep_onnx") / "onnx"
    export_model(str(deep), folder, model_id=str(folder))
    return folder


def run_card(card, deep, monkeypatch):
    """What each Python block of a card leaves behind."""
    monkeypatch.chdir(deep)
    blocks = re.findall("```python\n(.*?)```", card, re.DOTALL)
    results = []
    for block in blocks:
        last = re.sub(r"^(classify\()", r"answer = \1", block, flags=re.MULTILINE)
        names: dict = {"__name__": "card"}
        exec(compile(last, "card", "exec"), names)
        results.append(names)
    return results


def test_the_card_of_a_plain_export(deep, exported, right, monkeypatch):
    card = (exported / "README.md").read_text()
    assert "Scale images of more than 8 bits, whose values have 12, to 8, resize" in card
    session, pipe = run_card(card, deep, monkeypatch)
    logits = torch.from_numpy(session["logits"][0])
    assert dict(zip(NAMES, logits.softmax(-1).tolist())) == pytest.approx(right, abs=1e-5)
    assert scores(pipe["answer"]) == pytest.approx(right, abs=1e-5)
    assert ONNXEfficientNet.from_pretrained(exported).metadata["bit_depth"] == 12


def test_the_card_of_a_graph_that_takes_the_image(deep, right, tmp_path, monkeypatch):
    export_model(str(deep), tmp_path / "onnx", model_id=str(tmp_path / "onnx"), with_preprocessing=True)
    card = (tmp_path / "onnx/README.md").read_text()
    assert "scale 0 to 4,095 to 0 to 255" in card and '.convert("RGB")' not in card
    (done,) = run_card(card, deep, monkeypatch)
    assert dict(zip(NAMES, done["probabilities"][0].tolist())) == pytest.approx(right, abs=2e-2)


def test_the_card_of_a_checkpoint(deep, right, monkeypatch):
    facts = CardFacts("Net", "b0", 3, 64, "As is.", model_id=str(deep), **TWELVE)
    card = re.sub(r"\nbackbone = (.|\n)*?```", "```", render_card(facts))  # it has other stages
    pipe, model = run_card(card, deep, monkeypatch)
    assert scores(pipe["answer"]) == pytest.approx(right, abs=1e-5)
    assert dict(zip(NAMES, model["probabilities"][0].tolist())) == pytest.approx(right, abs=1e-5)


def test_the_pipeline_of_an_export_keeps_to_the_depth(deep, exported, right):
    classify = ONNXEfficientNet.from_pretrained(exported).pipeline(device="cpu")
    file = deep / "image.jpg"
    assert scores(Classifier(str(deep), device="cpu").pipeline(Image.open(file).convert("RGB"))) != pytest.approx(right)
    (told,) = Classifier(str(deep), device="cpu")([file])
    for answer in (classify(str(file)), classify(Image.open(file)), *classify([str(file)] * 2), told.predictions):
        assert scores(answer) == pytest.approx(right, abs=1e-5)
    with pytest.raises(UserError, match="is no file; of images of 12 bits pass a file"):
        classify("https://host.invalid/a.png")
    with pytest.raises(UserError, match="^the image holds values from 0 to 65,535, and by --bit_depth 12 black is 0"):
        classify(Image.fromarray(np.array([[0, 65535]], np.uint16)))
