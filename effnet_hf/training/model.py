"""The networks and the image processor that a recipe asks for, fresh or from checkpoints."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import invocation
from ..configuration import EfficientNetNVConfig
from ..data.classes import is_nameless, match_classes
from ..errors import UserError
from ..image_processing_efficientnet_nv import RESIZE_MARGIN, EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import MULTI_LABEL, is_multi_label, require_same_task
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
        notes: a sentence for each of them that loses a temperature: it belongs to weights that do not change.
    """

    checkpoint: Checkpoint | None
    teacher: Checkpoint | None
    config: EfficientNetNVConfig
    processor: EfficientNetNVImageProcessor
    notes: tuple[str, ...] = ()

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
    elif recipe.teacher is not None:
        raise UserError(f"--teacher {recipe.teacher} teaches nothing with --distillation_weight 0; give it a weight.")
    if recipe.classes_by_position and checkpoint is None and teacher is None:
        raise UserError(
            "--classes_by_position is about the classes of a checkpoint; give one with --model, or leave it out."
        )
    notes = tuple(_drop_temperature(each) for each in (checkpoint, teacher) if each and each.config.softmax_temperature)
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
        both = ("bit_depth",) if None not in (here.get("bit_depth"), there.get("bit_depth")) else ()
        for name in ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", *both):
            if here[name] != there[name]:
                raise UserError(
                    f"{teacher.flag} {teacher.name} was trained with {name} {there[name]} and would see images prepared"
                    f" with {name} {here[name]}; give a teacher whose preprocessor_config.json says the same."
                )
    return Start(checkpoint, teacher, config, processor, notes)


def _drop_temperature(checkpoint: Checkpoint) -> str:
    temperature, checkpoint.config.softmax_temperature = checkpoint.config.softmax_temperature, None
    return (
        f"{checkpoint.flag} {checkpoint.name} divides its logits by {temperature:g}, its temperature; not here:"
        f" {invocation('validate')} --calibrate finds one for the weights that come of this"
    )


def build_processor(
    recipe: Recipe, config: EfficientNetNVConfig, checkpoint: Checkpoint | None = None
) -> EfficientNetNVImageProcessor:
    """How images are prepared: as the checkpoint does, or by the published evaluation.

    The recipe's `image_size`, `resize_margin`, `interpolation` and `bit_depth` change that where they say something.

    Raises:
        UserError: the checkpoint does not say how, in a way that can be done.
    """
    if checkpoint is None or not checkpoint.has_processor:
        margin = RESIZE_MARGIN if recipe.resize_margin is None else recipe.resize_margin
        resample = FILTERS[recipe.interpolation or "bicubic"]
        size = recipe.image_size or config.image_size
        return EfficientNetNVImageProcessor.for_image_size(size, margin, resample=resample, bit_depth=recipe.bit_depth)
    settings = checkpoint.processor.to_dict()
    height, width = checkpoint.processor.crop_size["height"], checkpoint.processor.crop_size["width"]
    margin = checkpoint.processor.size["shortest_edge"] - min(height, width)
    if recipe.resize_margin is not None:
        margin = recipe.resize_margin
    if recipe.image_size is not None:
        height = width = recipe.image_size
    if recipe.interpolation is not None:
        settings["resample"] = FILTERS[recipe.interpolation]
    if recipe.bit_depth is not None:
        settings["bit_depth"] = recipe.bit_depth
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
    changed = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if not changed:
        return f"images are prepared as {checkpoint.name} says: {steps}"
    ways = (", ".join(f"{name} {_in_words(name, way.get(name))}" for name in changed) for way in (here, there))
    return "images are prepared with {}, where {checkpoint.flag} was evaluated with {}".format(
        *ways, checkpoint=checkpoint
    )


def _in_words(name: str, value: Any) -> str:
    if value is None:
        return "not set"
    if name == "resample":
        return Image.Resampling(value).name.lower()
    return " x ".join(str(side) for side in value.values()) if isinstance(value, dict) else str(value)


def build_networks(
    recipe: Recipe,
    start: Start,
    class_names: list[str],
    device: torch.device,
    channels_last: bool,
    several: bool = False,
) -> tuple[EfficientNetNVForImageClassification, EfficientNetNVForImageClassification | None]:
    """The network to train and, if there is one, its teacher in evaluation mode: on the device, and tuned for it.

    Args:
        several: whether the data has several labels per image.

    Raises:
        UserError: see [`build_model`], or the teacher's classes are not the data's, or of the other kind.
    """
    networks, teacher = [build_model(recipe, start, class_names, several)], start.teacher
    if teacher is not None:
        require_same_task(teacher.config, several, f"{teacher.flag} {teacher.name}")
        head = Head.of(teacher, class_names, recipe.classes_by_position, some=True)
        if head.rows is None:
            raise UserError(f"{teacher.flag} {teacher.name} knows other classes than the data: {head.note}")
        network = teacher.load()
        take_classes(network, head.rows, head.names)
        networks.append(network.eval().requires_grad_(False))
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


