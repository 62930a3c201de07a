"""Handwritten digits in every kind of folder, and a small network that knows them: what reads them rightly finds
98 in 100, whatever takes other pixels or other labels does not."""

import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor


WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE = 16


@functools.cache
def digits() -> tuple[list[Image.Image], np.ndarray]:
    """scikit-learn's 1,797 digits, 16 x 16 pixels of grey, and what they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    grey = (Image.fromarray((image * 255 / 16).round().astype(np.uint8)) for image in found.images)
    return [image.resize((SIDE, SIDE), Image.Resampling.BICUBIC) for image in grey], found.target


@functools.cache
def held_out(per_class: int = 6) -> dict[int, list[int]]:
    """Numbers of digits that the probe was not trained on, by what they are."""
    _, target = digits()
    numbers = np.arange(0, len(target), 5)
    return {digit: numbers[target[numbers] == digit][:per_class].tolist() for digit in range(10)}


@functools.cache
def trained(per_class: int = 3) -> dict[int, list[int]]:
    """Numbers of digits that it was trained on."""
    _, target = digits()
    numbers = np.flatnonzero(np.arange(len(target)) % 5)
    return {digit: numbers[target[numbers] == digit][:per_class].tolist() for digit in range(10)}


def write_probe(folder: Path) -> Path:
    """A checkpoint that knows the digits in words, in their alphabet's order; trained in three seconds."""
    order = sorted(WORDS)
    config = EfficientNetNVConfig.from_dict(_network().config.to_dict())
    config.id2label, config.label2id = dict(enumerate(order)), {name: number for number, name in enumerate(order)}
    named = EfficientNetNVForImageClassification(config)
    named.load_state_dict(_network().state_dict())
    rows = [WORDS.index(name) for name in order]
    with torch.no_grad():
        named.classifier.weight.copy_(_network().classifier.weight[rows])
        named.classifier.bias.copy_(_network().classifier.bias[rows])
    named.save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(SIDE, 0).save_pretrained(folder)
    return folder


@functools.cache
def answers() -> np.ndarray:
    """What the probe takes every digit for, of pixels and of a network that no command has touched."""
    with torch.inference_mode():
        return _network()(pixel_values=_pixels()).logits.argmax(-1).numpy()


def right_share(numbers: list[int]) -> float:
    """Top-1 of the probe on these digits, in percent."""
    return 100 * float(np.mean(answers()[numbers] == digits()[1][numbers]))


def _pixels() -> torch.Tensor:
    processor = EfficientNetNVImageProcessor.for_image_size(SIDE, 0)
    return processor([image.convert("RGB") for image in digits()[0]], return_tensors="pt")["pixel_values"]


@functools.cache
def _network() -> EfficientNetNVForImageClassification:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = EfficientNetNVConfig(
            image_size=SIDE, kernel_sizes=[3, 5, 3], strides=[1, 2, 2], num_block_repeats=[1, 1, 1],
            expand_ratios=[1, 4, 4], out_channels=[16, 24, 40], stem_channels=16, head_channels=96, num_labels=10,
            dropout_rate=0.0, survival_prob=1.0, batch_norm_momentum=0.1,
        )  # fmt: skip
        network = EfficientNetNVForImageClassification(config)
        pixels, labels = _pixels(), torch.from_numpy(digits()[1])
        rows, epochs, size = torch.from_numpy(np.flatnonzero(np.arange(len(labels)) % 5)), 6, 32
        optimizer = torch.optim.AdamW(network.parameters(), 4e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, epochs * (len(rows) // size))
        for _ in range(epochs):
            for batch in rows[torch.randperm(len(rows))].split(size)[:-1]:
                logits = network(pixel_values=pixels[batch]).logits
                torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
    return network.eval()
