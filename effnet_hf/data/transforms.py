"""From an opened picture to the uint8 square that leaves a worker.

Randomness comes from one number per (seed, epoch, sample), so a picture looks the same in epoch 7 whichever worker,
rank or resumed run prepares it.
"""

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from ..image_processing_efficientnet_nv import resize_and_crop
from . import auto_augment
from .pictures import Picture


_ASPECT_RATIO = (3 / 4, 4 / 3)
_PILLOW_FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class Geometry(NamedTuple):
    """A random crop, in pixels of the upright picture, and whether to mirror it."""

    left: int
    top: int
    width: int
    height: int
    flip: bool


def draw_geometry(rng: random.Random, width: int, height: int, crop_scale: float, flip: float) -> Geometry:
    """torchvision's `RandomResizedCrop.get_params` and a coin, from our own generator.

    torchvision's own draws from the process-wide generator, ten tensors at a time: 60 us a picture, and not
    repeatable per sample.
    """
    low, high = math.log(_ASPECT_RATIO[0]), math.log(_ASPECT_RATIO[1])
    flipped = rng.random() < flip
    for _ in range(10):
        area = width * height * rng.uniform(crop_scale, 1)
        ratio = math.exp(rng.uniform(low, high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Geometry(rng.randint(0, width - w), rng.randint(0, height - h), w, h, flipped)
    w, h = width, height  # too long or too wide a picture: the largest allowed part of its middle
    if width / height < _ASPECT_RATIO[0]:
        h = max(1, round(width / _ASPECT_RATIO[0]))
    elif width / height > _ASPECT_RATIO[1]:
        w = max(1, round(height * _ASPECT_RATIO[1]))
    return Geometry((width - w) // 2, (height - h) // 2, w, h, flipped)


class TrainTransform:
    """Random resized crop, mirroring, then one of the augmentation policies: `Picture` -> uint8 (size, size, 3)."""

    def __init__(self, image_size, interpolation="bicubic", crop_scale=0.08, horizontal_flip=0.5, augmentation="none"):
        self.image_size = image_size
        self.interpolation = interpolation
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.policy = make_policy(augmentation)

    def __call__(self, picture: Picture, seed: int) -> np.ndarray:
        rng = random.Random(seed)
        left, top, width, height, flip = draw_geometry(
            rng, picture.width, picture.height, self.crop_scale, self.horizontal_flip
        )
        square = self._resize(picture.crop(left, top, width, height))
        if flip:
            square = square[:, ::-1]
        if self.policy is None:
            return square
        return np.asarray(self.policy(Image.fromarray(np.ascontiguousarray(square)), rng))

    def _resize(self, pixels: torch.Tensor) -> np.ndarray:
        # torch's uint8 resampling is Pillow's algorithm with vector instructions: 0.4 ms instead of 1.0.
        square = torch.nn.functional.interpolate(
            pixels[None].contiguous(memory_format=torch.channels_last),
            size=(self.image_size, self.image_size),
            mode=self.interpolation,
            antialias=True,
        )
        return square[0].permute(1, 2, 0).numpy()


class EvaluationTransform:
    """Exactly the image processor's geometry: `Picture` -> uint8 (size, size, 3). It draws nothing."""

    def __init__(self, image_size: int, interpolation: str = "bicubic", resize_margin: int = 32):
        self.image_size = image_size
        self.shortest_edge = image_size + resize_margin
        self.resample = _PILLOW_FILTERS[interpolation]

    def __call__(self, picture: Picture, seed: int = 0) -> np.ndarray:
        crop = (self.image_size, self.image_size)
        return np.asarray(resize_and_crop(picture.rgb(), self.shortest_edge, crop, self.resample))


def make_policy(name: str):
    """A callable (picture, random.Random) -> picture, or None for "none"."""
    if name == "none":
        return None
    if name == "autoaugment":
        return auto_augment.auto_augment
    return _FromTorchvision(name)


class _FromTorchvision:
    """RandAugment (2 operations, magnitude 9 of 30) or TrivialAugment as torchvision has them, grey outside.

    They draw from torch's process-wide generator, which is seeded for the call and put back after it.
    """

    def __init__(self, name: str):
        from torchvision import transforms

        classes = {"randaugment": transforms.RandAugment, "trivialaugment": transforms.TrivialAugmentWide}
        mode = transforms.InterpolationMode.BILINEAR
        self._transform = classes[name](interpolation=mode, fill=list(auto_augment.GREY))

    def __call__(self, image: Image.Image, rng: random.Random) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return self._transform(image)