def build_model(
    recipe: Recipe, start: Start, class_names: list[str], several: bool = False
) -> EfficientNetNVForImageClassification:
    """A fresh network, or a checkpoint's weights: with its classifier, in the order of these classes, or with a new one
    if its classes are not these.

    Args:
        several: whether the data has several labels per image. A classifier of one label per image is kept for it, too:
            its classes are the same, another loss goes on from there.

    Raises:
        UserError: `num_labels` insists on another number, or the checkpoint cannot be used.
    """
    if recipe.num_labels not in (None, len(class_names)):
        raise UserError(f"--num_labels {recipe.num_labels} was asked for, but the data has {len(class_names)} classes.")
    id2label = dict(enumerate(class_names))
    labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    settings = recipe.architecture_overrides() | {"image_size": start.image_size}
    checkpoint = start.checkpoint
    task = MULTI_LABEL if several else "single_label_classification"
    if checkpoint is None:
        config = copy.deepcopy(start.config)
        config.problem_type = task if several else config.problem_type
        config.id2label, config.label2id = labels["id2label"], labels["label2id"]
        return EfficientNetNVForImageClassification(config)
    quantizes = recipe.placement != "none" or checkpoint.quantized
    if quantizes:
        require_same_task(checkpoint.config, several, f"--model {checkpoint.name}")
    if several != is_multi_label(checkpoint.config):
        settings["problem_type"] = task
    head = Head.of(checkpoint, class_names, recipe.classes_by_position)
    if head.rows is not None:
        model = checkpoint.load(**settings)
        take_classes(model, head.rows, head.names)
        return model
    if quantizes:
        raise UserError(
            f"--model {checkpoint.name} knows other classes than the data, and quantizing keeps the classifier;"
            f" fine-tune the float model on these first, with {invocation('train')}: {head.note.removesuffix('.')}."
        )
    model = checkpoint.load(new_classifier=True, **labels, **settings)
    model._init_weights(model.classifier)  # perhaps as many classes, but other ones: the old head means nothing
    return model


@dataclass(frozen=True)
class Head:
    """What becomes of a checkpoint's classifier where the data has these classes.

    Attributes:
        rows: int64, for each class of the data its number among the checkpoint's; None where it needs a new classifier.
        names: the classes of the network, in the data's order.
        note: how they were matched, or why they were not, in a sentence; empty where both are the same list.
    """

    rows: np.ndarray | None
    names: list[str]
    note: str

    @classmethod
    def of(cls, checkpoint: Checkpoint, class_names: list[str], by_position: bool, some: bool = False) -> "Head":
        """Of a checkpoint for data of these classes.

        Args:
            some: whether a checkpoint that knows more classes will do.
        """
        known = checkpoint.class_names
        if not known:
            return cls(None, class_names, f"{checkpoint.name} has no classifier")
        try:
            match = match_classes(class_names, known, "the data", by_position)
        except UserError as reason:
            return cls(None, class_names, getattr(reason, "shortly", str(reason)))
        if not some and not match.is_one_to_one(known):
            have, all_of_them = len(class_names), len(known)
            return cls(
                None, class_names, f"{checkpoint.name} knows {all_of_them:,} classes, the data has {have:,} of them"
            )
        named = class_names if is_nameless(known) else [known[number] for number in match.numbers]
        return cls(match.numbers, named, match.note)


@torch.no_grad()
def take_classes(network: EfficientNetNVForImageClassification, rows: np.ndarray, names: list[str]) -> None:
    """Makes a classifier answer for these of its classes in this order, in place; a quantized one keeps its ranges.

    Args:
        rows: (classes,), the numbers that they have now.
        names: what they are called.
    """
    layer, config, own = network.classifier, network.config, torch.as_tensor(rows)
    for name, parameter in list(layer.named_parameters(recurse=False)):
        setattr(layer, name, torch.nn.Parameter(parameter[own], requires_grad=parameter.requires_grad))
    quantizer = getattr(layer, "weight_quantizer", None)
    if quantizer is not None:
        quantizer._amax = quantizer._amax[own]  # one range per class
    layer.out_features = network.num_labels = len(own)
    if config.thresholds is not None:
        config.thresholds = [config.thresholds[row] for row in own.tolist()]
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
