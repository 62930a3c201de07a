"""Decodes every image of a data set before a run meets it, and says what training and validation would do with it."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

from ..cli import moved
from ..errors import UserError, printable
from ..recipes import Recipe
from .bad_files import BadFile, BadFiles
from .cores import usable_cores
from .folder import dataset_of, survey_tree
from .names import role_of
from .opening import open_data
from .pictures import USUAL, BadPicture, Picture, Reading
from .source import DataSource, Split
from .splits import existing_folder, find_splits, fold_of, split_folders
from .survey import copies_of, digest_of, images_per_class, near_empty
from .worker_pool import WorkerPool


_AT_ONCE = 16  # files that a process is given together
_SHOWN = 10  # unreadable files of one kind, in the text
_FEW = 20  # classes that are all named
VALIDATED = "validated on"
_USED = "trained on", VALIDATED


@dataclass
class Part:
    """The images of one split, and what looking at them found.

    Attributes:
        title: its folder or its name.
        use: what a run does with it: "trained on", "validated on", …
        bad: the unreadable images.
        sizes: width and height of the others, by number.
        kinds: how many there are of each format and mode.
        digests: of every image's bytes, by number; None for what could not be read.
    """

    title: str
    use: str
    split: Split
    class_names: list[str]
    label_sets: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)
    bad: list[BadFile] = field(default_factory=list)
    sizes: dict[int, tuple[int, int]] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    digests: list[bytes | None] = field(default_factory=list)

    @cached_property
    def counts(self) -> np.ndarray:
        """Images per class, int64."""
        return images_per_class(self.split.labels, len(self.class_names), self.label_sets)

    def label_of(self, number: int) -> str:
        label = self.split.label(number)
        if self.label_sets is None:
            return self.class_names[label]
        return ", ".join(self.class_names[i] for i in np.flatnonzero(self.label_sets[label])) or "no class"


@dataclass
class Scan:
    """What a data set holds.

    Attributes:
        parts: its splits.
        notes: sentences that a run would say before its first epoch, and what it needs to be told.
        refused: sentences for which a run would end.
        copies: images of equal bytes, each as (part, number).
    """

    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    copies: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def bad(self) -> list[BadFile]:
        return [file for part in self.parts for file in part.bad]

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {
            "splits": [_described(part) for part in self.parts],
            "notes": self.notes,
            "copies": [
                [
                    {"split": self.parts[part].title, "name": self.parts[part].split.name(number),
                     "class": self.parts[part].label_of(number)}
                    for part, number in group
                ]
                for group in self.copies
            ],
            "refused": self.refused,
        }  # fmt: skip

    def text(self) -> str:
        """The same in lines."""
        lines = [line for part in self.parts for line in _lines(part)]
        lines += self._lines_on_copies()
        lines += [f"note: {note}" for note in self.notes]
        lines += [f"refused: {sentence}" for sentence in self.refused]
        return "\n".join(map(printable, lines))

    def _lines_on_copies(self) -> list[str]:
        if not self.copies:
            return []
        kinds: dict[str, list] = {"under two labels": [], "in two splits": [], "in one split, under one label": []}
        for group in self.copies:
            labels = len({self.parts[part].label_of(number) for part, number in group})
            splits = len({part for part, _ in group})
            kinds[list(kinds)[0 if labels > 1 else 1 if splits > 1 else 2]].append(group)
        are = "image is" if len(self.copies) == 1 else "images are"
        files = sum(map(len, self.copies))
        lines = [f"identical: {len(self.copies):,} {are} there more than once, byte for byte, in {files:,} files"]
        for what, groups in kinds.items():
            if groups:
                lines.append(f"  {len(groups):,} {what}:")
                lines += [f"    {self._pair(group)}" for group in groups[:10]]
                lines += [f"    … and {len(groups) - 10:,} more; --json lists them all"] if len(groups) > 10 else []
        return lines

    def _pair(self, group: list[tuple[int, int]]) -> str:
        words = [f"{self.parts[part].split.name(i)} ({self.parts[part].label_of(i)})" for part, i in group[:2]]
        return " = ".join(words) + (f" and {len(group) - 2:,} more" if len(group) > 2 else "")


def scan_data(recipe: Recipe, workers: int | None = None, progress: bool | None = None) -> Scan:
    """Decodes every image that a recipe's data options name, in full, as training would.

    Args:
        workers: processes; the free cores by default.
        progress: show a bar; by default on a terminal only.

    Raises:
        UserError: there are no images to look at.
    """
    scan = Scan()
    _open(scan, recipe)
    if not scan.parts:
        raise UserError(scan.refused[0])
    workers = int(usable_cores()) if workers is None else workers
    for part in scan.parts:
        _look(part, workers, Reading.of(recipe), progress)
        if part.use.startswith(("trained", "validated")):
            try:
                BadFiles(None, len(part.split), recipe.max_bad_files).report(part.bad)
            except UserError as error:
                scan.refused.append(f"{part.title}: {error}")
    places = [(number, image) for number, part in enumerate(scan.parts) for image in range(len(part.split))]
    groups = copies_of(digest for part in scan.parts for digest in part.digests)
    _sort_copies(scan, [[places[number] for number in group] for group in groups], bool(recipe.labels))
    return scan


def _sort_copies(scan: Scan, groups: list[list[tuple[int, int]]], listed: bool) -> None:
    """Tells files of equal bytes from one file that two splits lead to.

    Args:
        listed: the images are those of a list, so files too.
    """
    twice = 0
    for group in groups:
        files: dict[str, list[tuple[int, int]]] = {}
        for part, image in group:
            split = scan.parts[part].split
            is_file = listed or split.folder is not None
            name = os.path.realpath(split.name(image)) if is_file else f"{part} {image}"
            files.setdefault(name, []).append((part, image))
        for places in files.values():
            twice += {*_USED} <= {scan.parts[part].use for part, _ in places}
        if len(files) > 1:
            scan.copies.append(group)
    if twice:
        are = "validation image is" if twice == 1 else "validation images are"
        scan.notes.append(f"{twice:,} {are} trained on too, the same file in both: the figures are too good by them.")


def _open(scan: Scan, recipe: Recipe) -> None:
    """Finds the parts, and what a run would refuse: all of it, where a run says the first."""
    root = existing_folder(recipe.data_dir, flag="") if recipe.data_dir else None
    whole = "trained and validated on once it is split"
    uses = list(_USED)
    try:
        source = open_data(recipe)
    except UserError as error:
        measured = _measurable(recipe, str(error))
        if measured is None:
            scan.refused.append(str(error))
            if root is not None and not recipe.labels:
                _take_folders(scan, split_folders(root), used=True)
            return
        scan.notes.append(f"training needs more: {error}")
        source = measured
        if root is not None and source.val is not None and source.val.folder == os.path.realpath(root):
            uses[1] = whole
            if len(source.class_names) < 2:
                scan.refused.append(f"{root} has a single class, {source.class_names[0]}; a classifier needs two.")
    scan.notes += source.notes
    held_out = source.train is not None and source.val is not None and source.train.folder == source.val.folder
    if held_out and root is not None and not recipe.labels:  # or two links to one folder
        chosen = find_splits(root, val_fraction=recipe.val_fraction, val_split=recipe.val_split, fold=fold_of(recipe))
        held_out = chosen.val is None
    for name, use, split in zip(("train", "val"), uses, (source.train, source.val)):
        if split is None:
            continue
        if not isinstance(split, Split):
            raise UserError("scan looks at images in any order; drop --streaming.")
        title = split.folder or f"{recipe.labels or recipe.data_dir or recipe.dataset_name} {name}"
        title += f", the {'share held out' if name == 'val' else 'rest'}" if held_out and split.folder else ""
        scan.parts.append(Part(title, use, split, source.class_names, source.label_sets))
    known = {part.split.folder for part in scan.parts} - {None}
    if root is not None and known:
        others = [folder for folder in split_folders(root) if folder != root]
        _take_folders(scan, [folder for folder in others if os.path.realpath(folder) not in known], used=False)


def _measurable(recipe: Recipe, sentence: str) -> DataSource | None:
    """What `validate` would measure, where training lacks nothing but a split: that is no fault of the data."""
    if not recipe.data_dir or recipe.labels:
        return None
    try:
        find_splits(recipe.data_dir, val_fraction=recipe.val_fraction, val_split=recipe.val_split, fold=fold_of(recipe))
        return None
    except UserError as error:
        if str(error) != sentence:
            return None
    try:
        return open_data(recipe, train=False)
    except UserError:
        return None


def _take_folders(scan: Scan, folders: list[Path], used: bool) -> None:
    """Adds folders of class folders for themselves, and if they would be `used` what is wrong with them."""
    for folder in folders:
        try:
            tree = survey_tree(os.path.realpath(folder))  # the words of what opens it as a split
            problems = tree.problems
            if tree.paths:
                split = Split(dataset_of(tree), "image", np.array(tree.labels), folder=(tree.root, ""))
                use = "refused" if used else "passed over"
                if not used and role_of(folder.name) == "train":
                    use = "trained on once a note below is followed"
                scan.parts.append(Part(str(folder), use, split, tree.classes, notes=tree.notes))
        except UserError as error:
            problems = [str(error)]
        if used:
            scan.refused += [problem for problem in problems if problem not in scan.refused]


def inspect(data: bytes, reading: Reading = USUAL) -> tuple[tuple[int, int], str]:
    """Width and height, and what kind of file it is. Raises `BadPicture`."""
    picture = Picture(data, reading)
    picture.rgb().load()
    return (picture.width, picture.height), picture.kind


@dataclass(frozen=True)
class _Inspections(Dataset):
    split: Split
    reading: Reading

    def __getitem__(self, numbers: list[int]):
        found: list[tuple] = []
        for number in numbers:
            digest = None
            try:
                data = self.split.read(number)
                digest = digest_of(data)
                found.append((*inspect(data, self.reading), None, digest))
            except BadPicture as error:
                found.append((None, "", str(error), digest))
        return found


def _look(part: Part, workers: int, reading: Reading, progress: bool | None) -> None:
    hide = None if progress is None else not progress  # tqdm: None is "only on a terminal"
    found = _inspected(part.split, workers, reading)
    for number, (size, kind, reason, digest) in enumerate(
        tqdm(found, printable(part.title), len(part.split), disable=hide)
    ):
        part.digests.append(digest)
        if reason is None:
            part.sizes[number] = size
            part.kinds[kind] += 1
        else:
            part.bad.append(BadFile(part.split.name(number), reason))


def _inspected(split: Split, workers: int, reading: Reading) -> Iterator[tuple]:
    pool = WorkerPool(_Inspections(split, reading), workers)
    numbers = range(len(split))
    try:
        for batch in pool.batches(list(numbers[i : i + _AT_ONCE]) for i in range(0, len(split), _AT_ONCE)):
            yield from batch
    finally:
        pool.close()


def _described(part: Part) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": part.title,
        "use": part.use,
        "images": len(part.split),
        "classes": dict(zip(part.class_names, part.counts.tolist())),
        "nearly_empty": [part.class_names[number] for number in near_empty(part.counts) if part.use != VALIDATED],
        "kinds": dict(part.kinds.most_common()),
        "bad": [file._asdict() for file in part.bad],
        "notes": part.notes,
    }
    if part.sizes:
        sizes = np.array(list(part.sizes.values()))
        short = sizes.min(axis=1)
        found["size"] = {
            "median": np.median(sizes, axis=0).astype(int).tolist(),
            "short_side": [int(short.min()), int(short.max())],
        }
    return found


def _lines(part: Part) -> list[str]:
    found, counts = _described(part), part.counts
    least, most = int(counts.argmin()), int(counts.argmax())
    spread = f"{counts.min():,}"
    if counts.min() < counts.max():
        spread += f" ({part.class_names[least]}) to {counts.max():,} ({part.class_names[most]})"
        spread += f", median {int(np.median(counts)):,}"
    lines = [
        f"{part.title}: {len(part.split):,} images in {len(counts):,} classes, {len(part.bad):,} unreadable;"
        f" {part.use}",
        f"  per class: {spread}",
    ]
    if len(counts) <= _FEW:
        lines.append("  " + ", ".join(f"{name} {count:,}" for name, count in found["classes"].items()))
    if nearly := found["nearly_empty"]:
        more = f" and {len(nearly) - _FEW:,} more" if len(nearly) > _FEW else ""
        some = ", ".join(f"{name} {found['classes'][name]:,}" for name in nearly[:_FEW])
        lines.append(f"  nearly empty: {some}{more}")
    if "size" in found:
        (width, height), (low, high) = found["size"]["median"], found["size"]["short_side"]
        lines.append(f"  size: median {width} x {height}, short side {low:,} to {high:,} pixels")
        lines.append("  kinds: " + ", ".join(f"{kind} {count:,}" for kind, count in found["kinds"].items()))
    lines += [f"  note: {note}" for note in part.notes]
    alike: dict[str, list[BadFile]] = {}
    for file in part.bad:
        alike.setdefault(re.sub(r"\d", "", file.reason), []).append(file)
    for files in alike.values():
        lines += [f"  bad: {file}" for file in files[:_SHOWN]]
        if len(files) > _SHOWN:
            lines.append(f"  … and {len(files) - _SHOWN:,} more like these; --output FILE lists them all")
    return lines


if __name__ == "__main__":
    moved("scan")
