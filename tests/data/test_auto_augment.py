"""The policy against a second, plain copy of the table and of each operation, written from the reference facts."""

import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from effnet_hf.data import auto_augment
from effnet_hf.data.auto_augment import Step

from .torture import photo


TABLE = """
equalize .8,1      shear_y .8,4       | solarize .6,8    color .6,9
color .4,9         equalize .6,3      | solarize .2,4    rotate .8,9
color .4,1         rotate .6,8        | rotate 1,7       translate_y .8,9
solarize .8,3      equalize .4,7      | shear_x 0,0      solarize .8,4
solarize .4,2      solarize .6,2      | shear_y .8,0     color .6,4
color .2,0         equalize .8,8      | color 1,0        rotate .6,2
equalize .4,8      solarize_add .8,3  | equalize .8,4    equalize 0,8
shear_x .2,9       rotate .6,8        | equalize 1,4     autocontrast .6,2
color .6,1         equalize 1,2       | shear_y .4,7     solarize_add .6,7
invert .4,9        rotate .6,0        | posterize .8,2   solarize .6,10
equalize 1,9       shear_y .6,3       | solarize .6,8    equalize .6,1
color .4,7         equalize .6,0      | color .8,6       rotate .4,5
posterize .4,6     autocontrast .4,7  |
"""


def table() -> list:
    left, right = [], []
    for line in TABLE.strip().splitlines():
        for half, column in zip(line.split("|"), (left, right)):
            words = half.split()
            if words:
                pairs = [(words[i], *map(float, words[i + 1].split(","))) for i in (0, 2)]
                column.append(tuple((name, probability, int(level)) for name, probability, level in pairs))
    return left + right


def reference(image: Image.Image, name: str, level: int, sign: int) -> Image.Image:
    """NVIDIA's operations, spelt out one by one; rotation the long way, over a grey background."""
    grey = (128, 128, 128)
    pixels = np.asarray(image).astype(int)
    if name == "shear_x":
        return image.transform(
            image.size, Image.AFFINE, (1, sign * 0.03 * level, 0, 0, 1, 0), Image.BICUBIC, fillcolor=grey
        )
    if name == "shear_y":
        return image.transform(
            image.size, Image.AFFINE, (1, 0, 0, sign * 0.03 * level, 1, 0), Image.BICUBIC, fillcolor=grey
        )
    if name == "translate_x":
        return image.transform(image.size, Image.AFFINE, (1, 0, sign * 25 * level, 0, 1, 0), fillcolor=grey)
    if name == "translate_y":
        return image.transform(image.size, Image.AFFINE, (1, 0, 0, 0, 1, sign * 25 * level), fillcolor=grey)
    if name == "rotate":
        rotated = image.convert("RGBA").rotate(sign * 3 * level)
        return Image.composite(rotated, Image.new("RGBA", image.size, (*grey, 128)), rotated).convert("RGB")
    if name == "color":
        return ImageEnhance.Color(image).enhance(0.1 + 0.18 * level)
    if name == "posterize":
        bits = [0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4][level]
        return Image.fromarray((pixels // 2 ** (8 - bits) * 2 ** (8 - bits)).astype(np.uint8))
    if name == "solarize":
        return Image.fromarray(np.where(pixels < 25.6 * level, pixels, 255 - pixels).astype(np.uint8))
    if name == "solarize_add":
        return Image.fromarray(np.where(pixels < 128, np.clip(pixels + 11 * level, 0, 255), pixels).astype(np.uint8))
    return {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize, "invert": ImageOps.invert}[name](
        image
    )


def test_the_table_is_the_published_one():
    assert len(auto_augment.POLICY) == 25
    assert list(auto_augment.POLICY) == table()


@pytest.mark.parametrize("level", range(11))
@pytest.mark.parametrize("name", auto_augment.OPERATIONS)
def test_every_operation_at_every_level_is_pixel_equal(name, level):
    image = photo(11, 224, 224)
    for negative in (False, True) if name in auto_augment.SIGNED else (False,):
        ours = auto_augment.apply(image, Step(name, level, negative))
        assert ours.mode == "RGB" and ours.size == image.size
        assert np.array_equal(np.asarray(ours), np.asarray(reference(image, name, level, -1 if negative else 1)))


def test_whole_sub_policies_are_pixel_equal():
    image = photo(12, 224, 224)
    for seed in range(50):
        expected = image
        for step in auto_augment.draw(random.Random(seed)):
            expected = reference(expected, step.operation, step.level, -1 if step.negative else 1)
        ours = auto_augment.auto_augment(image, random.Random(seed))
        assert np.array_equal(np.asarray(ours), np.asarray(expected))


def test_the_picture_given_is_not_changed():
    image = photo(13, 64, 64)
    before = image.tobytes()
    for seed in range(30):
        auto_augment.auto_augment(image, random.Random(seed))
    assert image.tobytes() == before


def test_operations_come_as_often_as_the_table_says():
    draws, expected, seen, negative = 10_000, Counter(), Counter(), Counter()
    for sub_policy in table():
        for name, probability, _ in sub_policy:
            expected[name] += probability / 25
    rng = random.Random(0)
    for _ in range(draws):
        for step in auto_augment.draw(rng):
            seen[step.operation] += 1
            negative[step.operation] += step.negative
    for name in auto_augment.OPERATIONS:
        # Four standard deviations of a sum of independent coins.
        assert abs(seen[name] - draws * expected[name]) <= 4 * (draws * expected[name]) ** 0.5 + 1e-9, name
        if name in auto_augment.SIGNED and seen[name]:
            assert abs(negative[name] - seen[name] / 2) <= 2 * seen[name] ** 0.5, name
        if name not in auto_augment.SIGNED:
            assert negative[name] == 0


def test_both_operations_of_a_sub_policy_are_independent_coins():
    rng, both, runs = random.Random(1), 0, 20_000
    for _ in range(runs):
        both += len(auto_augment.draw(rng)) == 2
    expected = sum(a[1] * b[1] for a, b in table()) / 25
    assert abs(both / runs - expected) < 0.015
