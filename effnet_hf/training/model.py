"""The networks and the image processor that a recipe asks for, fresh or from checkpoints."""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import invocation
from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import RESIZE_MARGIN, EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..recipes import Recipe
from ..tuning import tune_for_cpu_training
from .precision import refuse_unwritten_gradients


FILTERS: dict[Literal["bilinear", "bicubic"], int] = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
        checkpoint: the weights of `--model`; None for fresh ones.
        teacher: the checkpoint to distil from.
        config: the architecture, before the data's classes are known.
        processor: how images are prepared.
    """

    checkpoint: Checkpoint | None
    teacher: Checkpoint | None
    config: EfficientNetNVConfig
    processor: EfficientNetNVImageProcessor

    @property
    def image_size(self) -> int:
        """The longer side of the prepared image, pixels."""
        return max(self.processor.crop_size.values())


def open_start(recipe: Recipe, resumed: Path | None = None) -> Start:
    """Opens the checkpoints that a recipe names, each once.

    Args:
        resumed: the checkpoint of the run that is gone on with, whose images stay prepared as they were.

    Raises:
        UserError: one cannot be used, the recipe distils and names no teacher or one that other images were prepared
            for, or it asks a run to go on with images prepared otherwise.
    """
    checkpoint = open_checkpoint(recipe.model) if recipe.model else None
    teacher = None
    if recipe.distillation_weight:
        teacher = checkpoint
        if recipe.teacher is not None and recipe.teacher != recipe.model:
            teacher = open_checkpoint(recipe.teacher, "--teacher")
        if teacher is None:
            raise UserError("--distillation_weight needs a --teacher, or a --model to start from.")
    config = checkpoint.config if checkpoint is not None else recipe.model_config()
    before = Checkpoint(str(resumed), "--resume", config) if resumed is not None else None
    if before is not None and before.has_processor:
        processor = build_processor(recipe, config, before)
        if processor.to_dict() != before.processor.to_dict():
            raise UserError(
                f"--resume {resumed}: {preparation(processor, before)}; resume with its values (and its --model, if it"
                " had one), or start from its weights with --model."
            )
    else:
        processor = build_processor(recipe, config, checkpoint)
    if teacher is not None and teacher.has_processor:
        here, there = processor.to_dict(), teacher.processor.to_dict()
        for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"):
            if here[name] != there[name]:
                raise UserError(
                    f"{teacher.flag} {teacher.name} was trained with {name} {there[name]} and would see images prepared"
                    f" with {name} {here[name]}; give a teacher whose preprocessor_config.json says the same."
                )
    return Start(checkpoint, teacher, config, processor)


def build_processor(
    recipe: Recipe, config: EfficientNetNVConfig, checkpoint: Checkpoint | None = None
) -> EfficientNetNVImageProcessor:
    """How images are prepared: as the checkpoint does, or by the published evaluation.

    The recipe's `image_size`, `resize_margin` and `interpolation` change that where they say something.

    Raises:
        UserError: the checkpoint does not say how, in a way that can be done.
    """
    if checkpoint is None or not checkpoint.has_processor:
        margin = RESIZE_MARGIN if recipe.resize_margin is None else recipe.resize_margin
        resample = FILTERS[recipe.interpolation or "bicubic"]
        size = recipe.image_size or config.image_size
        return EfficientNetNVImageProcessor.for_image_size(size, margin, resample=resample)
    settings = checkpoint.processor.to_dict()
    height, width = checkpoint.processor.crop_size["height"], checkpoint.processor.crop_size["width"]
    margin = checkpoint.processor.size["shortest_edge"] - min(height, width)
    if recipe.resize_margin is not None:
        margin = recipe.resize_margin
    if recipe.image_size is not None:
        height = width = recipe.image_size
    if recipe.interpolation is not None:
        settings["resample"] = FILTERS[recipe.interpolation]
    if min(height, width) + margin < 1:
        raise UserError(
            f"--image_size {min(height, width)} with the margin {margin} leaves no image; give --resize_margin 0."
        )
    settings |= {"crop_size": {"height": height, "width": width}, "size": min(height, width) + margin}
    return EfficientNetNVImageProcessor.from_dict(settings)


def preparation(processor: EfficientNetNVImageProcessor, checkpoint: Checkpoint) -> str:
    """In a sentence: that images are prepared as the checkpoint's were, or what `processor` does otherwise."""
    here = processor.to_dict()
    steps = f"crop {_in_words('crop_size', here['crop_size'])}"
    if processor.do_resize:
        steps = f"short side to {_in_words('size', here['size'])} ({_in_words('resample', here['resample'])}), {steps}"
    if not checkpoint.has_processor:
        return f"{checkpoint.name} does not say how to prepare images: {steps}, ImageNet's mean and standard deviation"
    there = checkpoint.processor.to_dict()
    changed = [name for name in here if here[name] != there.get(name)]
    if not changed:
        return f"images are prepared as {checkpoint.name} says: {steps}"
    ways = (", ".join(f"{name} {_in_words(name, way[name])}" for name in changed) for way in (here, there))
    return "images are prepared with {}, where {checkpoint.flag} was evaluated with {}".format(
        *ways, checkpoint=checkpoint
    )


