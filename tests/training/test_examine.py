"""The report that a training ends with: on the best model, whichever launch has found it, and never at its cost."""

import csv
import io
import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from effnet_hf.analysis import put_temperature
from effnet_hf.manifest import problem, write_manifest
from effnet_hf.run_folder import RunFolder
from effnet_hf.training import examine, loop, train
from effnet_hf.training.owner import Owner

from .workbench import read_rows, small_recipe, write_squares


PLAIN = {"epochs": 1, "mixup": 0.0, "augmentation": "none", "report": True}
CLEAN = {"confusion.png", "reliability.png", "coverage.png"}  # without an image of the data


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run, its data, and what `write_report` was given."""
    base = tmp_path_factory.mktemp("finished")
    squares = write_squares(base / "squares")
    with mock.patch.object(examine, "write_report", wraps=examine.write_report) as writing:
        assert train(small_recipe(squares, base / "run", report_to=["tensorboard"], **PLAIN)) == 0
    return base / "run", squares, writing.call_args


def accuracy(folder) -> float:
    return json.loads((folder / "report/figures.json").read_text())["accuracy"]["value"]


def test_report_is_on_the_best_model(finished):
    run, squares, call = finished
    summary = json.loads((run / "summary.json").read_text())
    assert accuracy(run) == pytest.approx(summary["top1"] / 100)
    kind = "val_ema" if summary["best_is_ema"] else "val"
    assert summary["loss"] == read_rows(run, kind)[0][f"{kind}.loss"]
    figures = json.loads((run / "report/figures.json").read_text())
    assert figures["n"] == summary["n"] == 12 and figures["calibration"]["now"]["nll"] == pytest.approx(
        summary["loss"], rel=1e-5
    )
    page = (run / "report/report.html").read_text("utf-8")
    assert "best of 1 epochs (epoch 1" in page and "images/s" in page and str(squares) in page
    with open(run / "report/predictions.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"].removeprefix(str(squares / "val")) for row in rows][:2] == ["/blue/0.png", "/blue/1.png"]
    assert sum(int(row["correct"]) for row in rows) == round(12 * summary["top1"] / 100)
    assert call.kwargs["ours"] and call.kwargs["network"] is not None


def test_tracker_gets_the_first_batch_and_the_pictures_without_images(finished):
    run, _, _ = finished
    events = EventAccumulator(str(run / "logs/effnet_hf"), size_guidance={"images": 0}).Reload()
    steps = {"first_batch.png": 0} | dict.fromkeys(CLEAN, 4)
    assert {*events.Tags()["images"]} == {f"plots/{Path(name).stem}" for name in steps}
    for name, step in steps.items():
        (image,) = events.Images(f"plots/{Path(name).stem}")
        sent = Image.open(io.BytesIO(image.encoded_image_string))
        with Image.open(run / "plots" / name) as kept:
            assert image.step == step and sent.tobytes() == kept.convert("RGB").tobytes()


def test_card_has_the_classes_and_no_image_of_the_data(finished):
    run, _, _ = finished
    card = (run / "README.md").read_text()
    assert {path.name for path in (run / "plots").iterdir()} == CLEAN | {"curves.png", "first_batch.png"}
    for name in CLEAN:
        assert f"![plots/{name}](plots/{name})" in card
        assert (run / "plots" / name).read_bytes() == (run / "report" / name).read_bytes()
    assert "### Classes\n\n| class | images | precision, % | recall, % | F1, % |" in card
    for name in ("blue", "green", "red", "macro average", "weighted average"):
        assert f"\n| {name} | " in card
    assert "mistakes.png" not in card and "first_batch.png" not in card and ".html" not in card


def test_report_is_on_the_average_of_an_earlier_epoch_where_that_is_best(finished, tmp_path, monkeypatch):
    _, squares, _ = finished
    calls, validate = [], loop.validate

    def the_second_is_best(*arguments, **options):
        figures = validate(*arguments, **options)
        calls.append(1)
        return figures | {"top1": 99.0 if len(calls) == 2 else 1.0}  # the average after the first epoch

    monkeypatch.setattr(loop, "validate", the_second_is_best)
    changes = {**PLAIN, "epochs": 2, "ema_decay": 0.5, "batch_norm_momentum": 0.5, "learning_rate": 0.01}
    with mock.patch.object(examine, "write_report", wraps=examine.write_report) as writing:
        assert train(small_recipe(squares, tmp_path / "run", **changes)) == 0
    nll = json.loads((tmp_path / "run/report/figures.json").read_text())["calibration"]["now"]["nll"]
    losses = {kind: read_rows(tmp_path / "run", kind)[0][f"{kind}.loss"] for kind in ("val", "val_ema")}
    assert nll == pytest.approx(losses["val_ema"], rel=1e-5) and losses["val"] != pytest.approx(nll, rel=1e-3)
    published = load_file(tmp_path / "run/model.safetensors")
    shown = writing.call_args.kwargs["network"].state_dict()
    assert all(torch.equal(tensor, shown[name]) for name, tensor in published.items())


def test_best_of_an_earlier_launch_is_validated_again(finished, tmp_path):
    before, squares, _ = finished
    run = shutil.copytree(before, tmp_path / "run")
    shutil.rmtree(run / "report")
    assert train(small_recipe(squares, run, resume="auto", **PLAIN)) == 0
    name = "figures.json"
    found, expected = (json.loads((folder / "report" / name).read_text()) for folder in (run, before))
    assert found["classes"] == expected["classes"] and found["n"] == 12
    assert found["calibration"]["now"]["nll"] == pytest.approx(expected["calibration"]["now"]["nll"], rel=1e-5)


def test_report_that_cannot_be_drawn_costs_nothing_else(finished, tmp_path, capfd):
    before, squares, _ = finished
    run = shutil.copytree(before, tmp_path / "run")
    weights = (run / "model.safetensors").read_bytes()
    with mock.patch.object(examine, "write_report", side_effect=RuntimeError("no font\nmore")):
        assert train(small_recipe(squares, run, resume="auto", quiet=False, **PLAIN)) == 0
    printed = capfd.readouterr().out
    assert "report   none was written: RuntimeError: no font.\n" in printed and "next     " in printed
    assert (run / "model.safetensors").read_bytes() == weights and "### Classes" not in (run / "README.md").read_text()


def test_none_where_it_is_not_wanted(finished, tmp_path):
    _, squares, _ = finished
    assert train(small_recipe(squares, tmp_path / "run", **{**PLAIN, "report": False})) == 0
    assert not (tmp_path / "run/report").exists() and "confusion" not in (tmp_path / "run/README.md").read_text()


@pytest.mark.parametrize("theirs", ["notes/reviewed.txt", "suspects.csv"])
def test_what_somebody_put_into_a_report_is_kept_when_it_would_be_replaced(finished, tmp_path, capfd, theirs):
    before, squares, _ = finished
    run = shutil.copytree(before, tmp_path / "run")
    (run / "report" / theirs).parent.mkdir(exist_ok=True)
    (run / "report" / theirs).write_text("mine")  # of suspects.csv: marks in it
    stood = {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()}
    assert train(small_recipe(squares, run, resume="auto", quiet=False, **PLAIN)) == 0
    said = f"report   none was written: {run}/report holds what was not written here, e.g. {theirs}, and overwriting"
    assert said in capfd.readouterr().out
    assert {path: path.read_bytes() for path in (run / "report").rglob("*") if path.is_file()} == stood


def test_overwriting_keeps_what_somebody_put_into_a_report(finished, tmp_path, capfd):
    before, squares, _ = finished
    run = shutil.copytree(before, tmp_path / "run")
    for name in ("reviewed.txt", "suspects.csv"):
        (run / "report" / name).write_text("mine")
    recipe = small_recipe(squares, run, overwrite=True, quiet=False, **PLAIN)
    assert train(recipe) == 0
    assert "report   none was written: " in capfd.readouterr().out
    assert {path.name: path.read_text() for path in (run / "report").iterdir()} == {
        "reviewed.txt": "mine",
        "suspects.csv": "mine",
    }
    shutil.rmtree(run / "report")
    shutil.copytree(before / "report", run / "report")  # one that nobody touched goes as a whole
    assert (run / "plots/first_batch.png").exists()
    Owner(RunFolder(run), recipe).clear()
    assert not (run / "report").exists() and not (run / "plots").exists()


def test_temperature_stays_with_its_weights(finished, tmp_path, capfd):
    before, squares, call = finished
    run = shutil.copytree(before, tmp_path / "run")

    def temperatures():
        configs = [json.loads((folder / "config.json").read_text()) for folder in (run, run / "ema")]
        return [config["softmax_temperature"] for config in configs]

    put_temperature(run, 2.5)
    put_temperature(run / "ema", 3.5)
    with mock.patch.object(examine, "write_report", side_effect=RuntimeError("not drawn")) as writing:
        assert train(small_recipe(squares, run, resume="auto", quiet=False, **PLAIN)) == 0
    assert temperatures() == [2.5, 3.5] and problem(run) is problem(run / "ema") is None
    printed = capfd.readouterr().out
    assert f"the temperature 2.5 of {run} is kept" in printed and "is gone" not in printed
    then, now = call.args[0], writing.call_args.args[0]  # the report is on the network with its temperature
    assert now.temperature == 2.5 and now.logits == pytest.approx(then.logits / 2.5, rel=1e-4, abs=1e-6)

    with open(run / "model.safetensors", "ab") as file:  # other weights, and a manifest of them
        file.write(b" ")
    write_manifest(run)
    assert train(small_recipe(squares, run, resume="auto", quiet=False, **{**PLAIN, "report": False})) == 0
    assert temperatures() == [None, 3.5]
    assert f"the temperature that `validate --calibrate` had put into {run} is gone" in capfd.readouterr().out
