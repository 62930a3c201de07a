"""Several labels per image, from a CSV file to what is published: losses, figures, thresholds, sentences."""

import contextlib
import csv
import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from transformers import pipeline

from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
from effnet_hf.commands import classify, validate
from effnet_hf.errors import UserError
from effnet_hf.multi_label import MULTI_LABEL
from effnet_hf.recipes import Recipe
from effnet_hf.training import train, validate_checkpoint
from effnet_hf.training.optim import distillation_loss, training_loss

from .workbench import built, quantized_recipe, read_rows, run, small_recipe, write_squares


COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}
SEVERAL = {"label_separator": ";"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of two halves, each of a colour or grey, and a list of their colours; some have none."""
    root, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    rows = []
    for split, count in (("train", 24), ("val", 20)):
        (root / split).mkdir()
        for i in range(count):
            names = [[*COLOURS, "none"][k] for k in rng.integers(0, 4, 2)]
            halves = [np.full((24, 12, 3), COLOURS.get(name, (120, 120, 120))) for name in names]
            noisy = np.concatenate(halves, 1) + rng.integers(-40, 40, (24, 24, 3))
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(root / split / f"{i}.png")
            rows.append((f"{split}/{i}.png", sorted(set(names) - {"none"})))
    for split in ("train", "val"):  # a line without a label would be one that is missing
        rows = [row for row in rows if row[1] or not row[0].startswith(split)]
    with open(root / "labels.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label"])
        writer.writerows((path, ";".join(names)) for path, names in rows)
    return root


def several(data, output_dir, **changes):
    return small_recipe(data, output_dir, labels=str(data / "labels.csv"), **{**SEVERAL, "mixup": 0, **changes})


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = several(data, folder / "model", cutmix=0.5, label_smoothing=0.1, quiet=False, learning_rate=0.02)
    with contextlib.redirect_stdout(io.StringIO()) as console:
        assert train(recipe) == 0
    return folder / "model", console.getvalue()


def truth(data, folder):
    """Of the validation images by hand: their files, probabilities and targets."""
    model = EfficientNetNVForImageClassification.from_pretrained(folder).eval()
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    with open(data / "labels.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["path"].startswith("val/")]
    files = [data / row["path"] for row in rows]
    with torch.no_grad():
        pixels = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
        logits = model(pixels).logits
    targets = np.array([[name in row["label"].split(";") for name in COLOURS] for row in rows]).astype(int)
    return model.config, files, logits, targets


def test_figures_are_scikit_learns_at_the_thresholds_that_are_saved(data, trained):
    folder, console = trained
    config, _, logits, targets = truth(data, folder)
    assert config.problem_type == MULTI_LABEL and list(config.id2label.values()) == list(COLOURS)
    scores, thresholds = logits.sigmoid().numpy(), np.array(config.thresholds)
    expected = {
        "map": 100 * average_precision_score(targets, scores),
        "f1": 100 * f1_score(targets, scores >= thresholds, average="macro"),
        "loss": torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor(targets).float()).item(),
    }
    figures = validate_checkpoint(
        str(folder), str(data), labels=str(data / "labels.csv"), per_device_batch_size=7, num_workers=0, **SEVERAL
    )
    summary = json.loads((folder / "summary.json").read_text())
    for found in (figures, summary):
        assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-4)
        assert found["n"] == len(targets) and "top1" not in found
    for threshold, column, target in zip(thresholds, scores.T, targets.T):
        best = max(f1_score(target, column >= edge) for edge in [0, *column])
        assert f1_score(target, column >= threshold) == pytest.approx(best)


def test_the_best_model_is_that_of_the_highest_map(trained):
    folder, console = trained
    rows = read_rows(folder, "val") + read_rows(folder, "val_ema")
    best = max(value for row in rows for name, value in row.items() if name.endswith(".map"))
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["map"] == best and f"mAP {best:.2f} %, F1 {summary['f1']:.2f} %" in console
    assert "3 classes, several per image" in console and "val.map" in console and "top1" not in console
    card = (folder / "README.md").read_text()
    assert "logits.sigmoid()" in card and "softmax" not in card and "Mean average precision (%)" in card
    assert "by mAP on the images" in card and "Top-1" not in card and "Binary cross-entropy loss" in card


def test_transformers_own_pipeline_takes_the_sigmoid_and_our_command_the_thresholds(data, trained, capsys):
    folder, _ = trained
    config, files, logits, _ = truth(data, folder)
    scores = dict(zip(COLOURS, logits[0].sigmoid().tolist()))
    model = EfficientNetNVForImageClassification.from_pretrained(folder)
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    found = pipeline("image-classification", model=model, image_processor=processor, device="cpu")(str(files[0]))
    assert {each["label"]: each["score"] for each in found} == pytest.approx(scores, abs=1e-5)
    assert classify.main(["--model", str(folder), "--device", "cpu", "--json", str(files[0])]) == 0
    told = json.loads(capsys.readouterr().out)["predictions"]
    assert {each["label"]: each["score"] for each in told} == pytest.approx(scores, abs=1e-5)
    passed = {name for name, least in zip(COLOURS, config.thresholds) if scores[name] >= least}
    assert {each["label"] for each in told if each["passed"]} == passed


def test_the_command_says_what_it_measured_and_where(data, trained, capsys):
    folder, _ = trained
    labels = ["--labels", str(data / "labels.csv"), "--label_separator", ";"]
    validate.main(["--model", str(folder), "--data_dir", str(data), "--num_workers", "0", *labels])
    summary, printed = json.loads((folder / "summary.json").read_text()), capsys.readouterr().out
    assert f"mAP {summary['map']:.2f} %   F1 {summary['f1']:.2f} % at the checkpoint's thresholds" in printed


def test_a_resumed_run_ends_as_an_uninterrupted_one_and_notices_another_label(data, trained, tmp_path):
    recipe = several(data, tmp_path / "model", cutmix=0.5, label_smoothing=0.1, learning_rate=0.02)
    train(recipe.replace(run_epochs=1))
    train(recipe.replace(resume="auto"))
    mine, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "model", trained[0]))
    assert [mine[name] for name in ("map", "f1", "loss")] == [theirs[name] for name in ("map", "f1", "loss")]
    text = (data / "labels.csv").read_text().splitlines()
    path, label = text[1].split(",")
    (tmp_path / "labels.csv").write_text(
        "\n".join([text[0], f"{path},{'red' if label != 'red' else 'blue'}", *text[2:]])
    )
    with pytest.raises(UserError, match=f"other images: {path} was {label.replace(';', ', ')}; go on"):
        train(recipe.replace(resume="auto", labels=str(tmp_path / "labels.csv"), epochs=3))


def test_a_classifier_is_kept_where_the_classes_are_the_same(data, trained, tmp_path):
    single = write_squares(tmp_path / "squares", per_class=4, validation=2)
    train(small_recipe(single, tmp_path / "one", epochs=1, ema_decay=0))
    recipe = several(data, tmp_path / "run", model=str(tmp_path / "one"), epochs=1)
    from effnet_hf.training import build_model, open_start

    start = open_start(recipe)
    model = build_model(recipe, start, list(COLOURS), several=True)
    assert torch.equal(model.classifier.weight, start.checkpoint.load().classifier.weight)
    assert model.config.problem_type == MULTI_LABEL and model.config.thresholds is None
    kept = built(several(data, tmp_path / "run", model=str(trained[0])), list(COLOURS))
    assert kept.config.problem_type == "single_label_classification" and kept.config.thresholds is None
    other = build_model(recipe, start, ["blue", "green", "yellow"], several=True)
    assert not torch.equal(other.classifier.weight, model.classifier.weight)
    with pytest.raises(UserError, match="with one label per image, and the data has several; fine-tune it"):
        validate_checkpoint(str(tmp_path / "one"), str(data), labels=str(data / "labels.csv"), num_workers=0, **SEVERAL)
    with pytest.raises(UserError, match="with several labels per image, and the data has one; .* --problem_type"):
        validate_checkpoint(str(trained[0]), str(single), num_workers=0)
    measured = validate_checkpoint(str(trained[0]), str(single), num_workers=0, problem_type=MULTI_LABEL)
    assert measured["n"] == 6 and 0 < measured["map"] <= 100


def test_quantization_and_a_teacher_keep_to_several_labels(data, trained, tmp_path):
    pytest.importorskip("modelopt")
    options = {"labels": str(data / "labels.csv"), **SEVERAL, "mixup": 0, "epochs": 1, "distillation_weight": 0.5}
    options |= {"ema_decay": 0, "calibration_batches": 1}
    recipe = quantized_recipe(data, tmp_path / "qat", trained[0], **options)
    assert run(recipe) == 0
    figures = json.loads((tmp_path / "qat/quantization.json").read_text())
    summary = json.loads((tmp_path / "qat/summary.json").read_text())
    assert {"map", "f1"} <= figures["float"].keys() and figures["qat"]["map"] == summary["map"]
    assert "mAP, % (n = " in (tmp_path / "qat/README.md").read_text()
    single = write_squares(tmp_path / "squares", per_class=4, validation=2)
    with pytest.raises(UserError, match="was trained with several labels per image, and the data has one"):
        run(quantized_recipe(single, tmp_path / "other", trained[0]))


def test_loss_smooths_and_softens_class_by_class():
    torch.manual_seed(0)
    logits, teacher, targets = torch.randn(4, 3), torch.randn(4, 3), torch.randint(2, (4, 3)).float()
    p, t = logits.double().sigmoid(), targets.double() * 0.8 + 0.1
    by_hand = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
    assert training_loss(logits, targets, 0.2, multi_label=True) == pytest.approx(by_hand.item(), abs=1e-6)
    q, p = (teacher.double() / 2).sigmoid(), (logits.double() / 2).sigmoid()
    by_hand = 4 * (q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()).mean()
    assert distillation_loss(logits, teacher, 2.0, multi_label=True) == pytest.approx(by_hand.item(), abs=1e-6)
    assert distillation_loss(logits * 100, logits * 100, 1.0, multi_label=True) == 0


def test_our_loss_is_that_of_transformers(trained):
    model = EfficientNetNVForImageClassification.from_pretrained(trained[0]).eval()
    pixels, labels = torch.randn(2, 3, 16, 16), torch.tensor([[1.0, 0, 1], [0, 0, 0]])
    with torch.no_grad():
        output = model(pixels, labels=labels)
    assert output.loss == pytest.approx(training_loss(output.logits, labels, 0.0, multi_label=True).item())


def test_regression_is_no_classifier_of_ours(trained, tmp_path):
    model = EfficientNetNVForImageClassification.from_pretrained(trained[0])
    model.config.problem_type, model.config.thresholds = "regression", None
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is for regression"):
        validate_checkpoint(str(tmp_path), "nowhere")
    assert Recipe().problem_type is None


def test_an_average_that_was_not_validated_again_has_the_best_models_thresholds(data, trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "model")
    lines = (data / "labels.csv").read_text().splitlines()
    (tmp_path / "fewer.csv").write_text("\n".join([lines[0], *lines[3:]]) + "\n")  # so that no epoch is left
    recipe = several(data, tmp_path / "model", cutmix=0.5, label_smoothing=0.1, learning_rate=0.02)
    train(recipe.replace(resume="auto", labels=str(tmp_path / "fewer.csv"), accept_changed_data=True))
    main, average = (
        EfficientNetNVForImageClassification.from_pretrained(folder).config
        for folder in (tmp_path / "model", tmp_path / "model/ema")
    )
    assert main.thresholds is not None and average.thresholds == main.thresholds
