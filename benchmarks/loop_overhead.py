"""What the loop costs: our training step beside a bare forward, backward and optimizer step, and beside timm's model.

    python benchmarks/loop_overhead.py --repeats 15 --output overhead.json

Same weights, batch, optimizer, precision, memory layout and settings; the variants take turns step by step, so a noisy
machine hits them alike. Our side is everything that `training/loop.py` does between two lines of its log, and the same
with `--deterministic true`.
"""

import os
import tempfile

import timm
import torch
from lib.contenders import OURS, PRECISIONS, training_step
from lib.environment import environment
from lib.report import table, write_figures
from lib.timing import speed_up, take_turns

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.recipes import load_recipe
from effnet_hf.training import build_run, make_accelerator, training_steps
from effnet_hf.training.precision import make_deterministic, wants_channels_last


def deterministically(updates) -> None:
    """One step with the kernels that `--deterministic true` takes."""
    make_deterministic(True)
    try:
        next(updates)
    finally:
        make_deterministic(False)


def main() -> None:
    parser = ArgumentParser(description="Our training step beside a bare one.")
    parser.add_argument("--config", default="imagenette", help="recipe")
    parser.add_argument("--variant", default=None, help="architecture; the recipe's by default")
    parser.add_argument("--image_size", type=at_least(1), help="side in pixels; the recipe's by default")
    parser.add_argument("--batch_size", type=at_least(1), help="images per step; the recipe's by default")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="of all sides")
    parser.add_argument("--repeats", type=at_least(1), default=15, help="counted rounds of each variant")
    parser.add_argument("--burst", type=at_least(1), help="steps per round; 1 on a CPU, 5 on a GPU")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file")
    arguments = parser.parse_args()
    changes = {name: getattr(arguments, name) for name in ("variant", "image_size") if getattr(arguments, name)}
    if arguments.batch_size:
        changes |= {name: arguments.batch_size for name in ("per_device_batch_size", "global_batch_size")}
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # of the deterministic steps; cuBLAS reads it once
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(
            arguments.config, loader="synthetic", num_labels=10, output_dir=scratch, quiet=True, ema_decay=0.0,
            precision=arguments.precision, **changes,
        )  # fmt: skip
        accelerator = make_accelerator(recipe)
        device, channels_last = accelerator.device, wants_channels_last(recipe, accelerator)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        ours = build_run(recipe, accelerator)
        assert ours.loaders.train is not None
        batch = next(iter(ours.loaders.train.epoch(0)))
        config = ours.bare_model.config
        bare = EfficientNetNVForImageClassification(config).to(device, memory_format=memory_format)
        bare.load_state_dict(ours.bare_model.state_dict())
        peer = timm.create_model(
            f"efficientnet_{recipe.variant}", num_classes=10, drop_rate=config.dropout_rate,
            bn_eps=config.batch_norm_eps, bn_momentum=config.batch_norm_momentum,
        ).to(device, memory_format=memory_format)  # fmt: skip
        updates, precision = training_steps(ours), ours.recipe.precision

        def alone(name, model):
            """The same arithmetic without Accelerate, loop or configuration; ours tuned as the loop's model is."""
            pixels = batch["pixel_values"]
            return training_step(name, model, pixels, precision, recipe=recipe, labels=batch["labels"])

        steps = {
            "bare forward, backward, optimizer step (baseline)": alone(OURS, bare),
            "our loop": lambda: next(updates),
            "our loop, --deterministic true": lambda: deterministically(updates),
            "timm's model, bare": alone("timm", peer),
        }
        burst = arguments.burst or (1 if device.type == "cpu" else 5)
        samples = take_turns(steps, device, arguments.repeats, warmup=3, burst=burst)
        ours.loaders.close()
        ours.report.close()
    baseline, rows = next(iter(samples.values())), []
    what = {"network": recipe.variant, "precision": precision, "px": config.image_size}
    what |= {"batch": ours.plan.global_batch_size, "layout": "channels_last" if channels_last else "nchw"}
    for name, own in samples.items():
        longer = speed_up(baseline, own, device.type == "cpu")
        times = own.summary(recipe.global_batch_size)
        row = {"step": name, **what, "wall, ms": f"{times['wall_ms']:,.1f}", "wall": f"{longer['wall']:.3f}"}
        if device.type == "cpu":
            row |= {"CPU, ms": f"{times['cpu_ms']:,.0f}", "CPU": f"{longer['cpu']:.3f}"}
        rows.append({**row, "n": len(own.wall)})
    print(table(rows))
    if arguments.output:
        settings = {name: value for name, value in vars(arguments).items() if name != "output"}
        write_figures({"kind": "overhead", **environment(device), "settings": settings, "rows": rows}, arguments.output)


if __name__ == "__main__":
    run(main)
