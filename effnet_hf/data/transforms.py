"""From an opened image to the uint8 one, of the processor's crop size, that leaves a worker.

Randomness comes from one number per (seed, epoch, sample, appearance of it), so an image looks the same in epoch 7
whichever worker, rank or resumed run prepares it, and different where a balanced epoch has it twice.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..recipes import Recipe
from . import auto_augment
from .pictures import Box, Picture


RANDAUGMENT = Recipe.randaugment_operations, Recipe.randaugment_magnitude
_ASPECT_RATIO = (3 / 4, 4 / 3)
_IN_TORCH = {int(Image.Resampling.BILINEAR): "bilinear", int(Image.Resampling.BICUBIC): "bicubic"}


class Geometry(NamedTuple):
    """A random crop of the upright image, and whether to mirror it."""

    box: Box
    flip: bool


def draw_geometry(rng: random.Random, width: int, height: int, crop_scale: float, flip: float) -> Geometry:
    """torchvision's `RandomResizedCrop.get_params` and a coin, from our own generator.

    torchvision's own draws from the process-wide generator, ten tensors at a time: 60 us an image, and not
    repeatable per sample.
    """
    low, high = math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])
    flipped = rng.random() < flip
    for _ in range(10):
        area = width * height * rng.uniform(crop_scale, 1)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Geometry(Box(rng.randint(0, width - w), rng.randint(0, height - h), w, h), flipped)
    w, h = width, height  # too long or too wide an image: the largest allowed part of its middle
    if width / height < _ASPECT_RATIO[0]:
        h = max(1, round(width / _ASPECT_RATIO[0]))
    elif width / height > _ASPECT_RATIO[1]:
        w = max(1, round(height * _ASPECT_RATIO[1]))
    return Geometry(Box((width - w) // 2, (height - h) // 2, w, h), flipped)


class TrainTransform:
    """Random resized crop, mirroring, then one of the augmentation policies: `Picture` -> uint8 (height, width, 3).

    The size is the processor's `crop_size`, whatever its `do_resize` says of evaluation, and the filter is its own.

    Args:
        reducing_gap: decode a JPEG at 1/2, 1/4 or 1/8 where its crop is still so many times the size then; 0 never.
    """

    def __init__(
        self,
        processor: EfficientNetNVImageProcessor,
        *,
        crop_scale: float = 0.08,
        horizontal_flip: float = 0.5,
        augmentation: str = "none",
        randaugment: tuple[int, int] = RANDAUGMENT,
        reducing_gap: int = 0,
    ):
        self.processor = processor
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.policy = make_policy(augmentation, randaugment)
        self.reducing_gap = reducing_gap

    def __call__(self, picture: Picture, seed: int) -> np.ndarray:
        rng = random.Random(seed)
        box, flip = self._geometry(rng, picture)
        size = self.processor.crop_size["height"], self.processor.crop_size["width"]
        pixels = resize(picture.crop(box, self._reduction(box, size)), size, self.processor.resample)
        if flip:
            pixels = pixels.flip(1)  # numpy and Pillow take two to six times as long to mirror
        if self.policy is None:
            return pixels.numpy()
        return np.asarray(self.policy(Image.fromarray(pixels.numpy()), rng))

    def _reduction(self, box: Box, size: tuple[int, int]) -> int:
        if not self.reducing_gap:
            return 1
        fits = min(box.height / size[0], box.width / size[1]) / self.reducing_gap
        return next((factor for factor in (8, 4, 2) if fits >= factor), 1)

    def _geometry(self, rng: random.Random, picture: Picture) -> Geometry:
        return draw_geometry(rng, picture.width, picture.height, self.crop_scale, self.horizontal_flip)


class EvaluationTransform:
    """Exactly the image processor's geometry: `Picture` -> uint8 (height, width, 3). It draws nothing."""

    def __init__(self, processor: EfficientNetNVImageProcessor):
        self.processor = processor

    def __call__(self, picture: Picture, seed: int = 0) -> np.ndarray:
        image = picture.rgb()
        return picture.guarded(lambda: np.asarray(self.processor.resize_and_crop(image)))


def resize(pixels: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    """uint8 (3, height, width) -> (*size, 3) with one of Pillow's filters, antialiased.

    torch's uint8 resampling is Pillow's algorithm in vector instructions, five times as fast: 0.2 ms instead of 1.2.
    It takes that path, and gives channels-last back, when all four strides say channels-last; `pixels[None]` would take
    any stride for its batch of one. It has two of Pillow's filters; the others are Pillow's own.
    """
    rows = pixels.permute(1, 2, 0).contiguous()
    if resample not in _IN_TORCH:
        return torch.from_numpy(np.array(Image.fromarray(rows.numpy()).resize(size[::-1], resample)))
    batch = rows[None].permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(batch, size=size, mode=_IN_TORCH[resample], antialias=True)
    return resized[0].permute(1, 2, 0)


def make_policy(name: str, randaugment: tuple[int, int] = RANDAUGMENT):
    """A callable (image, random.Random) -> image, or None for "none".

    Args:
        randaugment: of that policy the number of operations and their magnitude, 0 to 30.
    """
    if name == "none":
        return None
    if name == "autoaugment":
        return auto_augment.auto_augment
    return _FromTorchvision(name, randaugment)


class _FromTorchvision:
    """RandAugment or TrivialAugment as torchvision has them, grey outside.

    They draw from torch's process-wide generator, which is seeded for the call and put back after it.
    """

    def __init__(self, name: str, randaugment: tuple[int, int]):
        from torchvision import transforms

        options = {"interpolation": transforms.InterpolationMode.BILINEAR, "fill": list(auto_augment.GREY)}
        if name == "randaugment":
            self._transform = transforms.RandAugment(*randaugment, **options)
        else:
            self._transform = transforms.TrivialAugmentWide(**options)

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return self._transform(image)
