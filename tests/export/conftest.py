import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, EfficientNetNVImageProcessor

from ..data.torture import photo
from ..test_scripts import call


pytest.importorskip("onnx", reason="needs the onnx extra")
pytest.importorskip("onnxruntime", reason="needs the onnx extra")

NAMES = ["bird", "cat", "dog"]


def make_checkpoint(folder, processor=None, **overrides):
    """A network of three small stages at 64 pixels, batch norm statistics measured on photographs."""
    torch.manual_seed(0)
    settings = {"num_block_repeats": [1, 1, 2], "kernel_sizes": [3, 5, 3], "strides": [1, 2, 2]}
    settings |= {"expand_ratios": [1, 6, 4], "out_channels": [16, 24, 24], "stem_channels": 16, "head_channels": 64}
    settings |= {"image_size": 64, "id2label": dict(enumerate(NAMES)), "batch_norm_momentum": 1.0, "dropout_rate": 0.0}
    config = EfficientNetNVConfig(**{**settings, **overrides})
    model = EfficientNetNVForImageClassification(config)
    processor = processor or EfficientNetNVImageProcessor.for_image_size(config.image_size)
    pixels = processor([photo(i, 100, 120) for i in range(24)], return_tensors="pt")["pixel_values"].float()
    with torch.no_grad():
        model.train()(pixels)
        logits = model.eval()(pixels).logits
        model.classifier.weight *= 3 / logits.std()
        model.classifier.bias -= (model(pixels).logits).mean(0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture(scope="session")
def exported(checkpoint, tmp_path_factory):
    """The checkpoint as `export.py` writes it when nothing else is asked for."""
    from effnet_hf.export import export_model

    folder = tmp_path_factory.mktemp("exported") / "onnx"
    export_model(str(checkpoint), folder)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """`train/` and `val/` with 8 photographs in each of three classes."""
    root = tmp_path_factory.mktemp("photos")
    for label, (split, name) in enumerate(itertools.product(("train", "val"), NAMES)):
        (root / split / name).mkdir(parents=True)
        for i in range(8):
            photo(100 * label + i, 90 + 5 * i, 140 - 6 * i).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs a script's `main` as its command would; returns exit code, stdout, stderr."""
    return lambda script, *arguments: call(script, *arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def image() -> Image.Image:
    return photo(7, 150, 110)


def as_arrays(folder, images) -> np.ndarray:
    processor = EfficientNetNVImageProcessor.from_pretrained(folder)
    return np.stack(processor(images)["pixel_values"])


def listed(photos, file, split) -> list:
    """Adds the photographs of a split to a list: the labels are the bits of a number. Returns those that have one."""
    numbered = enumerate(path.relative_to(photos) for path in sorted((photos / split).rglob("*.png")))
    rows = [(path, [name for i, name in enumerate(NAMES) if (number >> i) & 1]) for number, path in numbered]
    rows = [row for row in rows if row[1]]
    head = "" if file.exists() else "path,label\n"
    with open(file, "a") as lines:
        lines.write(head + "".join(f"{path},{';'.join(names)}\n" for path, names in rows))
    return rows
