"""The loop: what it writes, that stopping and resuming change nothing, and that it refuses what it must."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from effnet_hf.errors import UserError
from effnet_hf.training import Run, loop, precision, train, validate, validate_checkpoint
from effnet_hf.training.signals import EXIT_INTERRUPTED, Interruption

from . import compare_layouts, kill_and_resume
from .workbench import built, fingerprint, small_recipe, write_squares
from .workbench import read_rows as rows


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


@pytest.fixture(scope="module")
def whole_run(squares, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert train(small_recipe(squares, output)) == 0
    return output


def test_validation_is_plain_cross_entropy_over_every_picture():
    """Neither smoothed nor averaged over batches, of which the last is smaller."""
    logits, labels = torch.randn(7, 4) * 5, torch.tensor([0, 1, 2, 3, 0, 1, 2])
    batches = [{"pixel_values": logits[i : i + 3], "labels": labels[i : i + 3]} for i in (0, 3, 6)]
    model = torch.nn.Module()
    model.forward = lambda pixel_values: SimpleNamespace(logits=pixel_values)
    figures = validate(model, SimpleNamespace(epoch=lambda _: iter(batches)), Accelerator(cpu=True), top_k=2)
    log_odds, ranks = logits.double().log_softmax(-1), logits.argsort(-1, descending=True)
    assert figures["loss"] == pytest.approx(-log_odds[range(7), labels].mean().item(), rel=1e-6)
    assert figures["top1"] == pytest.approx(100 * (ranks[:, 0] == labels).double().mean().item())
    assert figures["top2"] == pytest.approx(100 * (ranks[:, :2] == labels[:, None]).any(1).double().mean().item())
    assert figures["n"] == 7 and figures["data_time"] >= 0


def test_run_leaves_a_folder_that_opens_as_a_model(whole_run):
    names = {path.name for path in whole_run.iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "recipe.yaml"} <= names
    assert {"metrics.jsonl", "summary.json", "plots", "checkpoints", "ema"} <= names
    model = AutoModelForImageClassification.from_pretrained(whole_run)
    assert model.config.id2label == {0: "blue", 1: "green", 2: "red"}
    assert model.config.survival_prob == 0.8 and model.config.image_size == 16
    assert "efficientnet_nv" in (whole_run / "config.json").read_text()


def test_metrics_have_the_originals_names_and_honest_values(whole_run):
    steps = rows(whole_run, "train")
    assert [(row["epoch"], row["update"]) for row in steps] == [(e, u) for e in range(2) for u in range(1, 5)]
    assert all(0.1 < row["train.loss"] < 20 for row in steps)
    epochs = rows(whole_run, "epoch")
    for epoch in range(2):  # the loss of an epoch is the mean of its steps, not divided by the accumulation
        losses = [row["train.loss"] for row in steps if row["epoch"] == epoch]
        assert epochs[epoch]["train.loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    rates = [row["train.lr"] for row in steps]
    assert rates == pytest.approx([0.00025, 0.0005, 0.00075, 0.001, 0.001, 0.000853553391, 0.0005, 0.000146446609])
    assert all("limit" in row["limit"] for row in rows(whole_run, "limit")) and rows(whole_run, "limit")
    for row in rows(whole_run, "val") + rows(whole_run, "val_ema"):
        kind = row["type"]
        assert row[f"{kind}.n"] == 12 and 0 <= row[f"{kind}.top1"] <= row[f"{kind}.top5"] == 100
        assert row[f"{kind}.compute_latency_p50"] <= row[f"{kind}.compute_latency_p99"]
    assert rows(whole_run, "summary")[0]["n"] == 12


def test_card_tells_what_was_measured(whole_run):
    card, summary = (whole_run / "README.md").read_text(), json.loads((whole_run / "summary.json").read_text())
    assert f"{summary['top1']:.4g}" in card and "12 images" in card and "global_batch_size: 8" in card


def test_saved_model_scores_in_validate_what_it_scored_in_training(whole_run, squares):
    figures = validate_checkpoint(str(whole_run), str(squares), per_device_batch_size=5, num_workers=0)
    summary = json.loads((whole_run / "summary.json").read_text())
    assert figures["n"] == 12
    assert (figures["top1"], figures["loss"]) == pytest.approx((summary["top1"], summary["loss"]), rel=1e-5)


def test_published_model_is_the_one_that_validated_best(whole_run):
    summary = json.loads((whole_run / "summary.json").read_text())
    scores = {}
    for kind, is_ema in (("val", False), ("val_ema", True)):
        for row in rows(whole_run, kind):
            scores[row["epoch"] + 1, is_ema] = row[f"{kind}.top1"], -row[f"{kind}.loss"]
    best = max(scores, key=scores.__getitem__)
    assert len(scores) == 4 and (summary["best_epoch"], summary["best_is_ema"]) == best
    published = load_file(whole_run / "model.safetensors")
    for epoch, is_ema in scores:
        file = whole_run / f"checkpoints/update-0000000{4 * epoch}" / f"{'average' if is_ema else 'model'}.safetensors"
        same = {torch.equal(tensor, published[name]) for name, tensor in load_file(file).items()}
        assert (same == {True}) == ((epoch, is_ema) == best)


@pytest.mark.parametrize("stop_after", [1, 3, 4, 6])
def test_interrupted_run_resumes_bit_exactly(stop_after, squares, whole_run, tmp_path, monkeypatch):
    calls = []

    def stop_once(self):
        calls.append(None)
        self.received = "SIGTERM"
        return len(calls) == stop_after

    monkeypatch.setattr(Interruption, "agreed", stop_once)
    recipe = small_recipe(squares, tmp_path / "run", resume="auto")
    assert train(recipe) == EXIT_INTERRUPTED
    monkeypatch.undo()
    assert train(recipe) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


def test_staged_jobs_equal_one_job(squares, whole_run, tmp_path):
    recipe = small_recipe(squares, tmp_path / "run", resume="auto", run_epochs=1)
    assert train(recipe) == 0 and not (tmp_path / "run/checkpoints/update-00000008").exists()
    assert train(recipe) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


def test_workers_change_nothing(squares, whole_run, tmp_path):
    assert train(small_recipe(squares, tmp_path / "run", num_workers=2)) == 0
    assert fingerprint(tmp_path / "run") == fingerprint(whole_run)


def test_checkpoints_are_pruned_and_the_best_is_kept(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path / "run", checkpoint_every_steps=1, keep_checkpoints=3, ema_decay=0.0)
    assert train(recipe) == 0
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir() if path.is_dir())
    assert kept == ["best", "update-00000006", "update-00000007", "update-00000008"]
    for name in kept:  # every checkpoint opens as a model
        AutoModelForImageClassification.from_pretrained(tmp_path / "run/checkpoints" / name)


def test_equal_top1_is_decided_by_the_loss(squares, tmp_path, monkeypatch):
    losses = iter([0.5, 0.3, 0.4])
    shares = {"top1": 50.0, "top5": 100.0, "macro_recall": 50.0, "macro_f1": 50.0}
    monkeypatch.setattr("effnet_hf.training.loop.validate", lambda *_, **__: {**shares, "loss": next(losses), "n": 12})
    train(small_recipe(squares, tmp_path / "run", epochs=3, ema_decay=0.0))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["best_epoch"], summary["loss"]) == (2, 0.3)


def test_gradient_is_clipped_once_per_step_over_all_micro_batches(squares, tmp_path):
    settings = {"optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "learning_rate": 1.0, "gradient_clip": 0.01}
    settings |= {"global_batch_size": 36, "per_device_batch_size": 12, "epochs": 1, "warmup_epochs": 0}
    recipe = small_recipe(squares, tmp_path, **settings)
    set_seed(recipe.seed)
    before = built(recipe, ["blue", "green", "red"])
    assert train(recipe) == 0
    after = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoints/update-00000001")
    moved = [(b - a).norm() for a, b in zip(before.parameters(), after.parameters())]
    assert torch.stack(moved).norm().item() == pytest.approx(0.01, rel=1e-3)  # one step of rate 1 and of that length


def test_early_stopping_counts_epochs_without_a_new_best(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path / "run", learning_rate=0.0, epochs=9, early_stopping_patience=2)
    assert train(recipe.replace(batch_norm_momentum=0.0, ema_decay=0.0)) == 0
    assert len(rows(tmp_path / "run", "epoch")) == 3  # epoch 1 is the best, 2 and 3 are not better


def test_fine_tuning_replaces_the_head_when_classes_differ(squares, whole_run, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for split in ("train", "val"):
        (other / split).mkdir()
        for old, new in (("red", "apple"), ("green", "leaf")):
            os.symlink(squares / split / old, other / split / new)
    settings = {"learning_rate": 0.0, "batch_norm_momentum": 0.0, "ema_decay": 0.0, "epochs": 1}
    assert train(small_recipe(other, tmp_path / "run", model=str(whole_run), **settings)) == 0
    base, tuned = (AutoModelForImageClassification.from_pretrained(path) for path in (whole_run, tmp_path / "run"))
    assert tuned.config.label2id == {"apple": 0, "leaf": 1} and tuned.classifier.weight.shape[0] == 2
    for (name, a), b in zip(base.efficientnet.named_parameters(), tuned.efficientnet.parameters()):
        assert torch.equal(a, b), name


def test_a_checkpoint_keeps_its_picture_size_and_says_what_is_prepared_otherwise(squares, whole_run, tmp_path, capsys):
    settings = {"model": str(whole_run), "epochs": 0, "warmup_epochs": 0, "image_size": None}
    assert train(small_recipe(squares, tmp_path / "a", **settings)) == 0
    assert "16 px, weights of" in (out := capsys.readouterr().out) and "evaluated with" not in out
    assert "only 4 steps per epoch; lower --global_batch_size and --per_device_batch_size for more" in out
    assert train(small_recipe(squares, tmp_path / "b", **settings, interpolation="bilinear", resize_margin=4)) == 0
    said = "with size 20, resample bilinear, where --model was evaluated with size 16, resample bicubic"
    assert f"images are prepared {said}" in capsys.readouterr().out


def test_head_of_the_same_size_but_other_classes_is_new(squares, whole_run, tmp_path):
    recipe = small_recipe(squares, tmp_path, model=str(whole_run))
    base = AutoModelForImageClassification.from_pretrained(whole_run)
    assert torch.equal(built(recipe, ["blue", "green", "red"]).classifier.weight, base.classifier.weight)
    assert not torch.equal(built(recipe, ["a", "b", "c"]).classifier.weight, base.classifier.weight)


REFUSALS = [
    ({"global_batch_size": 4096, "per_device_batch_size": 8}, "--global_batch_size"),
    ({"num_labels": 5}, "--num_labels"),
    ({"model": "no/such/folder/here"}, "does not exist"),
    ({"resume": "nowhere"}, "no checkpoint there"),
    ({"precision": "fp16"}, "needs a GPU"),
    ({"precision": "tf32"}, "needs an NVIDIA GPU"),
    ({"sync_batch_norm": True}, "needs GPUs"),
    ({"data_dir": "no/such/data"}, "no/such/data"),
]


@pytest.mark.parametrize("changes, named", REFUSALS, ids=[str(changes) for changes, _ in REFUSALS])
def test_what_cannot_work_is_one_sentence(changes, named, squares, tmp_path):
    with pytest.raises(UserError, match=named):
        train(small_recipe(changes.pop("data_dir", squares), tmp_path / "run", **changes))


def test_overwriting_removes_the_model_and_the_notes_of_the_earlier_run(squares, tmp_path):
    recipe = small_recipe(squares, tmp_path, epochs=1)
    assert train(recipe) == 0
    (tmp_path / "bad_files.txt").write_text("a.png\tis no picture\n")
    with pytest.raises(UserError, match="a fresh start would remove --model"):
        train(recipe.replace(overwrite=True, model=str(tmp_path)))

    def stopped(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_epoch", stopped)
        with pytest.raises(KeyboardInterrupt):
            train(recipe.replace(overwrite=True))
    left = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert left == {"checkpoints", "metrics.jsonl", "recipe.yaml"}
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.is_dir()]


def test_a_run_that_its_data_stopped_before_the_first_step_begins_again(squares, tmp_path):
    data = write_squares(tmp_path / "data")
    for path in (data / "train").rglob("*.png"):
        path.write_bytes(b"no image")
    recipe = small_recipe(data, tmp_path / "run", epochs=1)
    with pytest.raises(UserError, match="unreadable, more than"):
        train(recipe)
    assert (tmp_path / "run/metrics.jsonl").exists()
    shutil.rmtree(data)
    write_squares(data)
    assert train(recipe) == 0
    with pytest.raises(UserError, match="already holds a run"):
        train(recipe)


def test_second_run_in_the_same_folder_is_refused(squares, whole_run):
    before = sorted(whole_run.rglob("*"))
    with pytest.raises(UserError, match="already holds a run"):
        train(small_recipe(squares, whole_run))
    assert sorted(whole_run.rglob("*")) == before


@pytest.mark.parametrize("changes", [{"seed": 1}, {"global_batch_size": 4}, {"variant": "widese-b0"}], ids=str)
def test_checkpoint_of_another_run_is_refused(changes, squares, whole_run, tmp_path):
    (name,) = changes
    with pytest.raises(UserError, match=f"--{name}"):
        train(small_recipe(squares, tmp_path / "run", resume=str(whole_run), **changes))


def test_layouts_of_one_global_batch_have_the_same_losses(tmp_path, capfd):
    """1 process, 2 accumulated micro-batches = 2 processes: same micro-batches, so the same losses to rounding."""
    if torch.cuda.is_available():
        command = [sys.executable, compare_layouts.__file__, tmp_path]
        assert subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode == 0
    else:  # its processes are forks, which need no imports of their own; they cannot share a GPU with this one
        assert compare_layouts.main(tmp_path, two_machines=False) == 0
    assert "largest relative difference" in capfd.readouterr().out


def test_kill_at_any_moment_loses_nothing():
    """The 20-kill version is the script's default; its figures are in benchmarks/."""
    if torch.cuda.is_available():
        command = [sys.executable, kill_and_resume.__file__, "--kills", "2", "--seed", "3"]
        assert subprocess.run(command).returncode == 0
    else:
        assert kill_and_resume.main(kills=2, seed=3, quantized=False, result=None) == 0


