"""A checkpoint on a folder of labelled pictures, through the loaders and arithmetic of training."""

from typing import Literal

from ..data import build_loaders
from ..recipes import Recipe
from .loop import validate
from .model import FILTERS, check_checkpoint, load_model, load_processor
from .precision import make_accelerator, settle_precision, wants_channels_last


def validate_checkpoint(
    model: str,
    data_dir: str | None = None,
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None,
    per_device_batch_size: int = 64,
    num_workers: int | None = None,
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu"] = "imagefolder",
    topk: int = 5,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    val_fraction: float = 0.0,
) -> dict[str, float] | None:
    """Top-1, top-k, loss and speed of a checkpoint on a folder or a `datasets` source; see [`validate`].

    None on all processes but the first.

    Folder names are matched with the checkpoint's class names; if none match but their number does, both are taken in
    sorted order, as ImageNet's wnid folders are.

    Raises:
        UserError: no such checkpoint or folder, or the classes cannot be matched.
    """
    config = check_checkpoint(model)
    processor = load_processor(model)
    crop = processor.crop_size["height"]
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
        topk=topk,
        interpolation={value: name for name, value in FILTERS.items()}.get(processor.resample, "bicubic"),
    )
    recipe, _ = settle_precision(recipe, default="fp32")
    accelerator = make_accelerator(recipe)
    loaders = build_loaders(
        recipe,
        image_size=crop,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        per_device_batch_size=per_device_batch_size,
        steps_per_update=1,
        train=False,
        mean=processor.image_mean,
        std=processor.image_std,
        resize_margin=processor.size["shortest_edge"] - crop,
        channels_last=wants_channels_last(recipe, accelerator),
        class_names=[config.id2label[i] for i in range(config.num_labels)],
    )
    try:
        network = load_model(model).to(accelerator.device)
        figures = validate(network, loaders.val, accelerator, topk)
    finally:
        loaders.close()
    return figures if accelerator.is_main_process else None
