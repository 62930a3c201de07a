"""A B0 with squeeze-excite and SiLU from the weights of EfficientNet-Lite0, which has neither.

Lite0's convolutions, batch norms and classifier have exactly B0's shapes. What B0 has besides starts neutral: the gate
of every squeeze-excite is sigmoid(4) = 0.982 for any input. SiLU for ReLU6 moves every feature map's mean and variance,
so batch norm's running statistics are measured again on a few hundred images. The result is a start for fine-tuning,
"B0 warm-started from Lite0", and no ImageNet B0.
"""

import dataclasses
import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import nn

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification, SqueezeExcite
from .load import Converted


if TYPE_CHECKING:
    from ..data import BadFiles


DEFAULT_IMAGES = 200  # to measure batch norm statistics on
GATE_BIAS = 4.0
_BATCH = 40


def warm_start(
    lite: Converted,
    variant: str,
    images: str | Path,
    *,
    num_images: int | None = None,
    padding: str = "symmetric",
    seed: int = 0,
) -> Converted:
    """A model of `variant` with every tensor of `lite` in it, and batch norm statistics measured on `images`.

    Args:
        lite: a Lite model, e.g. `load_foreign("lite0")`.
        variant: one whose layers have the same shapes, for Lite0 `"b0"` or `"widese-b0"`.
        images: a folder of images, searched with everything below it; `num_images` of them are drawn with `seed`,
            by default 200, or all where there are fewer. One that cannot be read is passed over, with a note.
        padding: the new model's.

    Raises:
        UserError: the shapes do not fit, the folder does not hold enough images, or none of them can be read, or too
            many cannot: more than one, and more than one in a hundred.
    """
    from ..data import BadFiles  # datasets take a second to import, which other conversions do not need

    if not str(lite.config.variant).startswith("lite"):
        raise UserError(f"--warm_start begins from a Lite model, {lite.source} is a {lite.config.variant}.")
    labels = {"id2label": lite.config.id2label, "label2id": lite.config.label2id}
    try:
        config = EfficientNetNVConfig.from_variant(variant, padding=padding, **labels)
    except ValueError as error:
        raise UserError(f"--warm_start {variant}: {error}") from error
    paths = _draw(images, num_images, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # the squeeze layers keep their random initial values
        model = EfficientNetNVForImageClassification(config)
    fresh = {key: tensor for key, tensor in model.state_dict().items() if ".se." in key}
    problems = [
        key
        for key, tensor in model.state_dict().items()
        if key not in fresh and getattr(lite.state_dict.get(key), "shape", None) != tensor.shape
    ]
    if problems or not fresh:
        raise UserError(f"--warm_start {variant}: {lite.config.variant} has other shapes; lite0 fits b0 and widese-b0.")
    model.load_state_dict({**fresh, **lite.state_dict}, strict=True)
    for module in model.modules():
        if isinstance(module, SqueezeExcite):
            nn.init.zeros_(module.expand.weight)
            nn.init.constant_(module.expand.bias, GATE_BIAS)
    processor = EfficientNetNVImageProcessor.for_image_size(config.image_size)
    bad = BadFiles(None, len(paths), has_flags=False)
    _measure_batch_norm(model, processor, _readable(paths, Path(images), processor.bit_depth, bad))
    notes = (
        f"{variant.upper()} with {padding} padding, warm-started from {lite.config.variant} ({lite.path.name}).",
        f"Squeeze-excite gates start at sigmoid({GATE_BIAS:g}); batch norm's statistics are of"
        f" {len(paths) - bad.count} images.",
        *(f"{file}, and is not among them." for file in bad.files),
        "A start for fine-tuning, not an ImageNet model.",
    )
    return dataclasses.replace(
        lite,
        config=model.config,
        state_dict=model.state_dict(),
        processor=processor,
        difference=None,
        notes=notes,
        warm_start_of=str(lite.config.variant),
    )


def _draw(folder: str | Path, count: int | None, seed: int) -> list[Path]:
    from ..data import list_images

    if not os.path.isdir(folder):
        raise UserError(f"--images {folder} is not a folder.")
    paths = sorted(map(Path, list_images(folder)[0]))
    if not paths:
        raise UserError(f"--images {folder} holds no images.")
    count = min(DEFAULT_IMAGES, len(paths)) if count is None else count
    if count < 1:
        raise UserError(f"--num_images {count}: batch norm statistics need at least one image.")
    if len(paths) < count:
        raise UserError(f"--images {folder} holds {len(paths)} images, {count} are needed; lower --num_images.")
    return random.Random(seed).sample(paths, count)


@torch.no_grad()
def _measure_batch_norm(
    model: nn.Module, processor: EfficientNetNVImageProcessor, images: Iterator[Image.Image]
) -> None:
    """Replaces every running mean and variance by the average over batches of the images."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = norms[0].momentum
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # PyTorch's cumulative average
        norm.train()
    while batch := list(itertools.islice(images, _BATCH)):
        model(**processor(batch, return_tensors="pt"))
    for norm in norms:
        norm.momentum = momentum
        norm.eval()


def _readable(paths: list[Path], folder: Path, bit_depth: int | None, bad: "BadFiles") -> Iterator[Image.Image]:
    """Opens one after the other; what cannot be read goes to `bad`, by its name in `folder`."""
    from ..data import BadFile, BadPicture, Picture, Reading, read_file

    for path in paths:
        try:
            image = Picture(read_file(path), Reading(bit_depth)).rgb()
        except BadPicture as error:
            file = BadFile(os.path.relpath(path, folder), str(error))
            bad.report([file])
            if bad.count == len(paths):
                raise UserError(f"--images {folder}: {file}, and there is no other; name a folder of images.") from None
            continue
        yield image