def _in_words(name: str, value: Any) -> str:
    if name == "resample":
        return Image.Resampling(value).name.lower()
    return " x ".join(str(side) for side in value.values()) if isinstance(value, dict) else str(value)


def build_networks(
    recipe: Recipe, start: Start, class_names: list[str], device: torch.device, channels_last: bool
) -> tuple[EfficientNetNVForImageClassification, EfficientNetNVForImageClassification | None]:
    """The network to train and, if there is one, its teacher in evaluation mode: on the device, and tuned for it.

    Raises:
        UserError: see [`build_model`], or the teacher's classes are not the data's.
    """
    networks, teacher = [build_model(recipe, start, class_names)], start.teacher
    if teacher is not None:
        if not has_classes(teacher.config, class_names, by_position=recipe.placement != "none"):
            raise UserError(f"{teacher.flag} {teacher.name} knows other classes than the data.")
        networks.append(teacher.load().eval().requires_grad_(False))
    for network in networks:
        network.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        if device.type == "cpu":
            tune_for_cpu_training(network, start.image_size)
    model = networks[0]
    if device.type == "cpu" and recipe.precision == "bf16":
        refuse_unwritten_gradients(model.config, start.image_size)
    if recipe.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if recipe.gradient_checkpointing:
        model._set_gradient_checkpointing(True)
    return model, networks[1] if teacher is not None else None


def build_model(recipe: Recipe, start: Start, class_names: list[str]) -> EfficientNetNVForImageClassification:
    """A fresh network, or a checkpoint's weights with a new classifier if its classes are not these.

    Raises:
        UserError: `num_labels` insists on another number, or the checkpoint cannot be used.
    """
    if recipe.num_labels not in (None, len(class_names)):
        raise UserError(f"--num_labels {recipe.num_labels} was asked for, but the data has {len(class_names)} classes.")
    id2label = dict(enumerate(class_names))
    labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    settings = recipe.architecture_overrides() | {"image_size": start.image_size}
    checkpoint = start.checkpoint
    if checkpoint is None:
        config = copy.deepcopy(start.config)
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
        return EfficientNetNVForImageClassification(config)
    quantizes = recipe.placement != "none" or checkpoint.quantized
    if has_classes(checkpoint.config, class_names, by_position=quantizes):
        if "LABEL_0" not in (checkpoint.config.label2id or {}):
            labels = {}  # it keeps the names that it has
        return checkpoint.load(**labels, **settings)
    if quantizes:
        raise UserError(
            f"--model {checkpoint.name} knows other classes than the data, and quantizing keeps the classifier;"
            f" fine-tune the float model on these first, with {invocation('train')}."
        )
    model = checkpoint.load(new_classifier=True, **labels, **settings)
    model._init_weights(model.classifier)  # perhaps as many classes, but other ones: the old head means nothing
    return model


def has_classes(config: EfficientNetNVConfig, class_names: list[str], by_position: bool = False) -> bool:
    """Whether a checkpoint's classifier is for these classes.

    One that names none is, if their number fits; and so is one of ImageNet's thousand in words for its wnid folders.

    Args:
        by_position: take any classes for the same whose names are all others and whose number fits, as validation does.
    """
    known = [config.id2label[i] for i in sorted(config.id2label)]
    if known in (class_names, [f"LABEL_{i}" for i in range(len(class_names))]):
        return True
    imagenet = len(class_names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names)
    return (by_position or imagenet) and len(known) == len(class_names) and not set(known) & set(class_names)
