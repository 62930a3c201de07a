"""What the loop costs: our training step beside a bare forward, backward and optimizer step, and beside timm's model.

    python benchmarks/loop_overhead.py --repeats 15

Same weights, batch, optimizer and settings; the variants take turns step by step, so a noisy machine hits them alike.
Prints medians and ratios of wall time and of CPU time, and one JSON line.
"""

import json
import statistics
import tempfile
import time

import timm
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.cli import ArgumentParser, run
from effnet_hf.hub import software_versions
from effnet_hf.recipes import load_recipe
from effnet_hf.training import describe_device, make_accelerator, set_up, train_step
from effnet_hf.training.optim import build_optimizer, training_loss


def bare_step(model, recipe, batch):
    """The same arithmetic without Accelerate, loop or configuration."""
    optimizer = build_optimizer(model, recipe)

    def step():
        output = model(batch["pixel_values"])
        loss = training_loss(getattr(output, "logits", output), batch["labels"], recipe.label_smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def main() -> None:
    parser = ArgumentParser(description="Our training step beside a bare one.")
    parser.add_argument("--config", default="imagenette", help="recipe")
    parser.add_argument("--repeats", type=int, default=15, help="counted steps of each variant")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(arguments.config, loader="synthetic", num_labels=10, output_dir=scratch, quiet=True)
        accelerator = make_accelerator(recipe.replace(ema_decay=0.0))
        ours = set_up(recipe.replace(ema_decay=0.0), accelerator, None)
        ours.model.train()
        batch = next(iter(ours.loaders.train.epoch(0)))
        config = ours.bare_model.config
        bare = EfficientNetNVForImageClassification(config).to(accelerator.device, memory_format=torch.channels_last)
        bare.load_state_dict(ours.bare_model.state_dict())
        peer = timm.create_model(
            f"efficientnet_{recipe.variant}", num_classes=10, drop_rate=config.dropout_rate,
            bn_eps=config.batch_norm_eps, bn_momentum=config.batch_norm_momentum,
        ).to(accelerator.device, memory_format=torch.channels_last)  # fmt: skip
        variants = {
            "ours": lambda: train_step(ours, batch),
            "bare": bare_step(bare.train(), recipe, batch),
            "timm": bare_step(peer.train(), recipe, batch),
        }
        wall: dict[str, list[float]] = {name: [] for name in variants}
        cpu: dict[str, list[float]] = {name: [] for name in variants}
        for repeat in range(arguments.repeats + 2):
            for name, step in variants.items():
                clock, process = time.perf_counter(), time.process_time()
                step()
                if accelerator.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat >= 2:
                    wall[name].append(time.perf_counter() - clock)
                    cpu[name].append(time.process_time() - process)
        ours.loaders.close()
        ours.report.close()
    medians = {name: statistics.median(times) for name, times in wall.items()}
    cpu_medians = {name: statistics.median(times) for name, times in cpu.items()}
    setting = f"{recipe.variant}, {config.image_size} px, batch {recipe.global_batch_size}"
    print(f"{describe_device(accelerator.device)}, {setting}")
    for name in variants:
        print(
            f"{name:<5} {1e3 * medians[name]:8.1f} ms  {medians[name] / medians['bare']:.3f} x bare"
            f"   CPU {1e3 * cpu_medians[name]:8.1f} ms  {cpu_medians[name] / cpu_medians['bare']:.3f} x bare"
        )
    print(json.dumps({"wall": wall, "cpu": cpu, "versions": software_versions("timm")}))


if __name__ == "__main__":
    run(main)
