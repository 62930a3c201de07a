"""Unbalanced folders in the loop: the figure that decides, weights, the balanced sampler, folds."""

import json
import shutil
from types import SimpleNamespace

import pytest

from effnet_hf.errors import UserError
from effnet_hf.training import evaluation, loop, train
from effnet_hf.training.signals import EXIT_INTERRUPTED, Interruption

from .workbench import cheap_training, fingerprint, read_rows, small_recipe, write_squares


FIGURES = [  # of four epochs; the best loss, top-1, macro recall and macro F1 are in this order
    {"top1": 80.0, "macro_recall": 40.0, "macro_f1": 30.0, "loss": 0.1},
    {"top1": 95.0, "macro_recall": 50.0, "macro_f1": 40.0, "loss": 0.5},
    {"top1": 90.0, "macro_recall": 85.0, "macro_f1": 60.0, "loss": 0.4},
    {"top1": 90.0, "macro_recall": 85.0, "macro_f1": 70.0, "loss": 0.6},
]
QUICK = {
    "ema_decay": 0.0, "augmentation": "none", "mixup": 0.0, "report": False, "global_batch_size": 8,
    "per_device_batch_size": 8, "warmup_epochs": 0,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cheap():
    with cheap_training():
        yield


@pytest.fixture(scope="module")
def unbalanced(tmp_path_factory):
    """12 blue and green squares, two red ones; four of each to validate on."""
    root = write_squares(tmp_path_factory.mktemp("unbalanced"))
    for i in range(2, 12):
        (root / "train" / "red" / f"{i}.png").unlink()
    return root


@pytest.fixture
def told(monkeypatch):
    """The validations have found `FIGURES`, one after the other."""
    left = [figures | {"top5": 100.0, "n": 12} for figures in FIGURES]
    monkeypatch.setattr(loop, "validate", lambda *_, **__: left.pop(0))


def few_steps(unbalanced, output, **changes):
    return small_recipe(unbalanced, output, **{**QUICK, **changes})


@pytest.mark.parametrize("by, best", [(None, 2), ("macro_recall", 3), ("macro_f1", 4), ("loss", 1)])
def test_the_figure_that_was_asked_for_decides_everything(by, best, told, unbalanced, tmp_path, capsys):
    assert train(few_steps(unbalanced, tmp_path / "run", epochs=4, select_best=by)) == 0
    summary, name = json.loads((tmp_path / "run" / "summary.json").read_text()), by or "top1"
    assert summary["best_epoch"] == best and summary["best_by"] == name
    assert {key: summary[key] for key in FIGURES[0]} == FIGURES[best - 1]
    assert [row["best_epoch"] for row in read_rows(tmp_path / "run", "epoch")][-1] == best
    said = capsys.readouterr().out
    assert f"best     epoch {best} by {name}: " in said
    lines = [line for line in said.splitlines() if line.startswith("epoch ")]
    assert all(("val.macro_f1" in line) == (by == "macro_f1") for line in lines)
    assert "top5" not in said and read_rows(tmp_path / "run", "val")[0]["val.top5"] == 100  # of three classes
    assert ("\n         select_best " in said) == bool(by) == (f"\n         select_best {by}\n" in said)
    ends = [line.endswith("  best") for line in lines]
    assert ends[best - 1] and not any(ends[best:])
    card = (tmp_path / "run" / "README.md").read_text()
    words = {"top1": "top-1", "macro_recall": "macro recall", "macro_f1": "macro F1", "loss": "loss"}[name]
    assert f"Best of 4 epochs by {words} on the images" in card


def test_early_stopping_waits_for_that_figure(told, unbalanced, tmp_path):
    assert train(few_steps(unbalanced, tmp_path, epochs=4, select_best="loss", early_stopping_patience=1)) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epochs"], summary["best_epoch"]) == (2, 1)


def test_going_on_by_another_figure_is_refused_and_by_the_same_is_not(unbalanced, tmp_path):
    assert train(few_steps(unbalanced, tmp_path)) == 0
    with pytest.raises(UserError, match="chosen its best model by top1, not loss; resume with --select_best top1"):
        train(few_steps(unbalanced, tmp_path, resume="auto", select_best="loss"))
    assert train(few_steps(unbalanced, tmp_path, resume="auto", select_best="top1")) == 0


def test_figures_of_the_other_kind_are_refused_before_anything_is_written(unbalanced, tmp_path):
    with pytest.raises(UserError, match="--select_best map: the data has one label per image; choose one of top1, mac"):
        train(few_steps(unbalanced, tmp_path / "run", select_best="map"))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_balanced_run_with_weights_and_erasing_resumes_to_the_bit(unbalanced, tmp_path, monkeypatch, capsys):
    (tmp_path / "weights.csv").write_text("blue,1\ngreen,2\nred,3\n")
    options = {"sampler": "balanced", "class_weights": str(tmp_path / "weights.csv"), "random_erasing": 0.5}
    options |= {"augmentation": "randaugment", "ema_decay": 0.9}
    assert train(few_steps(unbalanced, tmp_path / "whole", **options)) == 0
    said = capsys.readouterr().out
    assert "class weights of the training loss: 0.5 (blue) to 1.5 (red)" in said
    assert (
        "\n         augmentation randaugment, random_erasing 0.5, sampler balanced, class_weights"
        f" {tmp_path}/weights.csv, ema_decay 0.9\n"
    ) in said
    calls = []

    def asked(self):
        calls.append(None)
        self.received = "SIGTERM"
        return len(calls) == 2

    with monkeypatch.context() as patch:
        patch.setattr(Interruption, "agreed", asked)
        assert train(few_steps(unbalanced, tmp_path / "parts", **options)) == EXIT_INTERRUPTED
    assert train(few_steps(unbalanced, tmp_path / "parts", resume="auto", **options)) == 0
    assert fingerprint(tmp_path / "parts") == fingerprint(tmp_path / "whole")
    with pytest.raises(UserError, match="was trained with --sampler balanced, not shuffled"):
        train(few_steps(unbalanced, tmp_path / "parts", resume="auto", **{**options, "sampler": "shuffled"}))


def test_weights_change_the_training_loss_and_no_figure_of_the_validation(unbalanced, tmp_path):
    runs = {}
    for name, options in (("plain", {}), ("weighed", {"class_weights": "balanced"})):
        assert train(few_steps(unbalanced, tmp_path / name, epochs=1, learning_rate=0.0, **options)) == 0
        runs[name] = [{key: row.get(key) for key in ("train.loss", "val.loss", "val.macro_recall")}
                      for kind in ("train", "val") for row in read_rows(tmp_path / name, kind)]  # fmt: skip
    assert runs["plain"][0]["train.loss"] != runs["weighed"][0]["train.loss"]
    assert runs["plain"][-1] == runs["weighed"][-1]


def test_measuring_on_another_fold_than_was_held_out_is_said(tmp_path):
    trained = small_recipe(tmp_path / "data", tmp_path / "run", folds=3, fold=1)
    (tmp_path / "recipe.yaml").write_text(trained.to_yaml())
    checkpoint = SimpleNamespace(name=str(tmp_path))
    said = [evaluation._note_on_training(checkpoint, trained.replace(fold=fold)) for fold in (1, 2)]
    assert said[0] == "" and "was trained on a part of these images: --folds 3 --fold 1, as then, measures" in said[1]
    assert "--folds 3 --fold 1" in evaluation._note_on_training(checkpoint, trained.replace(folds=0, fold=0))


def test_going_on_with_another_fold_is_refused(tmp_path):
    folder = write_squares(tmp_path / "squares")
    shutil.rmtree(folder / "val")
    options = {"folds": 3, "epochs": 1}
    assert train(few_steps(folder, tmp_path / "run", fold=1, **options)) == 0
    for changes, told in (({"fold": 2}, "--fold 1, not 2"), ({"fold": 1, "folds": 4}, "--folds 3, not 4")):
        settings = {**options, "epochs": 2, **changes}
        with pytest.raises(UserError, match=f"was trained with {told}; resume with its value"):
            train(few_steps(folder, tmp_path / "run", resume="auto", **settings))
