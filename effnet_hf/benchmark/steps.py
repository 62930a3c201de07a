"""Speed of our own training or validation steps: `train.py --benchmark train|inference --steps 100`.

The original's `--prof N` with warm-up left out. A device is waited for once per optimizer step, so that latencies are
those of finished steps.
"""

import itertools
import json
import tempfile
import time
from pathlib import Path

import torch

from ..errors import UserError
from ..files import atomic_write
from ..hub import software_versions
from ..recipes import Recipe
from ..training import Run, describe_device, make_accelerator, percentiles, precision_name, set_up, train_step


WARMUP = 10


def benchmark_steps(recipe: Recipe, mode: str, steps: int) -> dict:
    """Times `steps` optimizer steps (`"train"`) or forward passes (`"inference"`) after 10 that are not counted.

    Returns:
        `total_ips` and `compute_ips` (pictures per second of all processes, with and without waiting for data),
        `data_time` and `compute_time` (seconds per step), `latency_{p50,p95,p99,mean,max}` (milliseconds per step),
        and what they were measured on. Also written to `output_dir/benchmark.json`.
    """
    target = Path(recipe.output_dir, "benchmark.json")
    with tempfile.TemporaryDirectory() as scratch:  # a benchmark leaves no run behind
        accelerator = make_accelerator(recipe)
        run = set_up(recipe.replace(output_dir=scratch, quiet=True, resume=None), accelerator, None)
        try:
            waits, times, pictures = _time_training(run, steps) if mode == "train" else _time_inference(run, steps)
        finally:
            run.loaders.close()
            run.report.close()
    waited, computed = sum(waits), sum(times)
    figures = {
        "mode": mode,
        "steps": len(times),
        "warmup_steps": WARMUP,
        "pictures_per_step": pictures,
        "total_ips": pictures * len(times) / (waited + computed),
        "compute_ips": pictures * len(times) / computed,
        "data_time": waited / len(times),
        "compute_time": computed / len(times),
        **{f"latency_{name}": value for name, value in percentiles(1e3 * torch.tensor(times).numpy()).items()},
        "variant": run.bare_model.config.variant,
        "image_size": run.bare_model.config.image_size,
        "loader": recipe.loader,
        "precision": precision_name(recipe, accelerator),
        "compile": recipe.compile,
        "device": f"{accelerator.num_processes} x {describe_device(accelerator.device)}",
        "versions": software_versions(),
    }
    if accelerator.is_main_process:
        with atomic_write(target) as file:
            file.write(json.dumps(figures, indent=1) + "\n")
    return figures


def _time_training(run: Run, steps: int) -> tuple[list[float], list[float], int]:
    run.model.train()
    loader, per_update = run.loaders.train, run.plan.accumulation_steps
    batches = itertools.chain.from_iterable(loader.epoch(epoch) for epoch in itertools.count())
    waits, times = [], []
    for _ in range(WARMUP + steps):
        waited = computed = 0.0
        for _ in range(per_update):
            asked = time.perf_counter()
            batch = next(batches)
            started = time.perf_counter()
            waited += started - asked
            train_step(run, batch)
            if run.ema is not None and run.accelerator.sync_gradients:
                run.ema.update(run.bare_model)
            _wait_for(run.accelerator.device)
            computed += time.perf_counter() - started
        waits.append(waited)
        times.append(computed)
    return waits[WARMUP:], times[WARMUP:], run.plan.global_batch_size


def _time_inference(run: Run, steps: int) -> tuple[list[float], list[float], int]:
    run.model.eval()
    size, pictures = run.plan.per_device, run.loaders.val.num_samples
    if pictures < size * run.accelerator.num_processes:
        raise UserError(f"--per_device_batch_size {size} is more than the {pictures} validation pictures; lower it.")
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
    return waits[WARMUP:], times[WARMUP:], size * run.accelerator.num_processes


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
