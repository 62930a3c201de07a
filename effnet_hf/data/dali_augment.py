"""The augmentation policies as DALI operators: what to apply is drawn by us, image by image; DALI applies it.

A policy is a suite of operations; an image's draw is, per step, (which operation, level, sign). The draws of
AutoAugment are those of `auto_augment.draw`, so that one seed gives both executors the same operations. RandAugment and
TrivialAugment follow torchvision's definitions, with DALI's own implementation of each operation.

DALI resamples bilinearly where Pillow can do so bicubically, and its equalize is OpenCV's:
benchmarks/2026-11-25-data-cpu.md tabulates the differences per operation.
"""

import random
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from . import auto_augment
from .transforms import RANDAUGMENT


@dataclass(frozen=True)
class DaliPolicy:
    """How many steps, and from what to choose.

    Attributes:
        name: "autoaugment", "randaugment" or "trivialaugment".
        processor: has the size of the images.
        randaugment: of that policy the number of operations and their magnitude, 0 to 30.
    """

    name: str
    processor: EfficientNetNVImageProcessor
    randaugment: tuple[int, int] = RANDAUGMENT

    @property
    def steps(self) -> int:
        return {"autoaugment": 2, "randaugment": self.randaugment[0], "trivialaugment": 1}[self.name]

    @property
    def levels(self) -> int:
        return 11 if self.name == "autoaugment" else 31

    def draw(self, rng: random.Random) -> np.ndarray:
        """int32 (steps, 3): position in `operations()`, level, 1 for a negative sign."""
        if self.name == "autoaugment":
            drawn = auto_augment.draw(rng)
            rows = [(1 + auto_augment.OPERATIONS.index(step.operation), step.level, step.negative) for step in drawn]
            return np.array(rows + [(0, 0, 0)] * (self.steps - len(rows)), np.int32)
        rows = []
        for _ in range(self.steps):
            level = self.randaugment[1] if self.name == "randaugment" else rng.randrange(self.levels)
            rows.append((rng.randrange(_SUITE_SIZE), level, rng.random() < 0.5))
        return np.array(rows, np.int32)

    def operations(self) -> list:
        """Callables (images, magnitude_bin, num_magnitude_bins) for `nvidia.dali.auto_aug.core.select`."""
        if self.name == "autoaugment":
            return _auto_augment_suite()
        from nvidia.dali.auto_aug import rand_augment, trivial_augment

        if self.name == "randaugment":
            size = self.processor.crop_size
            reach = tuple(round(150 / 331 * size[side]) for side in ("height", "width"))  # torchvision's
            suite = rand_augment.get_rand_augment_suite(max_translate_abs=reach)
        else:
            suite = trivial_augment.get_trivial_augment_wide_suite()
        return [partial(_call, operation) for operation in suite]

    def apply(self, images, draws):
        """Adds the policy to a graph: `images` uint8 HWC, `draws` as from `draw`. For pipelines with conditionals."""
        from nvidia.dali.auto_aug.core import select, signed_bin

        operations = self.operations()
        for step in range(self.steps):
            level = signed_bin(draws[step, 1], random_sign=draws[step, 2])
            images = select(operations, draws[step, 0], images, magnitude_bin=level, num_magnitude_bins=self.levels)
        return images


_SUITE_SIZE = 14  # of RandAugment and TrivialAugment, in torchvision and in DALI


def _auto_augment_suite() -> list:
    """Identity, then the operations in the order of `auto_augment.OPERATIONS`, with the ranges of its table."""
    from nvidia.dali import types
    from nvidia.dali.auto_aug import augmentations as dali

    # Pillow's affine matrices map the result to the source, DALI's the source to the result: hence the negative ranges.
    nearest = {"interp_type": types.INTERP_NN}
    suite = {
        "shear_x": dali.shear_x.augmentation((0, -0.3), True),
        "shear_y": dali.shear_y.augmentation((0, -0.3), True),
        "translate_x": dali.translate_x_no_shape.augmentation((0, -250), True),
        "translate_y": dali.translate_y_no_shape.augmentation((0, -250), True),
        "rotate": dali.rotate.augmentation((0, 30), True),
        "color": dali.color.augmentation((0.1, 1.9), False, None),
        "posterize": dali.posterize.augmentation((0, 4), False),
        "solarize": dali.solarize.augmentation((0, 256), False),
        "solarize_add": dali.solarize_add.augmentation((0, 110), False),
        "autocontrast": dali.auto_contrast,
        "equalize": dali.equalize,
        "invert": dali.invert,
    }
    as_pillow = {"translate_x": nearest, "translate_y": nearest, "rotate": nearest}
    return [_identity, *(partial(_call, suite[name], **as_pillow.get(name, {})) for name in auto_augment.OPERATIONS)]


def _call(operation, images, *, magnitude_bin, num_magnitude_bins, **options):
    grey = auto_augment.GREY[0]
    return operation(
        images, magnitude_bin=magnitude_bin, num_magnitude_bins=num_magnitude_bins, fill_value=grey, **options
    )


def _identity(images, **_):
    return images
