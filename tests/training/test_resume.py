"""Stopping and going on in the corners: between log lines, at an epoch's end, in stages, from another folder."""

import itertools
import json
import shutil
import time
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from effnet_hf.errors import UserError
from effnet_hf.training import loop, setup, train
from effnet_hf.training import run as run_module
from effnet_hf.training.resume import Checkpoints
from effnet_hf.training.signals import EXIT_INTERRUPTED, Interruption
from effnet_hf.training.state import TrainingState

from ..conftest import forget_accelerator
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


def test_going_back_goes_back_to_the_best_model_of_that_time(squares, tmp_path, monkeypatch):
    top1 = iter([50.0, 60.0, 70.0, 50.0, 10.0])  # the last two after going back: that epoch's again, and the next one's

    def validated(*arguments, validate=loop.validate, **settings):
        return {**validate(*arguments, **settings), "top1": next(top1)}

    monkeypatch.setattr(loop, "validate", validated)
    recipe = small_recipe(squares, tmp_path, **PLAIN, keep_checkpoints=9).replace(epochs=3)
    first = tmp_path / "checkpoints/update-00000004"
    assert train(recipe) == 0
    published = (tmp_path / "model.safetensors").read_bytes()
    assert published == (tmp_path / "checkpoints/update-00000012/model.safetensors").read_bytes()
    assert train(recipe.replace(resume=str(first), run_epochs=1)) == 0
    assert json.loads((tmp_path / "summary.json").read_text())["best_epoch"] == 1
    assert (tmp_path / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes() != published


def test_killed_after_going_back_a_run_does_not_return_to_the_future_it_left(squares, tmp_path, monkeypatch):
    recipe = small_recipe(squares, tmp_path, **PLAIN)
    assert train(recipe) == 0 and len(checkpoints(tmp_path)) == 2

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            train(recipe.replace(resume=str(tmp_path / "checkpoints/update-00000004")))
    assert checkpoints(tmp_path) == ["update-00000004"]
    assert train(recipe.replace(resume="auto")) == 0
    assert steps(tmp_path) == [(epoch, update) for epoch in range(2) for update in range(1, 5)]


def test_going_back_to_a_damaged_checkpoint_drops_nothing(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path, **PLAIN)
    assert train(recipe) == 0
    (tmp_path / "checkpoints/update-00000004/optimizer.safetensors").write_bytes(b"x")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="is damaged: optimizer.safetensors has 1 bytes"):
        train(recipe.replace(resume=str(tmp_path / "checkpoints/update-00000004"), weight_decay=0.5))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_finished_run_is_started_over_only_where_nothing_is_left_to_go_on_from(squares, tmp_path, capsys):
    recipe = small_recipe(squares, tmp_path, resume="auto", **PLAIN)
    assert train(recipe) == 0
    there = checkpoints(tmp_path)
    assert train(recipe.replace(overwrite=True, quiet=False)) == 0
    assert "nothing is removed: --overwrite counts only where" in capsys.readouterr().out
    assert checkpoints(tmp_path) == there
    for name in checkpoints(tmp_path):
        shutil.rmtree(tmp_path / "checkpoints" / name)
    with pytest.raises(UserError, match="holds a finished run without a checkpoint"):
        train(recipe)
    assert train(recipe.replace(overwrite=True, run_epochs=1)) == 0


def test_a_checkpoint_that_a_kill_left_aside_is_put_back(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path, resume="auto", **PLAIN)
    assert train(recipe) == 0
    published = (tmp_path / "model.safetensors").read_bytes()
    folder = tmp_path / "checkpoints"
    (folder / "update-00000008").rename(folder / ".update-00000008.effnet_hf-abcdabcd.old")
    (folder / ".best.effnet_hf-abcdabcd.tmp").mkdir()
    assert train(recipe) == 0  # nothing is left to train, and it publishes the same
    assert checkpoints(tmp_path)[-1] == "update-00000008" and not list(folder.glob(".*"))
    assert (tmp_path / "model.safetensors").read_bytes() == published


