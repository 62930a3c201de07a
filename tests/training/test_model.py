"""What becomes of a checkpoint's classifier: kept in the order of the data's classes, in part, or new."""

import re

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageClassification

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.errors import UserError
from effnet_hf.training import open_start, train, validate_checkpoint
from effnet_hf.training.model import Head, build_networks, take_classes

from .conftest import cheap_runs  # noqa: F401
from .workbench import built, fingerprint, quantized_recipe, run, small_recipe, write_squares, write_tiny


CLASSES = ["blue", "green", "red"]
ORDER = [2, 0, 1]  # the numbers of red, blue and green among the tiny checkpoint's


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Makes a checkpoint that knows these names; every one has the same weights."""
    weights = write_tiny(tmp_path_factory.mktemp("tiny") / "first")

    def make(*names):
        folder = tmp_path_factory.mktemp("tiny") / "model"
        network = EfficientNetNVForImageClassification.from_pretrained(weights)
        if len(names) != 3:
            torch.manual_seed(1)
            network.classifier = torch.nn.Linear(network.config.hidden_dim, len(names))
        network.config.id2label = dict(enumerate(names))
        network.config.label2id = {name: i for i, name in enumerate(names)}
        network.save_pretrained(folder)
        EfficientNetNVImageProcessor.for_image_size(32, 0).save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def logits(network, images):
    with torch.inference_mode():
        return network.eval()(images).logits


def numbered(squares, folder, names):
    """The same images under other class names, in this order of blue, green and red."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for old, new in zip(CLASSES, names, strict=True):
            (folder / split / new).symlink_to(squares / split / old)
    return folder


@pytest.mark.parametrize(
    "known, data, order, names",
    [
        (CLASSES, CLASSES, [0, 1, 2], CLASSES),
        (["red", "blue", "green"], CLASSES, [1, 2, 0], CLASSES),
        (["two", "zero", "one"], ["0", "1", "2"], [1, 2, 0], ["zero", "one", "two"]),
        (["jay", "tench, Tinca tinca", "goldfish"], ["n01440764", "n01443537", "n01580077"], [1, 2, 0], None),
        (["LABEL_0", "LABEL_1", "LABEL_2"], ["1", "2", "0"], [1, 2, 0], ["1", "2", "0"]),
        (["cat", "dog", "elk"], ["2", "0", "1"], [2, 0, 1], ["elk", "cat", "dog"]),
    ],
)
def test_the_same_classes_in_another_order_keep_their_rows(known, data, order, names, squares, tiny, tmp_path, images):
    folder = tiny(*known)
    base = AutoModelForImageClassification.from_pretrained(folder)
    network = built(small_recipe(squares, tmp_path, model=str(folder)), data)
    assert torch.equal(network.classifier.weight, base.classifier.weight[order])
    assert torch.equal(network.classifier.bias, base.classifier.bias[order]) and network.classifier.bias.requires_grad
    torch.testing.assert_close(logits(network, images), logits(base, images)[:, order])
    assert [network.config.id2label[i] for i in range(3)] == (names or [known[i] for i in order])
    network.save_pretrained(tmp_path / "saved")
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.classifier.weight, network.classifier.weight)
    assert again.config.label2id == {name: i for i, name in network.config.id2label.items()}


@pytest.mark.parametrize(
    "known, data", [(["a", "b", "c"], CLASSES), (["blue", "green", "grey"], CLASSES), ([*CLASSES, "grey"], CLASSES)]
)
def test_other_classes_or_a_part_of_them_get_a_new_classifier(known, data, squares, tiny, tmp_path):
    folder = tiny(*known)
    base = AutoModelForImageClassification.from_pretrained(folder)
    network = built(small_recipe(squares, tmp_path, model=str(folder)), data)
    assert not torch.isin(network.classifier.weight, base.classifier.weight).any()
    assert torch.equal(network.efficientnet.encoder.stem.conv.weight, base.efficientnet.encoder.stem.conv.weight)
    assert list(network.config.label2id) == data


def test_by_position_keeps_the_classifier_and_its_names(squares, tiny, tmp_path):
    folder = tiny("a", "b", "c")
    base = AutoModelForImageClassification.from_pretrained(folder)
    network = built(small_recipe(squares, tmp_path, model=str(folder), classes_by_position=True), CLASSES)
    assert torch.equal(network.classifier.weight, base.classifier.weight) and list(network.config.label2id) == list(
        "abc"
    )


@pytest.mark.parametrize("placement", ["nvidia", "cpu"])
def test_a_quantized_classifier_keeps_the_range_of_every_class(placement, images, tmp_path):
    pytest.importorskip("modelopt")
    from effnet_hf.quantization import calibrate, quantize

    network = EfficientNetNVForImageClassification.from_pretrained(write_tiny(tmp_path / "tiny"))
    with torch.no_grad():
        network.classifier.weight.mul_(torch.tensor([[1.0], [7.0], [40.0]]))
    quantize(network, placement=placement)
    calibrate(network, [images])
    before, ranges = logits(network, images), network.classifier.weight_quantizer._amax.clone()
    take_classes(network, np.array(ORDER), ["red", "blue", "green"])
    assert torch.equal(network.classifier.weight_quantizer._amax, ranges[ORDER])
    torch.testing.assert_close(logits(network, images), before[:, ORDER])
    network.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(
        logits(AutoModelForImageClassification.from_pretrained(tmp_path / "saved"), images), before[:, ORDER]
    )


