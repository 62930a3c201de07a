"""The folders that fine-tuning is compared on, and those that our recipe was tuned on.

The five of the comparison are the Imagenette subset, its first 100 and 20 training pictures per class (by a hash of the
file name) with the same validation pictures, scikit-learn's digits, and 2,000 + 2,000 pictures of Fashion-MNIST from
Debian's package `dataset-fashion-mnist`. The recipe was tuned on other training pictures of Imagenette and
Fashion-MNIST; their validation pictures are none of the comparison's.
"""

import gzip
import hashlib
from pathlib import Path

import numpy as np
from PIL import Image


# Folder: the side of its pictures in every run, in pixels.
COMPARED = {"imagenette-20": 96, "imagenette-100": 96, "imagenette": 96, "digits": 48, "fashion-mnist": 48}
TUNED_ON = {"tune-imagenette-100": 96, "tune-imagenette-20": 96, "tune-fashion-mnist": 48}
FEW = "few"  # a folder with the same training pictures, and one of each class to validate on
FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]


def make_folders(work: Path, imagenette: Path, digits: Path, fashion: Path) -> None:
    """Writes every folder below `work` as links, and Fashion-MNIST as PNG; what is there already stays."""
    for name, source in (("imagenette", imagenette), ("digits", digits)):
        for split in ("train", "val"):
            _link(work / name / split, source / split)
    for name, images, labels, first, count, split in (
        ("fashion-mnist", "train", "train", 0, 2000, "train"),
        ("fashion-mnist", "t10k", "t10k", 0, 2000, "val"),
        ("tune-fashion-mnist", "train", "train", 10_000, 1000, "train"),
        ("tune-fashion-mnist", "train", "train", 20_000, 400, "val"),
    ):
        if not (work / name / split).is_dir():
            pictures = _idx(fashion / f"{images}-images-idx3-ubyte.gz")[first : first + count]
            classes = _idx(fashion / f"{labels}-labels-idx1-ubyte.gz")[first : first + count]
            for number, (picture, label) in enumerate(zip(pictures, classes, strict=True)):
                path = work / name / split / FASHION[label] / f"{number:05}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
    for folder in sorted(path for path in (imagenette / "train").iterdir() if path.is_dir()):
        files = sorted(folder.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).hexdigest())
        for name, split, chosen in (
            ("imagenette-100", "train", files[:100]),
            ("imagenette-20", "train", files[:20]),
            ("tune-imagenette-100", "train", files[100:200]),
            ("tune-imagenette-20", "train", files[100:120]),
            ("tune-imagenette-100", "val", files[200:240]),
            ("tune-imagenette-20", "val", files[200:240]),
        ):
            for file in chosen:
                _link(work / name / split / folder.name / file.name, file)
    for name in ("imagenette-100", "imagenette-20"):
        _link(work / name / "val", imagenette / "val")
    for name in (*COMPARED, *TUNED_ON):  # what a run validates on meanwhile, at no cost: its time is not compared
        _link(work / name / FEW / "train", work / name / "train")
        for folder in sorted(path for path in (work / name / "val").iterdir() if path.is_dir()):
            file = min(folder.iterdir())
            _link(work / name / FEW / "val" / folder.name / file.name, file)


def _link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def _idx(path: Path) -> np.ndarray:
    """The array of an idx.gz file of unsigned bytes: two zeros, the type, the dimensions, their lengths, the values."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
