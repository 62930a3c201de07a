"""Stopping and going on in the corners: between log lines, at an epoch's end, in stages, from another folder."""

import json

import pytest

from effnet_hf.errors import UserError
from effnet_hf.training import loop, train
from effnet_hf.training.signals import EXIT_INTERRUPTED, Interruption

from .workbench import fingerprint, read_rows, small_recipe, write_squares


PLAIN = {"survival_prob": 1.0, "dropout_rate": 0.0, "mixup": 0.0, "ema_decay": 0.0, "augmentation": "none"}


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture
def interrupted(monkeypatch):
    """Trains until the loop has asked for the n-th time whether to stop."""

    def run(recipe, n: int):
        calls = []

        def asked(self):
            calls.append(None)
            self.received = "SIGTERM"
            return len(calls) == n

        with monkeypatch.context() as patch:
            patch.setattr(Interruption, "agreed", asked)
            assert train(recipe) == EXIT_INTERRUPTED

    return run


def steps(folder) -> list[tuple[int, int]]:
    return [(row["epoch"], row["update"]) for row in read_rows(folder, "train")]


def checkpoints(folder) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("update-*"))


def test_stop_between_two_lines_of_metrics_loses_no_part_of_a_mean(squares, tmp_path, interrupted):
    settings = {**PLAIN, "log_every": 3, "epochs": 1}
    assert train(small_recipe(squares, tmp_path / "whole", **settings)) == 0
    recipe = small_recipe(squares, tmp_path / "broken", resume="auto", **settings)
    interrupted(recipe, 2)
    assert train(recipe) == 0 and steps(tmp_path / "broken") == [(0, 3), (0, 4)]
    losses = [[row["train.loss"] for row in read_rows(tmp_path / name, "train")] for name in ("whole", "broken")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("how", ["a stage", "a signal"])
def test_launch_ends_with_a_checkpoint_even_if_epochs_write_none(how, squares, tmp_path, interrupted):
    recipe = small_recipe(squares, tmp_path, resume="auto", checkpoint_every_epochs=0, **PLAIN)
    if how == "a stage":
        assert train(recipe.replace(run_epochs=1)) == 0
    else:
        interrupted(recipe, 4)  # three steps ask, the fourth is the epoch's last and does not; then its validation
    assert checkpoints(tmp_path) == ["update-00000004"]
    assert train(recipe) == 0
    assert steps(tmp_path) == [(epoch, update) for epoch in range(2) for update in range(1, 5)]


def test_run_that_stopped_early_has_ended(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path, **{**PLAIN, "epochs": 9, "early_stopping_patience": 1, "resume": "auto"})
    recipe = recipe.replace(learning_rate=0.0, batch_norm_momentum=0.0)
    for _ in range(2):
        assert train(recipe) == 0
        assert len(read_rows(tmp_path, "epoch")) == 2


def test_checkpoint_of_another_folder_brings_its_history_and_best_model(squares, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(small_recipe(squares, first)) == 0
    origin = first / "checkpoints/update-00000004"
    assert train(small_recipe(squares, second, resume=str(origin))) == 0
    assert fingerprint(first) == fingerprint(second)
    with pytest.raises(UserError, match="already holds another run"):
        train(small_recipe(squares, second, resume=str(origin)))
    assert train(small_recipe(squares, second, resume=str(origin), overwrite=True)) == 0
    assert fingerprint(first) == fingerprint(second)


def test_going_back_to_an_older_checkpoint_leaves_the_later_ones_behind(squares, tmp_path, interrupted):
    recipe = small_recipe(squares, tmp_path, checkpoint_every_steps=1, keep_checkpoints=9, **PLAIN)
    assert train(recipe) == 0 and len(checkpoints(tmp_path)) == 8
    interrupted(recipe.replace(resume=str(tmp_path / "checkpoints/update-00000005")), 1)
    assert checkpoints(tmp_path)[-1] == "update-00000006"
    assert steps(tmp_path)[-1] == (1, 2)


def test_other_division_of_the_batch_starts_with_a_whole_step(squares, tmp_path, interrupted, monkeypatch):
    recipe = small_recipe(squares, tmp_path, resume="auto", per_device_batch_size=8, **PLAIN)
    interrupted(recipe, 3)  # three micro-batches so far, and each of them was a step
    updated = []

    def noted(run, batch, step=loop.train_step):
        loss = step(run, batch)
        updated.append(run.accelerator.sync_gradients)
        return loss

    monkeypatch.setattr(loop, "train_step", noted)
    assert train(recipe.replace(per_device_batch_size=4)) == 0
    assert updated == [False, True] * 5


def test_resumed_log_never_has_holes(squares, tmp_path):
    """Somebody cleaned up: the log is shorter than the checkpoint remembers."""
    recipe = small_recipe(squares, tmp_path, resume="auto", run_epochs=1, **PLAIN)
    assert train(recipe) == 0
    (tmp_path / "metrics.jsonl").write_text("")
    assert train(recipe) == 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
