"""Small runs for the tests of the loop: a folder of coloured squares, and a recipe with everything switched on."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from effnet_hf import (
    EfficientNetNVConfig,
    EfficientNetNVForImageClassification,
    EfficientNetNVImageProcessor,
    configuration,
)
from effnet_hf.recipes import Recipe
from effnet_hf.run_folder import RunFolder
from effnet_hf.training import build_model, open_start, plots, train


@contextlib.contextmanager
def cheap_training() -> Iterator[None]:
    """B0 has 8 blocks of a quarter of the channels meanwhile, a run's plot two panels of five, and nothing waits for
    the disk: no test cuts the power.

    Everything that the loop does to a network it does to this one: every stage is there, residuals and stochastic depth
    too. A whole B0 is trained by the processes of tests/test_scripts.py, all panels are drawn in test_plots.py, and
    tests/test_files.py sees to the calls of `fsync`.
    """
    _, _, *rest = configuration._SIZES["b0"]
    with (
        mock.patch.dict(configuration._SIZES, b0=(0.25, 0.3, *rest)),
        mock.patch.object(plots, "PANELS", plots.PANELS[:2]),
        mock.patch.object(os, "fsync", lambda descriptor: None),
    ):
        yield


def write_squares(folder: Path, per_class: int = 12, size: int = 24, validation: int = 4) -> Path:
    """Three classes of noisy coloured squares, `per_class` for training and `validation` to validate on."""
    rng = np.random.default_rng(0)
    for split, count in (("train", per_class), ("val", validation)):
        for label, colour in (("blue", (40, 60, 200)), ("green", (50, 180, 60)), ("red", (210, 50, 40))):
            target = folder / split / label
            target.mkdir(parents=True, exist_ok=True)
            for index in range(count):
                noise = rng.integers(-40, 40, (size, size, 3))
                Image.fromarray((np.array(colour) + noise).clip(0, 255).astype(np.uint8)).save(target / f"{index}.png")
    return folder


def small_recipe(data_dir: Path, output_dir: Path, **changes) -> Recipe:
    """2 epochs of 4 optimizer steps of 2 micro-batches each; every source of randomness and every state is in use."""
    settings = {
        "variant": "b0",
        "image_size": 16,
        "resize_margin": 0,
        "survival_prob": 0.8,
        "augmentation": "autoaugment",
        "mixup": 0.2,
        "data_dir": str(data_dir),
        "output_dir": str(output_dir),
        "epochs": 2,
        "warmup_epochs": 1,
        "global_batch_size": 8,
        "per_device_batch_size": 4,
        "learning_rate": 0.001,
        "lr_scaling": "none",
        "lr_update": "step",
        "ema_decay": 0.9,
        "num_workers": 0,
        "log_every": 1,
        "report": False,  # it is drawn in a test of its own
        "quiet": True,
    }
    return Recipe(**{**settings, **changes})


def quantized_recipe(data_dir: Path, output_dir: Path, model: Path, **changes) -> Recipe:
    """The same, as quantization-aware training from the float model in `model`."""
    settings = {"model": str(model), "placement": "nvidia", "calibration_batches": 3, "warmup_epochs": 0}
    return small_recipe(data_dir, output_dir, **{**settings, **changes})


def write_tiny(folder: Path, seed: int = 0) -> Path:
    """A checkpoint of a three-stage network of 16 to 40 channels for the three classes, 32 px."""
    torch.manual_seed(seed)
    classes = ("blue", "green", "red")
    config = EfficientNetNVConfig(
        image_size=32, kernel_sizes=[3, 5, 3], strides=[1, 2, 2], num_block_repeats=[1, 2, 2], expand_ratios=[1, 6, 4],
        out_channels=[16, 24, 40], stem_channels=16, head_channels=64, id2label=dict(enumerate(classes)),
        label2id={name: i for i, name in enumerate(classes)},
    )  # fmt: skip
    EfficientNetNVForImageClassification(config).save_pretrained(folder)
    EfficientNetNVImageProcessor.for_image_size(32, 0).save_pretrained(folder)
    return folder


def built(recipe: Recipe, class_names: list[str]):
    """The network that a run of this recipe starts with."""
    return build_model(recipe, open_start(recipe), class_names)


def run(recipe: Recipe) -> int:
    """What `train.py` or `qat.py` does with a recipe."""
    if recipe.placement == "none":
        return train(recipe)
    from effnet_hf.quantization import Quantization

    return train(recipe, Quantization(recipe))


def read_rows(output_dir: Path, kind: str | None = None) -> list[dict]:
    """The lines of a run's metrics.jsonl, all or of one type."""
    rows = map(json.loads, (output_dir / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if kind in (None, row["type"])]


def fingerprint(output_dir: Path) -> dict[str, str]:
    """What must be equal between an interrupted and an uninterrupted run: weights, average, optimizer, losses."""
    newest = RunFolder(output_dir).all_checkpoints()[-1]
    prints = {"checkpoint": newest.name}
    for name in ("model.safetensors", "optimizer.safetensors", "average.safetensors", "random_0.safetensors"):
        prints[name] = hashlib.sha256((newest / name).read_bytes()).hexdigest()
    for folder in (output_dir, output_dir / "ema"):
        tensors = load_file(folder / "model.safetensors")
        digest = hashlib.sha256()
        for key in sorted(tensors):
            digest.update(key.encode() + tensors[key].numpy().tobytes())
        prints[f"{folder.relative_to(output_dir)} weights"] = digest.hexdigest()
    figures = []
    for row in read_rows(output_dir):
        if row["type"] in ("train", "val", "val_ema", "epoch"):
            timeless = {k: v for k, v in row.items() if "time" not in k and "ips" not in k and "latency" not in k}
            figures.append(timeless)
    prints["figures"] = json.dumps(figures)
    return prints
