"""A checkpoint on a folder of labelled images, through the loaders and arithmetic of training."""

from typing import Literal

import torch
from accelerate import Accelerator

from ..checkpoint import Checkpoint, open_checkpoint
from ..data import BatchPlan, build_loaders
from ..recipes import Recipe
from .launcher import with_others
from .loop import validate
from .precision import start_accelerator, wants_channels_last


def validate_checkpoint(
    model: str,
    data_dir: str | None = None,
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None,
    per_device_batch_size: int = 64,
    num_workers: int | None = None,
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu"] = "imagefolder",
    top_k: int = 5,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    val_fraction: float = 0.0,
    max_bad_files: float = 0.01,
    strict: bool = False,
) -> dict[str, float] | None:
    """Top-1, top-k, loss and speed of a checkpoint on a folder or a `datasets` source; see [`validate`].

    None on all processes but the first. `bad_files` of them is the number of images that could not be read.

    Folder names are matched with the checkpoint's class names; if none match but their number does, both are taken in
    sorted order, as ImageNet's wnid folders are.

    Raises:
        UserError: no such checkpoint or folder, or the classes cannot be matched, or more than a share of
            `max_bad_files` of the images, or with `strict` one of them, cannot be read.
    """
    checkpoint = open_checkpoint(model)
    recipe = Recipe(
        model=model,
        data_dir=data_dir,
        dataset_name=dataset_name,
        dataset_config=dataset_config,
        val_fraction=val_fraction,
        precision=precision,
        per_device_batch_size=per_device_batch_size,
        num_workers=num_workers,
        loader=loader,
        top_k=top_k,
        max_bad_files=max_bad_files,
        strict=strict,
    )
    with with_others():
        recipe, accelerator, _ = start_accelerator(recipe, default="fp32")
        return _validate(checkpoint, recipe, accelerator)


def _validate(checkpoint: Checkpoint, recipe: Recipe, accelerator: Accelerator) -> dict[str, float] | None:
    assert recipe.per_device_batch_size is not None
    loaders = build_loaders(
        recipe,
        checkpoint.processor,
        BatchPlan(recipe.per_device_batch_size, accelerator.num_processes, rank=accelerator.process_index),
        accelerator.device,
        train=False,
        class_names=checkpoint.class_names,
        channels_last=wants_channels_last(recipe, accelerator),
    )
    try:
        network = checkpoint.load().to(accelerator.device)
        figures = validate(network, loaders.val, accelerator, recipe.top_k)
        bad = torch.tensor(loaders.val.bad_files.count, device=accelerator.device)
        figures["bad_files"] = int(accelerator.reduce(bad, reduction="sum"))
    finally:
        loaders.close()
    return figures if accelerator.is_main_process else None