def test_settings_of_the_optimizer_are_those_of_the_launch(squares, tmp_path, monkeypatch):
    recipe = small_recipe(squares, tmp_path, resume="auto", **PLAIN)
    assert train(recipe.replace(run_epochs=1)) == 0
    settings = []

    def restored(state, folder, progress, read=TrainingState.read):
        read(state, folder, progress)
        groups = state.optimizer.param_groups
        settings.append({name: {group[name] for group in groups} for name in ("momentum", "weight_decay")})

    monkeypatch.setattr(TrainingState, "read", restored)
    assert train(recipe.replace(weight_decay=0.5, momentum=0.1)) == 0
    assert settings == [{"momentum": {0.1}, "weight_decay": {0.5, 0.0}}]
    with pytest.raises(UserError, match="was trained with --optimizer rmsprop, not sgd"):
        train(recipe.replace(optimizer="sgd", epochs=3))


def test_minutes_count_over_the_end_of_an_epoch(squares, tmp_path, monkeypatch):
    clock = itertools.count(time.monotonic(), 20)  # seconds; asked a few times in every step
    monkeypatch.setattr(run_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, progress: saved.append(progress.total_updates))
    recipe = small_recipe(squares, tmp_path, checkpoint_every_epochs=0, checkpoint_every_minutes=1.5, **PLAIN)
    train(recipe.replace(epochs=3))
    assert len(saved) > 2 and max(b - a for a, b in itertools.pairwise([0, *saved])) < 8, saved


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


def test_a_resumed_run_keeps_its_precision_whatever_this_machine_prefers(squares, tmp_path, monkeypatch, capsys):
    """Another GPU has another default; a run half in bf16 and half in fp16 is nobody's wish."""
    recipe = small_recipe(
        squares, tmp_path / "run", resume="auto", precision="bf16", epochs=2, run_epochs=1, image_size=32, **PLAIN
    )
    assert train(recipe) == 0
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    capsys.readouterr()
    assert train(recipe.replace(precision=None, run_epochs=0)) == 0  # a CPU's own choice is fp32
    starts = read_rows(tmp_path / "run", "run")
    assert [row["precision"] for row in starts] == ["bf16", "bf16"]
    assert "until here" not in capsys.readouterr().out


def test_a_change_of_precision_and_of_the_batch_per_device_is_said(squares, tmp_path, capsys):
    recipe = small_recipe(
        squares, tmp_path / "run", resume="auto", precision="fp32", epochs=2, run_epochs=1, image_size=32, **PLAIN
    )
    assert train(recipe) == 0
    capsys.readouterr()
    forget_accelerator()  # as a new process would be
    assert train(recipe.replace(precision="bf16", per_device_batch_size=8, run_epochs=0)) == 0
    said = capsys.readouterr().out
    assert "precision: fp32 until here, bf16 from here on" in said
    assert "images at once on a device: 4 until here, 8 from here on" in said


def test_a_checkpoint_without_a_loss_scale_goes_on_in_fp16_with_a_fresh_one(squares, tmp_path):
    recipe = small_recipe(
        squares, tmp_path / "run", resume="auto", precision="fp32", epochs=2, run_epochs=1, image_size=32, **PLAIN
    )
    assert train(recipe) == 0
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    run = setup.build_run(recipe, accelerator)
    setup.restore_run(run)
    run.loaders.close()
    run.report.close()
    assert run.progress.total_updates == 4
    assert accelerator.scaler is not None and accelerator.scaler.get_scale() == 64.0


def prepared(folder) -> dict:
    return json.loads((folder / "preprocessor_config.json").read_text())


def test_a_resumed_run_prepares_images_as_before_or_refuses(squares, tmp_path):
    """What its `--model` says, or says by now, does not change that, nor a recipe that a launch forgot to override."""
    base = small_recipe(squares, tmp_path / "base", epochs=1, image_size=24, resize_margin=8, **PLAIN)
    assert train(base.replace(interpolation="bilinear")) == 0
    asked = {"image_size": None, "resize_margin": None, "resume": "auto", "run_epochs": 1, **PLAIN}
    recipe = small_recipe(squares, tmp_path / "run", model=str(tmp_path / "base"), **asked)
    assert train(recipe) == 0
    before = prepared(tmp_path / "run")
    assert (before["size"], before["resample"]) == ({"shortest_edge": 32}, 2)
    other = {**before, "resample": 3}
    (tmp_path / "base/preprocessor_config.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="size 16, .*where --resume was evaluated with size 32, .*its --model"):
        train(recipe.replace(model=None, image_size=16, resize_margin=0))
    assert train(recipe.replace(run_epochs=0)) == 0
    assert prepared(tmp_path / "run") == before
