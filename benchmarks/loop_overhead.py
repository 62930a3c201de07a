"""What the loop costs: our training step beside a bare forward, backward and optimizer step, and beside timm's model.

    python benchmarks/loop_overhead.py --repeats 15 --output overhead.json

Same weights, batch, optimizer and settings; the variants take turns step by step, so a noisy machine hits them alike.
"""

import tempfile

import timm
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.benchmark.environment import environment, write_figures
from effnet_hf.benchmark.report import markdown_table
from effnet_hf.benchmark.timing import speed_up, take_turns
from effnet_hf.cli import ArgumentParser, at_least, run
from effnet_hf.recipes import load_recipe
from effnet_hf.training import make_accelerator, set_up, train_step
from effnet_hf.training.optim import build_optimizer, training_loss
from effnet_hf.tuning import tune_for_cpu_training


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
    parser.add_argument("--repeats", type=at_least(1), default=15, help="counted steps of each variant")
    parser.add_argument("--output", default=None, help="write the figures to this JSON file")
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
        if accelerator.device.type == "cpu":
            tune_for_cpu_training(bare, config.image_size)  # as the loop's model is
        peer = timm.create_model(
            f"efficientnet_{recipe.variant}", num_classes=10, drop_rate=config.dropout_rate,
            bn_eps=config.batch_norm_eps, bn_momentum=config.batch_norm_momentum,
        ).to(accelerator.device, memory_format=torch.channels_last)  # fmt: skip
        steps = {
            "bare forward, backward, optimizer step (baseline)": bare_step(bare.train(), recipe, batch),
            "our loop": lambda: train_step(ours, batch),
            "timm's model, bare": bare_step(peer.train(), recipe, batch),
        }
        device = accelerator.device
        samples = take_turns(steps, device, arguments.repeats)
        ours.loaders.close()
        ours.report.close()
    baseline, rows = next(iter(samples.values())), []
    for name, own in samples.items():
        longer = speed_up(baseline, own, device.type == "cpu")
        times = own.summary(recipe.global_batch_size)
        row = {"step": name, "wall, ms": f"{times['wall_ms']:,.0f}", "wall": f"{longer['wall']:.3f}"}
        rows.append(row | {"CPU, ms": f"{times['cpu_ms']:,.0f}", "CPU": f"{longer.get('cpu', 0):.3f}"})
    print(f"{recipe.variant}, {config.image_size} px, batch {recipe.global_batch_size}\n\n{markdown_table(rows)}")
    if arguments.output:
        settings = {"config": arguments.config, "repeats": arguments.repeats}
        write_figures({"kind": "overhead", **environment(device), "settings": settings, "rows": rows}, arguments.output)


if __name__ == "__main__":
    run(main)