def test_only_a_logging_step_asks_the_other_processes_for_the_time(squares, tmp_path, monkeypatch):
    """Asking is a collective, which waits for the device; `--checkpoint_every_minutes` needs no such precision."""
    asked = []
    monkeypatch.setattr("accelerate.utils.broadcast_object_list", lambda due: asked.append(due[0]))
    run = SimpleNamespace(
        recipe=small_recipe(squares, tmp_path, checkpoint_every_minutes=0.5, checkpoint_every_steps=3),
        progress=SimpleNamespace(total_updates=1),
        accelerator=SimpleNamespace(num_processes=2),
        saved_at=-1e9,
    )
    assert not Run.checkpoint_is_due(run, may_ask=False) and not asked
    assert Run.checkpoint_is_due(run, may_ask=True) and asked == [True]
    run.progress.total_updates = 3  # a number of steps is the same everywhere: nobody need be asked
    assert Run.checkpoint_is_due(run, may_ask=False) and len(asked) == 1


def test_the_default_precision_is_recorded_and_said(squares, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        precision, "settle_precision", lambda recipe, *_, **__: (recipe.replace(precision="bf16"), "precision bf16, so")
    )
    assert train(small_recipe(squares, tmp_path, epochs=0, warmup_epochs=0, image_size=32)) == 0
    assert "precision bf16, so" in capsys.readouterr().out
    assert 'precision: "bf16"' in (tmp_path / "recipe.yaml").read_text()


def test_a_teacher_of_other_pixels_is_refused_and_of_another_size_is_said(squares, whole_run, tmp_path, capsys):
    teacher = tmp_path / "teacher"
    shutil.copytree(whole_run, teacher, ignore=shutil.ignore_patterns("checkpoints"))
    own = json.loads((teacher / "preprocessor_config.json").read_text())
    settings = {"teacher": str(teacher), "distillation_weight": 0.5, "epochs": 0, "warmup_epochs": 0}
    (teacher / "preprocessor_config.json").write_text(json.dumps({**own, "image_mean": [0.5] * 3}))
    with pytest.raises(UserError, match=r"--teacher .* was trained with image_mean \[0.5, 0.5, 0.5\] and would see"):
        train(small_recipe(squares, tmp_path / "a", **settings))
    (teacher / "preprocessor_config.json").write_text(json.dumps({**own, "resample": 2}))
    assert train(small_recipe(squares, tmp_path / "b", **settings)) == 0
    assert "with resample bicubic, where --teacher was evaluated with resample bilinear" in capsys.readouterr().out
