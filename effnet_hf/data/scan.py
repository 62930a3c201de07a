"""Decodes every picture of a folder before a run meets it: `python -m effnet_hf.data.scan DIR`.

Every file is opened and decoded in full, as training would. Ends with exit code 1 when a file is unreadable.
"""

import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from .. import cli
from ..errors import UserError
from ..files import atomic_write
from .bad_files import one_line
from .folder import find_splits, open_folder
from .pictures import BadPicture, Picture, read_file
from .workers import usable_cores


PROG = "python -m effnet_hf.data.scan"


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(prog=PROG, description="Check a folder of pictures before a run meets it.")
    parser.add_argument("folder", help="a folder with train/ and val/, or with one folder per class")
    parser.add_argument("--num_workers", type=cli.at_least(0), help="processes; the free cores by default")
    parser.add_argument("--output", default=None, help="write the unreadable files to this text file, one per line")
    arguments = parser.parse_args(argv)
    workers = arguments.num_workers if arguments.num_workers is not None else int(usable_cores())
    train, validation = find_splits(arguments.folder)
    if validation is not None and train.is_dir():
        _compare_classes(train, validation)
    bad = []
    with atomic_write(arguments.output) if arguments.output else nullcontext() as output:
        for folder in filter(Path.is_dir, filter(None, (train, validation))):
            bad += scan_folder(folder, workers)
        if output is not None:
            output.writelines(f"{one_line(name)}\t{one_line(reason)}\n" for name, reason in bad)
    return 1 if bad else 0


def scan_folder(folder: Path, workers: int = 1, progress: bool | None = None) -> list[tuple[str, str]]:
    """Decodes every picture under a folder of class folders and prints a summary.

    Returns:
        The unreadable files and why.
    """
    dataset, notes = open_folder(folder, use_cache=False)
    paths = dataset.data.column("image").combine_chunks().field("path").to_pylist()
    labels = dataset.data.column("label").to_numpy()
    kinds: Counter[str] = Counter()
    sizes, bad = [], []
    hide = None if progress is None else not progress  # tqdm: None is "only on a terminal"
    for path, (size, kind, reason) in zip(
        paths, tqdm(_inspected(paths, workers), str(folder), len(paths), disable=hide)
    ):
        if reason is None:
            sizes.append(size)
            kinds[kind] += 1
        else:
            bad.append((path, reason))
    print(_summary(str(folder), dataset.features["label"].names, labels, np.array(sizes), kinds, bad, notes))
    return bad


def inspect(path: str) -> tuple[tuple[int, int] | None, str, str | None]:
    """Width and height, what kind of file it is, and why it is bad (None when it is fine)."""
    try:
        picture = Picture(read_file(path))
        picture.rgb().load()
        return (picture.width, picture.height), picture.kind, None
    except BadPicture as error:
        return None, "", str(error)


class _Inspections(Dataset):
    def __init__(self, paths: list[str]):
        self._paths = paths

    def __len__(self):
        return len(self._paths)

    def __getitem__(self, index):
        return inspect(self._paths[index])


def _inspected(paths: list[str], workers: int):
    loader = DataLoader(_Inspections(paths), batch_size=16, num_workers=workers, collate_fn=list)
    return (result for batch in loader for result in batch)


def _summary(folder, classes, labels, sizes, kinds, bad, notes) -> str:
    counts = np.bincount(labels, minlength=len(classes))
    least, most = int(counts.argmin()), int(counts.argmax())
    spread = f"{counts.min():,}"
    if counts.min() < counts.max():
        spread += f" ({classes[least]}) to {counts.max():,} ({classes[most]}), median {int(np.median(counts)):,}"
    lines = [
        f"{folder}: {len(labels):,} pictures in {len(classes):,} classes, {len(bad):,} unreadable",
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
    lines += [f"  bad: {name} {reason}" for name, reason in bad[:50]]
    if len(bad) > 50:
        lines.append(f"  … and {len(bad) - 50:,} more; --output FILE lists them all")
    return "\n".join(lines)


def _compare_classes(train: Path, validation: Path) -> None:
    known = set(open_folder(train)[0].features["label"].names)
    unknown = sorted(set(open_folder(validation)[0].features["label"].names) - known)
    if unknown:
        raise UserError(f"{validation} has classes that {train} does not know: {', '.join(unknown[:5])}.")


if __name__ == "__main__":
    cli.run(lambda: main(sys.argv[1:]), PROG)
