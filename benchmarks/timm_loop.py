"""The baseline of benchmarks/*-imagenette-*.md: timm's model, loaders, mixup, loss, schedule, EMA on our recipe.

    python benchmarks/timm_loop.py --config imagenette --data_dir imagenette --output_dir runs/imagenette-timm

Reads our recipe and writes the same metrics.jsonl, so that `effnet-hf plots` overlays both. What
stays timm's own: weight initialisation, AutoAugment "v0r" (its "v0" asks Pillow 13 to posterize to 0 bits, and dies),
mixup, the EMA's constant decay (of `val_ema`; `val` is of the plain weights), weight decay on no bias.
"""

import json
import time
from pathlib import Path

import timm
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch

from effnet_hf.cli import run
from effnet_hf.recipes import parse_recipe
from effnet_hf.training import build_processor


def main() -> None:
    recipe, _ = parse_recipe(description="timm's own model and loop on one of our recipes.")
    torch.manual_seed(recipe.seed)
    processor, batch = build_processor(recipe, recipe.model_config()), recipe.global_batch_size
    size = processor.crop_size["height"]
    common = {
        "input_size": (3, size, size),
        "batch_size": batch,
        "num_workers": recipe.num_workers or 0,
        "interpolation": recipe.interpolation or "bicubic",
        "use_prefetcher": False,
        "persistent_workers": False,
    }
    train_loader = timm.data.create_loader(
        timm.data.create_dataset("folder", f"{recipe.data_dir}/train"),
        is_training=True,
        scale=(recipe.crop_scale, 1.0),
        hflip=recipe.horizontal_flip,
        color_jitter=None,
        auto_augment={"autoaugment": "v0r"}.get(recipe.augmentation),
        **common,
    )
    val_loader = timm.data.create_loader(
        timm.data.create_dataset("folder", f"{recipe.data_dir}/val"),
        is_training=False,
        crop_pct=size / processor.size["shortest_edge"],
        **common,
    )
    classes = len(train_loader.dataset.reader.class_to_idx)
    model = timm.create_model(
        f"efficientnet_{recipe.variant}",
        num_classes=classes,
        drop_rate=recipe.model_config().dropout_rate,
        bn_eps=recipe.model_config().batch_norm_eps,
        bn_momentum=recipe.batch_norm_momentum or 0.01,
    ).to(memory_format=torch.channels_last)
    ema = timm.utils.ModelEmaV3(model, decay=recipe.ema_decay)
    optimizer = torch.optim.RMSprop(
        timm.optim.param_groups_weight_decay(model, recipe.weight_decay),
        lr=recipe.learning_rate * batch / recipe.lr_batch_size,
        alpha=recipe.rmsprop_alpha,
        eps=recipe.rmsprop_eps,
        momentum=recipe.momentum,
    )
    steps = len(train_loader)
    schedule = timm.scheduler.CosineLRScheduler(
        optimizer,
        t_initial=(recipe.epochs - int(recipe.warmup_epochs)) * steps,
        warmup_t=int(recipe.warmup_epochs) * steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    mixup = timm.data.Mixup(mixup_alpha=recipe.mixup, label_smoothing=recipe.label_smoothing, num_classes=classes)
    criterion = timm.loss.SoftTargetCrossEntropy()
    folder = Path(recipe.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metrics.jsonl", "w") as log:
        started = time.process_time()
        for epoch in range(recipe.epochs):
            model.train()
            losses = []
            for step, (images, labels) in enumerate(train_loader):
                images, targets = mixup(images, labels)
                loss = criterion(model(images.contiguous(memory_format=torch.channels_last)), targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                ema.update(model)
                schedule.step_update(epoch * steps + step + 1)
                losses.append(loss.item())
            row = {"type": "epoch", "epoch": epoch, "train.loss": sum(losses) / len(losses)}
            log.write(json.dumps(row) + "\n")
            text = f"epoch {epoch + 1}/{recipe.epochs} train.loss {row['train.loss']:.4f}"
            for kind, network in (("val", model), ("val_ema", ema.module)):
                top1, loss = evaluate(network, val_loader)
                log.write(json.dumps({"type": kind, "epoch": epoch, f"{kind}.top1": top1, f"{kind}.loss": loss}) + "\n")
                text += f"  {kind}.top1 {top1:.2f}"
            log.flush()
            print(text + f"  cpu {(time.process_time() - started) / 60:.1f} min", flush=True)


@torch.inference_mode()
def evaluate(model, loader) -> tuple[float, float]:
    """Top-1 in percent and cross entropy."""
    model.eval()
    hits = count = 0
    loss = 0.0
    for images, labels in loader:
        logits = model(images.contiguous(memory_format=torch.channels_last))
        hits += (logits.argmax(-1) == labels).sum().item()
        loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        count += len(labels)
    return 100 * hits / count, loss / count


if __name__ == "__main__":
    run(main)
