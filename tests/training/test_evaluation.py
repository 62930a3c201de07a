"""validate: which classes it measures, and that it says so."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.commands import validate
from effnet_hf.errors import UserError
from effnet_hf.training import validate_checkpoint

from .workbench import small_recipe, write_squares, write_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Blue, green, red and two more: of random weights whose answers differ."""
    folder = write_tiny(tmp_path_factory.mktemp("models") / "five")
    network = EfficientNetNVForImageClassification.from_pretrained(folder)
    torch.manual_seed(3)
    network.classifier = torch.nn.Linear(network.config.hidden_dim, 5)
    with torch.no_grad():
        network.classifier.weight *= 20
    name(network.config, ["zero", "one", "two", "three", "four"])
    network.save_pretrained(folder)
    return folder


def name(config, names):
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def named(squares, tmp_path):
    """The images in `val/` under other names; blue, green, red in this order."""

    def make(*names):
        folder = tmp_path / "-".join(names)
        (folder / "val").mkdir(parents=True)
        for old, new in zip(("blue", "green", "red"), names):
            (folder / "val" / new).symlink_to(squares / "val" / old)
        return str(folder)

    return make


@pytest.fixture
def by_hand(model, squares):
    """Top-1 in percent and loss, from the logits of blue, green and red images whose classes have these numbers."""

    def measure(labels, among=range(5)):
        processor, network = (
            kind.from_pretrained(model) for kind in (AutoImageProcessor, AutoModelForImageClassification)
        )
        hits, losses, columns = [], [], list(among)
        for folder, label in zip(("blue", "green", "red"), labels):
            images = [Image.open(path) for path in sorted((squares / "val" / folder).iterdir())]
            with torch.inference_mode():
                logits = network(**processor(images, return_tensors="pt")).logits[:, columns]
            target = torch.full((len(images),), columns.index(label))
            hits += (logits.argmax(1) == target).tolist()
            losses += torch.nn.functional.cross_entropy(logits, target, reduction="none").tolist()
        return 100 * sum(hits) / len(hits), sum(losses) / len(losses)

    return measure


def measured(model, folder, **options):
    notes = []
    figures = validate_checkpoint(str(model), folder, num_workers=0, tell=notes.append, **options)
    return figures, "\n".join(notes)


@pytest.mark.parametrize(
    "names, labels, said",
    [
        (
            ("zero", "one", "two"),
            (0, 1, 2),
            "by name; the checkpoint has them in another order; the data has 3 of its 5",
        ),
        (("0", "1", "2"), (0, 1, 2), "by the numbers that they name, e.g. 0 is zero"),
        (("04", "02", "3"), (4, 2, 3), "by the numbers that they name, e.g. 02 is two"),
        (("Two", "FOUR", "one"), (2, 4, 1), "without regard to case"),
    ],
)
def test_every_class_is_measured_as_what_it_is(names, labels, said, model, named, by_hand):
    figures, notes = measured(model, named(*names))
    assert (figures["top1"], figures["loss"]) == pytest.approx(by_hand(labels), rel=1e-4) and said in notes
    assert (figures["classes"], figures["classes_of_the_data"], figures["classes_of_the_checkpoint"]) == (5, 3, 5)


def test_restricted_to_the_datas_classes(model, named, by_hand):
    data, labels = named("4", "2", "3"), (4, 2, 3)
    everywhere, restricted = measured(model, data)[0], measured(model, data, restrict_classes=True)[0]
    expected = by_hand(labels, among=labels)
    assert (restricted["top1"], restricted["loss"]) == pytest.approx(expected, rel=1e-4)
    assert restricted["loss"] < everywhere["loss"] and restricted["classes"] == 3


def test_what_cannot_be_matched_is_refused_and_by_position_is_said(model, named, by_hand, tmp_path):
    three = tmp_path / "three"
    write_tiny(three)
    data = named("a", "b", "c")
    with pytest.raises(UserError, match="does not know: a, b, c; it knows 5, e.g. zero, one, two.$"):
        measured(model, data)
    with pytest.raises(UserError, match="say --classes_by_position true"):
        measured(three, data)
    figures, notes = measured(three, data, classes_by_position=True)
    by_name = measured(three, named("blue", "green", "red"))[0]
    for key in figures:
        if "ips" not in key and "time" not in key and "latency" not in key:
            assert figures[key] == (by_name[key] if isinstance(by_name[key], list) else pytest.approx(by_name[key])), (
                key
            )
    assert "in order, as --classes_by_position true says, e.g. a is blue" in notes
    with pytest.raises(UserError, match="does not know: d; it knows 3, e.g. blue, green, red. Name them as it does"):
        measured(three, named("blue", "d", "red"), classes_by_position=True)


def test_images_that_were_trained_on_are_spoken_of(tmp_path, capsys):
    """The folder of a run says which share it held out."""
    model, data = write_tiny(tmp_path / "model"), str(write_squares(tmp_path / "squares") / "train")
    capsys.readouterr()  # a bar of transformers 5, for the model's file
    (model / "recipe.yaml").write_text(small_recipe(data, tmp_path, val_fraction=0.25).to_yaml())
    assert "trained on a part of these images: --val_fraction 0.25, as then, measures" in measured(model, data)[1]
    with open(model / "recipe.yaml", "a") as recipe:
        recipe.write("topk: 3\n")
    (model / "recipe.yaml").write_text((model / "recipe.yaml").read_text().replace("top_k: 5\n", ""))
    assert "trained on" in measured(model, data)[1] and not capsys.readouterr().err
    assert "trained on" not in measured(model, data, val_fraction=0.25)[1]
    assert "trained on" not in measured(model, str(write_squares(tmp_path / "others") / "train"))[1]
    (model / "recipe.yaml").write_text("of: another version")
    assert "trained on" not in measured(model, data)[1]


def test_the_command_says_over_which_classes(model, named, capsys):
    arguments = ["--model", str(model), "--data_dir", named("4", "2", "3"), "--num_workers", "0"]
    validate.main(arguments)
    told = capsys.readouterr().out
    assert "the numbers that they name, e.g. 2 is two" in told
    assert "\nover all 5 classes of the checkpoint; the data has 3\non 12 images" in told
    assert "top5" not in told  # of five classes: always 100 %
    validate.main([*arguments, "--top_k", "3"])
    assert "top3 " in capsys.readouterr().out
    validate.main([*arguments, "--restrict_classes", "--top_k", "3"])
    told = capsys.readouterr().out
    assert "\nrestricted to the 3 classes of the data; the checkpoint knows 5\n" in told and "top3" not in told
    validate.main([*arguments, "--restrict_classes", "--json"])
    said = capsys.readouterr()
    assert json.loads(said.out)["classes"] == 3 and "e.g. 2 is two" in said.err
    assert json.loads(said.out)["top5"] == 100


def test_several_labels_per_image_are_not_restricted(model, named, tmp_path):
    network = EfficientNetNVForImageClassification.from_pretrained(model)
    network.config.problem_type = "multi_label_classification"
    network.save_pretrained(tmp_path / "several")
    AutoImageProcessor.from_pretrained(model).save_pretrained(tmp_path / "several")
    options = {"restrict_classes": True, "problem_type": "multi_label_classification"}
    with pytest.raises(UserError, match="--restrict_classes is for one label per image"):
        measured(tmp_path / "several", named("4", "2", "3"), **options)
