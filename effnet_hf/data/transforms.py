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
from .pictures import Box, Picture


_ASPECT_RATIO = (3 / 4, 4 / 3)
_PILLOW_FILTERS = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


class Geometry(NamedTuple):
    """A random crop of the upright picture, and whether to mirror it."""

    box: Box
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
            return Geometry(Box(rng.randint(0, width - w), rng.randint(0, height - h), w, h), flipped)
    w, h = width, height  # too long or too wide a picture: the largest allowed part of its middle
    if width / height < _ASPECT_RATIO[0]:
        h = max(1, round(width / _ASPECT_RATIO[0]))
    elif width / height > _ASPECT_RATIO[1]:
        w = max(1, round(height * _ASPECT_RATIO[1]))
    return Geometry(Box((width - w) // 2, (height - h) // 2, w, h), flipped)


class TrainTransform:
    """Random resized crop, mirroring, then one of the augmentation policies: `Picture` -> uint8 (size, size, 3)."""

    def __init__(self, image_size, interpolation="bicubic", crop_scale=0.08, horizontal_flip=0.5, augmentation="none"):
        self.image_size = image_size
        self.interpolation = interpolation
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.policy = make_policy(augmentation)

    def box(self, picture: Picture, seed: int) -> Box:
        """The part of the picture that `self(picture, seed)` will ask for."""
        return self._geometry(random.Random(seed), picture).box

    def __call__(self, picture: Picture, seed: int) -> np.ndarray:
        rng = random.Random(seed)
        box, flip = self._geometry(rng, picture)
        square = resize(picture.crop(box), self.image_size, self.interpolation)
        if flip:
            square = square.flip(1)  # numpy and Pillow take two to six times as long to mirror
        if self.policy is None:
            return square.numpy()
        return np.asarray(self.policy(Image.fromarray(square.numpy()), rng))

    def _geometry(self, rng: random.Random, picture: Picture) -> Geometry:
        return draw_geometry(rng, picture.width, picture.height, self.crop_scale, self.horizontal_flip)


class EvaluationTransform:
    """Exactly the image processor's geometry: `Picture` -> uint8 (size, size, 3). It draws nothing."""

    def __init__(self, image_size: int, interpolation: str = "bicubic", resize_margin: int = 32):
        self.image_size = image_size
        self.shortest_edge = image_size + resize_margin
        self.resample = _PILLOW_FILTERS[interpolation]

    def box(self, picture: Picture, seed: int = 0) -> Box:
        """All of the picture."""
        return Box(0, 0, picture.width, picture.height)

    def __call__(self, picture: Picture, seed: int = 0) -> np.ndarray:
        crop = (self.image_size, self.image_size)
        return np.asarray(resize_and_crop(picture.rgb(), self.shortest_edge, crop, self.resample))


def resize(pixels: torch.Tensor, size: int, interpolation: str) -> torch.Tensor:
    """uint8 (3, height, width) -> (size, size, 3), antialiased.

    torch's uint8 resampling is Pillow's algorithm in vector instructions, five times as fast: 0.2 ms instead of 1.2.
    It takes that path, and gives channels-last back, when all four strides say channels-last; `pixels[None]` would take
    any stride for its batch of one.
    """
    batch = pixels.permute(1, 2, 0).contiguous()[None].permute(0, 3, 1, 2)
    square = torch.nn.functional.interpolate(batch, size=(size, size), mode=interpolation, antialias=True)
    return square[0].permute(1, 2, 0)


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
