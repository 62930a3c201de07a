"""fp16 in the forward pass: batch norm's statistics would stay infinite for good while later losses look well."""

import pytest
import torch
from accelerate import Accelerator

from effnet_hf.errors import UserError
from effnet_hf.training import build_run, loop, restore_run, train

from .workbench import read_rows, small_recipe, write_squares


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def poisoned_after(monkeypatch, step: int, poison) -> None:
    """`poison(run)` after that micro-step of the loop."""
    calls, real = [], loop.train_step

    def train_step(run, batch):
        loss = real(run, batch)
        calls.append(None)
        if len(calls) == step:
            poison(run)
        return loss

    monkeypatch.setattr(loop, "train_step", train_step)


POISONS = {
    "efficientnet.encoder.stem.bn.running_var": lambda run: run.bare_model.efficientnet.encoder.stem.bn.running_var,
    "classifier.weight": lambda run: run.bare_model.classifier.weight.data,
    "the average of efficientnet.head.bn.running_mean": lambda run: run.ema.model.efficientnet.head.bn.running_mean,
}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", POISONS)
def test_what_is_no_longer_finite_stops_the_run_before_it_is_saved(name, value, squares, tmp_path, monkeypatch):
    """The losses stay finite in all but the second case: training takes each batch's own statistics. The run logs every
    step, and would save after each."""
    poisoned_after(monkeypatch, 6, lambda run: POISONS[name](run).view(-1)[0].fill_(value))
    recipe = small_recipe(squares, tmp_path / "run", checkpoint_every_steps=1)
    with pytest.raises(
        UserError, match=f"{name} is no longer finite in epoch 1, step 3: .* is whole: .*update-00000002"
    ):
        train(recipe)
    saved = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("update-*"))
    assert saved[-1] == "update-00000002" and not (tmp_path / "run" / "checkpoints" / "best").exists()


def test_a_rare_log_does_not_let_it_be_saved(squares, tmp_path, monkeypatch):
    poisoned_after(monkeypatch, 2, lambda run: run.bare_model.efficientnet.head.bn.running_var.fill_(float("inf")))
    with pytest.raises(UserError, match="head.bn.running_mean|head.bn.running_var"):
        train(small_recipe(squares, tmp_path / "run", log_every=100, checkpoint_every_steps=2))
    assert not list((tmp_path / "run" / "checkpoints").glob("update-*"))
    assert all(row["type"] != "train" for row in read_rows(tmp_path / "run"))


def test_an_overflow_in_fp16s_forward_pass_is_found(squares, tmp_path):
    """With a real scaler and fp16's autocast, on the CPU: one batch a million times too bright."""
    recipe = small_recipe(squares, tmp_path / "run", mixup=0.0, survival_prob=1.0, precision=None)
    accelerator = Accelerator(cpu=True, step_scheduler_with_optimizer=False)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=10**9)
    accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
    run = build_run(recipe, accelerator)
    restore_run(run)
    try:
        epoch = run.loaders.train.epoch

        def bright(*args, **kwargs):
            for i, batch in enumerate(epoch(*args, **kwargs)):
                yield {**batch, "pixel_values": batch["pixel_values"] * (1e6 if i == 2 else 1)}

        run.loaders.train.epoch = bright
        with pytest.raises(UserError, match=r"no longer finite \(fp16 ends at 65,504\) in epoch 1, step 2.*bf16"):
            loop.train_epoch(run)
    finally:
        run.loaders.close()
        run.report.close()
