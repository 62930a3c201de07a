"""Facts about a data set on which a figure's meaning depends: said before the first epoch, and by `scan`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .pictures import BadPicture


if TYPE_CHECKING:
    from .source import Split

NEAR_EMPTY = 0.05  # of the largest class
_FEW, _FIFTH = 10, 0.2  # and of so few images already this share of it is little
_MOST_FILES = 50_000  # read at the start of a run, so that it stays a matter of seconds …
_MOST_BYTES = 1 << 30  # … on a slow disk too
_THREADS = 16


def images_per_class(labels: np.ndarray, classes: int, label_sets: np.ndarray | None = None) -> np.ndarray:
    """int64 (classes,). `labels` are classes, or rows of `label_sets`, uint8 (sets, classes)."""
    if label_sets is None:
        return np.bincount(labels, minlength=classes)
    return np.bincount(labels, minlength=len(label_sets)) @ label_sets.astype(np.int64)


def notes_on_classes(class_names: Sequence[str], train: np.ndarray, val: np.ndarray) -> list[str]:
    """Sentences about classes that cannot be learned or measured.

    Args:
        train, val: images per class, int64 (classes,).
    """
    single = (train == 1) & (val == 0)
    return [
        f"{_classes(class_names, which)} {reason}."
        for which, reason in (
            (single, "with a single image, which is trained on: no validation image"),
            ((val == 0) & (train > 1), "without a validation image: nothing is measured there"),
            ((train == 0) & (val > 0), "without a training image"),
        )
        if which.any()
    ]


def note_on_balance(class_names: Sequence[str], counts: np.ndarray, flags: Sequence[str]) -> list[str]:
    """A sentence about classes that a run may never learn to find without its figures showing it.

    These have less than `NEAR_EMPTY` of the largest one's images; or less than a fifth, and fewer than ten.

    Args:
        counts: training images per class, int64 (classes,).
        flags: what may help and is not in use; without any nothing is said.
    """
    most = int(counts.max(initial=0))
    few = (counts < NEAR_EMPTY * most) | ((counts < _FEW) & (counts < _FIFTH * most))
    rare = np.flatnonzero(few & (counts > 0))
    if not len(rare) or not flags:
        return []
    rare = rare[np.argsort(counts[rare], kind="stable")]
    some = ", ".join(f"{class_names[number]} {counts[number]:,}" for number in rare[:3])
    more = f" and {len(rare) - 3:,} more classes" if len(rare) > 3 else ""
    return [
        f"few training images: {some}{more}; {class_names[int(counts.argmax())]} has {most:,}. What is rare may never"
        f" be found, and top-1 would not show it: see {', '.join(flags)}."
    ]


def near_empty(counts: np.ndarray) -> np.ndarray:
    """The classes of one image, or of less than `NEAR_EMPTY` of the largest one's, by number."""
    return np.flatnonzero((counts == 1) | (counts < NEAR_EMPTY * counts.max(initial=0)))


def notes_on_copies(
    train: Split,
    val: Split,
    sizes: tuple[np.ndarray, np.ndarray],
    most_files: int = _MOST_FILES,
    most_bytes: int = _MOST_BYTES,
) -> list[str]:
    """A sentence about the validation images that are trained on too, byte for byte.

    Files of equal size are read and compared, as many as the bounds allow; the sentence says if these were not all.

    Args:
        sizes: of the training and the validation images, in bytes, int64.
    """
    common = np.intersect1d(*sizes)
    common = common[common > 0]
    counts = [
        np.bincount(np.searchsorted(common, each[np.isin(each, common)]), minlength=len(common)) for each in sizes
    ]
    files = counts[0] + counts[1]
    share = max(files.sum() / most_files, (files * common).sum() / most_bytes)
    order = np.argsort(np.arange(len(common)) % max(1, int(np.ceil(share))), kind="stable")  # spread over all sizes
    fits = (np.cumsum(files[order]) <= most_files) & (np.cumsum((files * common)[order]) <= most_bytes)
    chosen = common[order[fits]]
    rows = [np.flatnonzero(np.isin(each, chosen)) for each in sizes]
    with ThreadPoolExecutor(_THREADS) as pool:
        of_train, of_val = (list(pool.map(lambda row, split=split: _digest(split, row), own.tolist()))
                            for split, own in zip((train, val), rows))  # fmt: skip
    first = {digest: row for digest, row in zip(reversed(of_train), reversed(rows[0].tolist())) if digest is not None}
    copies = [(row, first[digest]) for digest, row in zip(of_val, rows[1].tolist()) if digest in first]
    unread = int(counts[1].sum()) - len(rows[1])
    looked = f"{unread:,} of {len(val):,} validation images were not compared; `effnet-hf scan` does." if unread else ""
    if not copies:
        return [f"identical images in training and validation were looked for: none; {looked}"] if unread else []
    row, twin = copies[0]
    other = sum(val.label(row) != train.label(twin) for row, twin in copies)
    labels = f", {other:,} of them under another label" if other else ""
    are = "validation image is" if len(copies) == 1 else "validation images are"
    return [
        f"{len(copies):,} {are} trained on too, byte for byte{labels}, e.g. {val.name(row)} is {train.name(twin)}:"
        f" the figures are too good by them. {looked}".rstrip()
    ]


def copies_of(digests: Iterable[bytes | None]) -> list[list[int]]:
    """The numbers of files with equal content, a list for each content that is there more than once."""
    found: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        if digest is not None:
            found.setdefault(digest, []).append(number)
    return [numbers for numbers in found.values() if len(numbers) > 1]


def digest_of(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def _digest(split: Split, row: int) -> bytes | None:
    try:
        return digest_of(split.read(row))
    except BadPicture:  # which is spoken of where it is met
        return None


def _classes(names: Sequence[str], which: np.ndarray) -> str:
    """As in: 3 classes (a, b, c)."""
    numbers = np.flatnonzero(which)
    some = ", ".join(names[number] for number in numbers[:5])
    more = f" and {len(numbers) - 5:,} more" if len(numbers) > 5 else ""
    return f"{len(numbers):,} class{'es' * (len(numbers) > 1)} ({some}{more})"
