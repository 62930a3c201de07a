"""AutoAugment as NVIDIA's recipe uses it: the 25 sub-policies of the TensorFlow/TPU code ("v0"), on Pillow images.

One table and one way to draw from it serve both executors, the one below and `dali_augment.py`. The list is timm's
`v0`, not torchvision's `AutoAugmentPolicy.IMAGENET`; unlike timm's, translation is in pixels and levels are rounded
as NVIDIA rounds them (timm's posterize level 2 keeps no bit at all, this one keeps one).

Levels run from 0 to 10:

    shear_x, shear_y            0.03 m, either sign     affine, bicubic, grey outside
    translate_x, translate_y    25 m pixels, either     affine, nearest, grey outside
    rotate                      3 m degrees, either     nearest, grey outside
    color                       0.1 + 0.18 m            1 keeps the image, 0 is grey
    posterize                   round(0.4 m) bits
    solarize                    inverts from 25.6 m on
    solarize_add                adds 11 m to what is below 128
    autocontrast, equalize, invert: no level
"""

import random
from typing import NamedTuple

from PIL import Image, ImageEnhance, ImageOps


# (operation, probability, level), twice per sub-policy
POLICY = (
    (("equalize", 0.8, 1), ("shear_y", 0.8, 4)),
    (("color", 0.4, 9), ("equalize", 0.6, 3)),
    (("color", 0.4, 1), ("rotate", 0.6, 8)),
    (("solarize", 0.8, 3), ("equalize", 0.4, 7)),
    (("solarize", 0.4, 2), ("solarize", 0.6, 2)),
    (("color", 0.2, 0), ("equalize", 0.8, 8)),
    (("equalize", 0.4, 8), ("solarize_add", 0.8, 3)),
    (("shear_x", 0.2, 9), ("rotate", 0.6, 8)),
    (("color", 0.6, 1), ("equalize", 1.0, 2)),
    (("invert", 0.4, 9), ("rotate", 0.6, 0)),
    (("equalize", 1.0, 9), ("shear_y", 0.6, 3)),
    (("color", 0.4, 7), ("equalize", 0.6, 0)),
    (("posterize", 0.4, 6), ("autocontrast", 0.4, 7)),
    (("solarize", 0.6, 8), ("color", 0.6, 9)),
    (("solarize", 0.2, 4), ("rotate", 0.8, 9)),
    (("rotate", 1.0, 7), ("translate_y", 0.8, 9)),
    (("shear_x", 0.0, 0), ("solarize", 0.8, 4)),
    (("shear_y", 0.8, 0), ("color", 0.6, 4)),
    (("color", 1.0, 0), ("rotate", 0.6, 2)),
    (("equalize", 0.8, 4), ("equalize", 0.0, 8)),
    (("equalize", 1.0, 4), ("autocontrast", 0.6, 2)),
    (("shear_y", 0.4, 7), ("solarize_add", 0.6, 7)),
    (("posterize", 0.8, 2), ("solarize", 0.6, 10)),
    (("solarize", 0.6, 8), ("equalize", 0.6, 1)),
    (("color", 0.8, 6), ("rotate", 0.4, 5)),
)
GREY = (128, 128, 128)
SIGNED = {"shear_x", "shear_y", "translate_x", "translate_y", "rotate"}
_VALUES = {
    "shear_x": lambda level: 0.03 * level,
    "shear_y": lambda level: 0.03 * level,
    "translate_x": lambda level: 25.0 * level,
    "translate_y": lambda level: 25.0 * level,
    "rotate": lambda level: 3.0 * level,
    "color": lambda level: 0.1 + 0.18 * level,
    "posterize": lambda level: round(0.4 * level),
    "solarize": lambda level: 25.6 * level,
    "solarize_add": lambda level: 11 * level,
    "autocontrast": lambda level: 0,
    "equalize": lambda level: 0,
    "invert": lambda level: 0,
}
OPERATIONS = tuple(_VALUES)


class Step(NamedTuple):
    """An operation that was drawn. `negative` is always False where the sign has no meaning."""

    operation: str
    level: int
    negative: bool = False


def draw(rng: random.Random) -> list[Step]:
    """One sub-policy's operations that fire this time: none, one or two."""
    steps = []
    for operation, probability, level in POLICY[rng.randrange(len(POLICY))]:
        if rng.random() < probability:
            steps.append(Step(operation, level, operation in SIGNED and rng.random() < 0.5))
    return steps


def value_of(step: Step) -> float:
    """The magnitude that the table above gives."""
    value = _VALUES[step.operation](step.level)
    return -value if step.negative else value


def apply(image: Image.Image, step: Step) -> Image.Image:
    """One operation on an RGB image."""
    if step.operation in SIGNED and step.level == 0:
        return image  # the policy shears and rotates by 0: Pillow's bicubic takes 2 ms to change nothing
    return _EXECUTORS[step.operation](image, value_of(step))


def auto_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """One random sub-policy on an RGB image."""
    for step in draw(rng):
        image = apply(image, step)
    return image


def _affine(image, matrix, resample):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=GREY)


def _posterize(image, bits):
    mask = 256 - 2 ** (8 - bits)  # ImageOps.posterize refuses 0 bits since Pillow 12
    return image.point([i & mask for i in range(256)] * 3)


def _solarize_add(image, value):
    return image.point([min(255, i + value) if i < 128 else i for i in range(256)] * 3)


_EXECUTORS = {
    "shear_x": lambda image, value: _affine(image, (1, value, 0, 0, 1, 0), Image.Resampling.BICUBIC),
    "shear_y": lambda image, value: _affine(image, (1, 0, 0, value, 1, 0), Image.Resampling.BICUBIC),
    "translate_x": lambda image, value: _affine(image, (1, 0, value, 0, 1, 0), Image.Resampling.NEAREST),
    "translate_y": lambda image, value: _affine(image, (1, 0, 0, 0, 1, value), Image.Resampling.NEAREST),
    # The original goes through RGBA and a grey background; nearest leaves no half-transparent pixel, so this is equal.
    "rotate": lambda image, value: image.rotate(value, Image.Resampling.NEAREST, fillcolor=GREY),
    "color": lambda image, value: ImageEnhance.Color(image).enhance(value),
    "posterize": _posterize,
    "solarize": ImageOps.solarize,
    "solarize_add": _solarize_add,
    "autocontrast": lambda image, value: ImageOps.autocontrast(image),
    "equalize": lambda image, value: ImageOps.equalize(image),
    "invert": lambda image, value: ImageOps.invert(image),
}
