"""Speed of our own training or validation steps: `train --benchmark train|inference --steps 100`.

The original's `--prof N` with warm-up left out. Training runs as `train` runs it: nothing waits for the device
between the first and the last step, and on a GPU the times are those between events on its stream. Batches of inference
are waited for one by one, because a latency is of a finished batch.
"""

import contextlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from ..errors import UserError
from ..files import atomic_write
from ..hub import software_versions
from ..reading import read_json
from ..recipes import Recipe
from ..run_folder import RunFolder
from .launcher import with_others
from .loop import train_step
from .metrics import LatencyMeter, LossMeter, percentiles
from .optim import learning_rate, set_learning_rate
from .owner import on_main
from .precision import start_accelerator
from .run import Run
from .setup import build_run, describe_device, introduce, restore_run


WARMUP = 10


def benchmark_steps(recipe: Recipe, mode: str, steps: int) -> dict:
    """Times `steps` optimizer steps (`"train"`) or forward passes (`"inference"`) after 10 that are not counted.

    Returns:
        `total_ips` and `compute_ips` (images per second of all processes, with and without waiting for data),
        `data_time` and `compute_time` (seconds per step), `latency_{p50,p95,p99,mean,max}` (milliseconds per step),
        and what they were measured on. Also written to `output_dir/benchmark.json`.

    Raises:
        UserError: the recipe or this machine do not allow it, or such a file is there that no benchmark wrote.
    """
    target = RunFolder(recipe.output_dir).benchmark
    # A benchmark leaves no run behind.
    with with_others(), tempfile.TemporaryDirectory() as scratch:
        recipe, accelerator, _ = start_accelerator(recipe)
        if not recipe.overwrite:
            on_main(accelerator, lambda: refuse_to_replace(target, {"mode", "steps", "total_ips", "compute_ips"}))
        run = build_run(recipe.replace(output_dir=scratch, quiet=True, resume=None), accelerator)
        try:
            restore_run(run)
            introduce(run)
            waited, times, images = _time_training(run, steps) if mode == "train" else _time_inference(run, steps)
        finally:
            run.loaders.close()
            run.report.close()
    computed = sum(times)
    figures = {
        "mode": mode,
        "steps": len(times),
        "warmup_steps": WARMUP,
        "images_per_step": images,
        "total_ips": images * len(times) / (waited + computed),
        "compute_ips": images * len(times) / computed,
        "data_time": waited / len(times),
        "compute_time": computed / len(times),
        **{f"latency_{name}": value for name, value in percentiles(1e3 * torch.tensor(times).numpy()).items()},
        "variant": run.bare_model.config.variant,
        "image_size": run.bare_model.config.image_size,
        "loader": recipe.loader,
        "precision": recipe.precision,
        "compile": recipe.compile,
        "device": f"{accelerator.num_processes} x {describe_device(accelerator.device)}",
        "versions": software_versions(),
    }
    if accelerator.is_main_process:
        with atomic_write(target) as file:
            file.write(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return figures


def refuse_to_replace(target: Path, keys: set[str], writer: str = "a benchmark") -> None:
    """Raises `UserError` for a file that is there and lacks the keys of one that `writer` wrote."""
    if not os.path.lexists(target):
        return
    with contextlib.suppress(UserError):
        if keys <= read_json(target).keys():
            return
    raise UserError(
        f"{target} was not written by {writer}; move it away, name another --output_dir, or replace it with"
        " --overwrite."
    )


def training_steps(
    run: Run, waiting: AbstractContextManager | None = None, computing: AbstractContextManager | None = None
) -> Iterator[None]:
    """One whole optimizer step each time it is asked, with all that `training/loop.py` does between two log lines.

    Args:
        waiting, computing: context managers entered around every micro-batch's arrival, and around its work.
    """
    run.model.train()
    waiting, computing = waiting or nullcontext(), computing or nullcontext()
    recipe, loader = run.recipe, run.train_loader
    losses = LossMeter(run.accelerator)
    for epoch in itertools.count():
        update, batches = 0, iter(loader.epoch(epoch))
        while True:
            with waiting:
                batch = next(batches, None)
            if batch is None:
                break
            with computing:
                rate = learning_rate(recipe, epoch % max(recipe.epochs, 1), update, loader.updates_per_epoch)
                set_learning_rate(run.optimizer, rate)
                losses.add(train_step(run, batch))
                if run.accelerator.sync_gradients and run.ema is not None:
                    run.ema.update(run.bare_model)
            if run.accelerator.sync_gradients:
                update += 1
                yield


def _time_training(run: Run, steps: int) -> tuple[float, list[float], int]:
    """Seconds of waiting for data altogether, seconds of each step's work, and images per step."""
    device, per_update = run.accelerator.device, run.plan.accumulation_steps
    waiting, computing = LatencyMeter(device), LatencyMeter(device)
    updates = training_steps(run, waiting, computing)
    for _ in range(WARMUP):
        next(updates)
    _wait_for(device)
    waiting.marks.clear()
    computing.marks.clear()
    for _ in range(steps):
        next(updates)
    # An epoch that ended in between has one more wait than batches, for the end; it counts with the step after it.
    times = computing.milliseconds().reshape(steps, per_update).sum(1) / 1e3
    return waiting.milliseconds().sum() / 1e3, times.tolist(), run.plan.global_batch_size


def _time_inference(run: Run, steps: int) -> tuple[float, list[float], int]:
    run.model.eval()
    size, images = run.plan.per_device, run.loaders.val.num_samples
    if images < size * run.accelerator.num_processes:
        raise UserError(f"--per_device_batch_size {size} is more than the {images} validation images; lower it.")
    batches = itertools.chain.from_iterable(run.loaders.val.epoch(0) for _ in itertools.count())
    full = (batch for batch in batches if len(batch["labels"]) == size)
    waits, times = [], []
    with torch.inference_mode():
        for _ in range(WARMUP + steps):
            asked = time.perf_counter()
            batch = next(full)
            started = time.perf_counter()
            with run.accelerator.autocast():
                run.model(pixel_values=batch["pixel_values"])
            _wait_for(run.accelerator.device)
            waits.append(started - asked)
            times.append(time.perf_counter() - started)
    return sum(waits[WARMUP:]), times[WARMUP:], size * run.accelerator.num_processes


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
