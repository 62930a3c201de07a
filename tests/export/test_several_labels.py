"""Exports of a network for several labels per image: sigmoids, thresholds, mAP, wherever softmax and top-1 stood."""

import json

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.commands import classify
from effnet_hf.errors import UserError
from effnet_hf.export import ONNXEfficientNet, export_model
from effnet_hf.export.check import CheckImages, accuracy, compare, deciding
from effnet_hf.export.network import ExportedNetwork
from effnet_hf.export.options import ExportOptions

from .conftest import NAMES, listed, make_checkpoint


THRESHOLDS = [0.25, 0.5, 0.75]


@pytest.fixture(scope="module")
def tags(tmp_path_factory):
    several = {"problem_type": "multi_label_classification", "thresholds": THRESHOLDS}
    return make_checkpoint(tmp_path_factory.mktemp("tags") / "model", **several)


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Of seven labels, and its export. The likeliest class has a high threshold."""
    root, names = tmp_path_factory.mktemp("many"), dict(enumerate("abcdefg"))
    several = {"problem_type": "multi_label_classification", "thresholds": [0.01, 0.999] * 3 + [0.01]}
    make_checkpoint(root / "model", id2label=names, **several)
    export_model(str(root / "model"), root / "onnx")
    return root / "model", root / "onnx"


@pytest.fixture
def expected(tags, image):
    processor = EfficientNetNVImageProcessor.from_pretrained(tags)
    with torch.no_grad():
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        logits = EfficientNetNVForImageClassification.from_pretrained(tags).eval()(pixels).logits
    return dict(zip(NAMES, logits[0].sigmoid().tolist()))


@pytest.mark.parametrize("how", [{}, {"with_softmax": True}, {"with_preprocessing": True}], ids=str)
def test_every_way_of_asking_gives_sigmoids(how, tags, image, expected, tmp_path):
    exported = export_model(str(tags), tmp_path / "onnx", **how)
    model = ONNXEfficientNet.from_pretrained(tmp_path / "onnx")
    tolerance = 2e-2 if "with_preprocessing" in how else 1e-5
    found = {each["label"]: each["score"] for each in model.classify(image)}
    assert found == pytest.approx(expected, abs=tolerance) and sum(found.values()) != pytest.approx(1)
    assert model.metadata["problem_type"] == "multi_label_classification" and model.metadata["thresholds"] == THRESHOLDS
    assert model.config.thresholds == THRESHOLDS
    assert "agreement on all labels 100.00 %" in exported.summary() and "top-1" not in exported.summary()
    card = (tmp_path / "onnx/README.md").read_text()
    assert "An image may have several labels" in card and "top-1" not in card
    assert "an image has a label from its entry in config.json's list of thresholds on" in card and "\\`" not in card
    if "with_preprocessing" in how:
        assert 'json.loads(facts["thresholds"])' in card
        return
    probabilities = {each["label"]: each["score"] for each in model.pipeline(device="cpu")(image)}
    assert probabilities == pytest.approx(expected, abs=1e-5)
    if how:
        session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx")
        pixels = EfficientNetNVImageProcessor.from_pretrained(tags)(image, return_tensors="np")["pixel_values"]
        (raw,) = session.run(["probabilities"], {"pixel_values": pixels})
        assert dict(zip(NAMES, raw[0].tolist())) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_file_says_which_labels_an_image_has_as_our_command_does(top_k, many, image, tmp_path, capsys):
    tags, onnx = many
    image.save(tmp_path / "a.png")
    words = [] if top_k is None else ["--top_k", str(top_k)]
    classify.main(["--model", str(tags), "--device", "cpu", "--json", str(tmp_path / "a.png"), *words])
    theirs = json.loads(capsys.readouterr().out)["predictions"]
    mine = ONNXEfficientNet.from_pretrained(onnx).classify(image, top_k=top_k)
    assert len(mine) == (top_k or 7) and [each["label"] for each in mine] == [each["label"] for each in theirs]
    for one, other in zip(mine, theirs):
        assert one == other | {"score": pytest.approx(other["score"], abs=1e-5)}
    passed = [each["passed"] for each in mine]
    assert passed[0] and passed == sorted(passed, reverse=True)
    if top_k is None:  # a likelier one does not
        assert mine[0]["score"] < max(each["score"] for each in mine if not each["passed"])


def test_a_program_of_torch_export_ends_in_a_sigmoid_too(tags, image, expected):
    network = EfficientNetNVForImageClassification.from_pretrained(tags).eval()
    pixels = EfficientNetNVImageProcessor.from_pretrained(tags)(image, return_tensors="pt")["pixel_values"]
    found = ExportedNetwork(network, ExportOptions(format="pt2", with_softmax=True))(pixels)
    assert dict(zip(NAMES, found[0].tolist())) == pytest.approx(expected, abs=1e-5)


def test_one_label_per_image_is_what_it_was(exported):
    assert ONNXEfficientNet.from_pretrained(exported).metadata["problem_type"] == "single_label_classification"
    assert "thresholds" not in ONNXEfficientNet.from_pretrained(exported).metadata


@pytest.mark.parametrize("how", [{}, {"with_preprocessing": True}], ids=str)
def test_its_figure_is_map_on_labelled_images(how, tags, photos, tmp_path):
    rows = listed(photos, tmp_path / "labels.csv", "val")
    with pytest.raises(UserError, match="with several labels per image, and the data has one; .* add --problem_type"):
        export_model(str(tags), tmp_path / "onnx", data_dir=str(photos))
    exported = export_model(
        str(tags),
        tmp_path / "onnx",
        data_dir=str(photos),
        labels=str(tmp_path / "labels.csv"),
        label_separator=";",
        **how,
    )
    processor = EfficientNetNVImageProcessor.from_pretrained(tags)
    images = [Image.open(photos / path) for path, names in rows]
    with torch.no_grad():
        pixels = processor(images, return_tensors="pt")["pixel_values"]
        logits = EfficientNetNVForImageClassification.from_pretrained(tags).eval()(pixels).logits
    targets = np.array([[name in names for name in NAMES] for _, names in rows]).astype(int)
    by_hand = 100 * average_precision_score(targets, logits.numpy())
    assert exported.top1[1] == pytest.approx(by_hand, abs=0.01)
    assert exported.top1[0] == pytest.approx(by_hand, abs=3 if how else 0.01)  # its own resizing
    assert (
        f"mAP      {exported.top1[0]:.2f} % on these, the checkpoint in PyTorch {by_hand:.2f} %" in exported.summary()
    )
    card = (tmp_path / "onnx/README.md").read_text()
    assert f"mAP on {len(images)} images" in card and "was measured" not in card


def test_agreement_is_that_of_the_labels_at_the_thresholds(tags):
    config = EfficientNetNVForImageClassification.from_pretrained(tags).config
    logits = torch.tensor([[0.2, 0.6, 0.7], [0.3, 0.4, 0.8]]).logit().numpy()
    other = torch.tensor([[0.26, 0.6, 0.7], [0.3, 0.4, 0.8]]).logit().numpy()
    found = compare(logits, other, deciding(config, ExportOptions()))
    assert found.agreement == 50 and found.certain_agreement == 100 and found.several  # 0.25 lies within the difference
    far = torch.tensor([[0.2, 0.6, 0.7], [0.3, 0.4, 0.2]]).logit().numpy()
    assert compare(logits, far, deciding(config, ExportOptions())).agreement == 50
    assert deciding(config, ExportOptions(with_softmax=True)).tolist() == THRESHOLDS
    assert accuracy(logits, np.zeros((2, 3), int)) is None and CheckImages().labels is None
