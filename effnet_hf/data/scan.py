"""Decodes every image of a folder before a run meets it: each is opened and decoded in full, as training would."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from ..cli import moved
from ..errors import UserError, printable
from .bad_files import BadFile
from .cores import usable_cores
from .folder import find_splits, open_folder
from .pictures import BadPicture, Picture, read_file
from .worker_pool import WorkerPool


_AT_ONCE = 16  # files that a process is given together


class Scan(NamedTuple):
    """What a folder holds: `bad` are the unreadable files and why, `summary` is some lines of text."""

    bad: list[BadFile]
    summary: str


def scan_data_dir(data_dir: str, workers: int | None = None) -> Iterator[Scan]:
    """Scans `data_dir`'s training and validation folders, or the one folder of class folders that it is.

    Args:
        workers: processes; the free cores by default.

    Raises:
        UserError: no such folder, no images in it, or validation classes that training does not know.
    """
    train, validation = find_splits(data_dir, flag="")
    if validation is not None and train.is_dir():
        _compare_classes(train, validation)
    for folder in (train, validation):
        if folder is not None and folder.is_dir():
            yield scan_folder(folder, int(usable_cores()) if workers is None else workers)


def scan_folder(folder: Path, workers: int = 1, progress: bool | None = None) -> Scan:
    """Decodes every image under a folder of class folders.

    Args:
        progress: show a bar; by default on a terminal only.
    """
    dataset, notes = open_folder(folder, use_cache=False)
    paths = dataset.data.column("image").combine_chunks().field("path").to_pylist()
    labels = dataset.data.column("label").to_numpy()
    kinds: Counter[str] = Counter()
    sizes, bad = [], []
    hide = None if progress is None else not progress  # tqdm: None is "only on a terminal"
    for path, (size, kind, reason) in zip(
        paths, tqdm(_inspected(paths, workers), printable(folder), len(paths), disable=hide)
    ):
        if reason is None:
            sizes.append(size)
            kinds[kind] += 1
        else:
            bad.append(BadFile(path, reason))
    return Scan(bad, _summary(str(folder), dataset.features["label"].names, labels, np.array(sizes), kinds, bad, notes))


def inspect(path: str) -> tuple[tuple[int, int] | None, str, str | None]:
    """Width and height, what kind of file it is, and why it is bad (None when it is fine)."""
    try:
        picture = Picture(read_file(path))
        picture.rgb().load()
        return (picture.width, picture.height), picture.kind, None
    except BadPicture as error:
        return None, "", str(error)


class _Inspections(Dataset):
    def __getitem__(self, paths: list[str]):
        return [inspect(path) for path in paths]


def _inspected(paths: list[str], workers: int):
    pool = WorkerPool(_Inspections(), workers)
    try:
        for batch in pool.batches(paths[i : i + _AT_ONCE] for i in range(0, len(paths), _AT_ONCE)):
            yield from batch
    finally:
        pool.close()


def _summary(folder, classes, labels, sizes, kinds, bad, notes) -> str:
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    spread = f"{counts.min():,}"
    if counts.min() < counts.max():
        spread += f" ({classes[least]}) to {counts.max():,} ({classes[most]}), median {int(np.median(counts)):,}"
    lines = [
        f"{folder}: {len(labels):,} images in {len(classes):,} classes, {len(bad):,} unreadable",
        f"  per class: {spread}",
    ]
    if len(classes) <= 20:
        lines.append("  " + ", ".join(f"{name} {count:,}" for name, count in zip(classes, counts)))
    if len(sizes):
        short = sizes.min(axis=1)
        width, height = np.median(sizes, axis=0).astype(int)
        lines.append(f"  size: median {width} x {height}, short side {short.min():,} to {short.max():,} pixels")
        lines.append("  kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common()))
    lines += [f"  note: {note}" for note in notes]
    lines += [f"  bad: {file}" for file in bad[:50]]
    if len(bad) > 50:
        lines.append(f"  … and {len(bad) - 50:,} more; --output FILE lists them all")
    return "\n".join(map(printable, lines))


def _compare_classes(train: Path, validation: Path) -> None:
    known = set(open_folder(train)[0].features["label"].names)
    unknown = sorted(set(open_folder(validation)[0].features["label"].names) - known)
    if unknown:
        raise UserError(f"{validation} has classes that {train} does not know: {', '.join(unknown[:5])}.")


if __name__ == "__main__":
    moved("scan")