def test_thresholds_go_with_their_classes(tmp_path):
    config = EfficientNetNVConfig.from_pretrained(write_tiny(tmp_path / "tiny"))
    config.problem_type, config.thresholds = "multi_label_classification", [0.1, 0.2, 0.3]
    network = EfficientNetNVForImageClassification(config)
    take_classes(network, np.array(ORDER), ["red", "blue", "green"])
    assert network.config.thresholds == [0.3, 0.1, 0.2]


def test_a_run_says_how_its_classes_were_matched(squares, tiny, tmp_path, capsys):
    data, folder = numbered(squares, tmp_path / "numbers", ["0", "1", "2"]), tiny("one", "zero", "two")
    settings = {"epochs": 0, "warmup_epochs": 0, "ema_decay": 0.0, "image_size": 32}
    assert train(small_recipe(data, tmp_path / "run", model=str(folder), **settings)) == 0
    told = capsys.readouterr().out
    assert "classes are matched with the checkpoint's by the numbers that they name, e.g. 0 is zero\n" in told
    assert f"weights of {folder}\n" in told
    started, other = (
        validate_checkpoint(str(path), str(data), num_workers=0, tell=lambda note: None)["loss"]
        for path in (tmp_path / "run", tiny("zero", "one", "two"))
    )
    same = validate_checkpoint(str(folder), str(data), num_workers=0, tell=lambda note: None)["loss"]
    assert started == pytest.approx(same, rel=1e-6) != pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize(
    "known, some, rows, said",
    [
        ([*CLASSES, "grey"], False, None, "model knows 4 classes, the data has 3 of them"),
        ([*CLASSES, "grey"], True, [0, 1, 2], "by name; the data has 3 of its 4"),
        (
            ["a", "b", "c"],
            False,
            None,
            "does not know 3 of the data's 3 classes: blue, green, red. .* say --classes_by_position true",
        ),
        (["red", "green", "blue"], False, [2, 1, 0], "the checkpoint has them in another order"),
        (CLASSES, False, [0, 1, 2], "^$"),
    ],
)
def test_why_a_classifier_is_new_is_said(known, some, rows, said, tiny):
    head = Head.of(open_checkpoint(str(tiny(*known))), CLASSES, False, some)
    assert (head.rows if rows is None else head.rows.tolist()) == rows and re.search(said, head.note)


def test_a_reordered_run_resumes_bit_exactly(squares, tiny, tmp_path):
    """Quantized, with a moving average and the same checkpoint as its teacher."""
    pytest.importorskip("modelopt")
    settings = {"distillation_weight": 0.5, "model": tiny("red", "blue", "green"), "calibration_batches": 1}
    assert run(quantized_recipe(squares, tmp_path / "whole", **settings)) == 0
    assert run(quantized_recipe(squares, tmp_path / "parts", **settings, run_epochs=1)) == 0
    assert run(quantized_recipe(squares, tmp_path / "parts", **settings, resume="auto")) == 0
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    assert list(AutoModelForImageClassification.from_pretrained(tmp_path / "whole").config.label2id) == CLASSES


def test_a_teacher_answers_in_the_datas_order_with_the_classes_that_it_has(squares, tiny, tmp_path, images, capsys):
    teacher = tiny("grey", "red", "black", "blue", "green")
    settings = {
        "teacher": str(teacher),
        "distillation_weight": 0.5,
        "ema_decay": 0.0,
        "image_size": 32,
        "warmup_epochs": 0,
    }
    recipe = small_recipe(squares, tmp_path / "run", **settings, epochs=0)
    _, taught = build_networks(recipe, open_start(recipe), CLASSES, torch.device("cpu"), False)
    base = AutoModelForImageClassification.from_pretrained(teacher)
    torch.testing.assert_close(logits(taught, images), logits(base, images)[:, [3, 4, 1]], rtol=1e-3, atol=1e-4)
    EfficientNetNVImageProcessor.for_image_size(32, 0, bit_depth=12).save_pretrained(teacher)
    with pytest.raises(UserError, match="trained with bit_depth 12 and would see images prepared with bit_depth 16;"):
        open_start(recipe.replace(bit_depth=16))
    assert open_start(recipe.replace(bit_depth=12)).processor.bit_depth == 12
    assert train(recipe) == 0
    order = "by name; the checkpoint has them in another order; the data has 3 of its 5"
    said = capsys.readouterr().out
    assert f"teacher: classes are matched with the checkpoint's {order}\n" in said
    assert "images are prepared with bit_depth not set, where --teacher was evaluated with bit_depth 12" in said
    recipe = recipe.replace(teacher=str(tiny("red", "blue", "grey")), output_dir=str(tmp_path / "other"))
    with pytest.raises(
        UserError,
        match="--teacher .* knows other classes than the data: .* does not know 1 of the data's 3 classes: green",
    ):
        train(recipe)
