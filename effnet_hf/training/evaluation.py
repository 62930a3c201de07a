"""A checkpoint on a folder of labelled images, through the loaders and arithmetic of training."""

import contextlib
import io
import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import say
from ..data import BatchPlan, build_loaders
from ..errors import UserError
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import is_multi_label, require_same_task
from ..recipes import Recipe, load_recipe
from ..run_folder import RunFolder
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
    restrict_classes: bool = False,
    tell: Callable[[str], None] = say,
    **data: Any,
) -> dict[str, float] | None:
    """Top-1, top-k (or, with several labels per image, mAP and F1), loss and speed of a checkpoint on a folder or a
    `datasets` source; see [`validate`].

    None on all processes but the first. `bad_files` of them is the number of images that could not be read, `classes`
    how many the answer was one of, beside `classes_of_the_data` and `classes_of_the_checkpoint`.

    The data's classes are matched with the checkpoint's as [`effnet_hf.data.match_classes`] says; they may be a part of
    them.

    Args:
        restrict_classes: the answer is one of the classes that the data has, instead of all that the checkpoint knows.
        tell: gets the sentences about the data that a user should read; on the console by default.
        data: any other data option of a recipe, e.g. `labels` or `classes_by_position`.

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
        **data,
    )
    with with_others():
        recipe, accelerator, _ = start_accelerator(recipe, default="fp32")
        return _validate(checkpoint, recipe, accelerator, restrict_classes, tell)


def _validate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    accelerator: Accelerator,
    restrict_classes: bool,
    tell: Callable[[str], None],
) -> dict[str, float] | None:
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
        require_same_task(checkpoint.config, loaders.label_sets is not None, f"--model {checkpoint.name}")
        if accelerator.is_main_process:
            for note in filter(None, [*loaders.notes, _note_on_training(checkpoint, recipe)]):
                tell(note)
        network, known = checkpoint.load(), len(checkpoint.class_names)
        present = np.arange(known) if loaders.present is None else loaders.present
        if restrict_classes:
            rule_out_classes(network, present)
        network.to(accelerator.device)
        figures = validate(network, loaders.val, accelerator, recipe.top_k)
        figures |= {"classes": len(present) if restrict_classes else known}
        figures |= {"classes_of_the_data": len(present), "classes_of_the_checkpoint": known}
        bad = torch.tensor(loaders.val.bad_files.count, device=accelerator.device)
        figures["bad_files"] = int(accelerator.reduce(bad, reduction="sum"))
    finally:
        loaders.close()
    return figures if accelerator.is_main_process else None


def _note_on_training(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """A sentence where the checkpoint was trained on most of what is measured; "" where it was not, or nobody knows."""
    written = RunFolder(checkpoint.name).recipe
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # old spellings in it are no concern of this command
            trained = load_recipe(str(written)) if written.is_file() else None
    except UserError:  # of another version
        return ""
    if trained is None or not trained.val_fraction or recipe.val_fraction or recipe.val_split:
        return ""
    sources = [
        {os.path.realpath(place) for place in (each.data_dir, each.dataset_name, each.labels) if place}
        for each in (trained, recipe)
    ]
    if not sources[0] & sources[1]:
        return ""
    return (
        f"{checkpoint.name} was trained on a part of these images: --val_fraction {trained.val_fraction:g}, as then,"
        " measures on those that were held out."
    )


@torch.no_grad()
def rule_out_classes(network: EfficientNetNVForImageClassification, present: np.ndarray) -> None:
    """Takes from a network, in place, every answer but the classes of these numbers.

    Raises:
        UserError: it has a sigmoid per class, so that no class keeps another from being the answer.
    """
    if is_multi_label(network.config):
        raise UserError("--restrict_classes is for one label per image; of several each is decided by itself.")
    others = torch.ones(network.config.num_labels, dtype=torch.bool)
    others[torch.as_tensor(present)] = False
    network.classifier.bias[others] = -torch.inf  # no logit is less, and softmax makes it 0
