"""Where images come from, behind one face: `Split.read(i)` gives the bytes of a file, `Split.labels[i]` its class."""

import hashlib
import os
import random
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .folder import VALIDATION_NAMES, find_splits, open_folder
from .listing import SCHEMA, DataListing, rows_of_dataset, rows_of_files
from .pictures import BadPicture, read_file


NO_IMAGE = {"bytes": None, "path": None}  # what a null in a column of images stands for


class Split:
    """Images and labels of a `datasets.Dataset` whose image column is not decoded.

    Args:
        dataset: with an `Image` column.
        image_column: its name.
        labels: int64, one per row of `dataset`.
        rows: the rows that belong to this split; all by default.
        folder: where the files are, and what stands before their names in a listing; None for rows of a data set.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        labels: np.ndarray,
        rows: np.ndarray | None = None,
        folder: tuple[str, str] | None = None,
    ):
        self._dataset = dataset
        self._image_column = image_column
        self._rows = rows
        self._folder = folder
        self._by_class: tuple[np.ndarray, np.ndarray] | None = None
        self.labels = np.asarray(labels, np.int64) if rows is None else np.asarray(labels, np.int64)[rows]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """The file, or the row, that a user can look up."""
        return self._image(index)["path"] or f"row {self._row(index)}"

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def read(self, index: int) -> bytes:
        """Raises `BadPicture` when there is nothing to read."""
        image = self._image(index)
        if image["bytes"] is not None:
            return image["bytes"]
        if not image["path"]:
            raise BadPicture("has neither bytes nor a path")
        return read_file(image["path"])

    def stand_ins(self, index: int, seed: int, tries: int = 32):
        """Sample numbers to try in place of an unreadable one: of its class in random order, then of any class."""
        if self._by_class is None:
            order = np.argsort(self.labels, kind="stable")
            self._by_class = order, self.labels[order]
        order, sorted_labels = self._by_class
        label = self.labels[index]
        start, stop = np.searchsorted(sorted_labels, [label, label + 1])
        rng = random.Random(seed)
        for position in rng.sample(range(start, stop), min(tries, stop - start)):
            yield int(order[position])
        for _ in range(tries):
            yield rng.randrange(len(self))

    def subset(self, rows: np.ndarray) -> "Split":
        part = Split.__new__(Split)
        part.__dict__.update(self.__dict__)
        part._rows = rows if self._rows is None else self._rows[rows]
        part.labels, part._by_class = self.labels[rows], None
        return part

    def listing(self, split: str) -> pa.Table:
        """Its part of a `DataListing`; asks for the size of every file."""
        images = self._dataset.data.column(self._image_column)
        if self._folder is None:
            return rows_of_dataset(split, images, self.labels, self._rows)
        paths = pc.struct_field(images, "path")
        paths = paths if self._rows is None else paths.take(pa.array(self._rows))
        return rows_of_files(split, *self._folder, paths, self.labels)

    def _row(self, index: int) -> int:
        return int(index if self._rows is None else self._rows[index])

    def _image(self, index: int) -> dict:
        # Straight from the Arrow table: `dataset[i]` takes fifty times as long.
        return self._dataset.data.column(self._image_column)[self._row(index)].as_py() or NO_IMAGE


@dataclass
class DataSource:
    """The images of a run.

    Attributes:
        class_names: in label order.
        train, val: either may be None when not asked for.
        notes: sentences about the data that a user should read once.
    """

    class_names: list[str]
    train: Split | None
    val: Split | None
    notes: list[str] = field(default_factory=list)

    def listing(self) -> DataListing:
        """What these images are, by name, label and size, as the disk says now."""
        splits = {"train": self.train, "val": self.val}
        tables = [images.listing(name) for name, images in splits.items() if images is not None]
        return DataListing(list(self.class_names), pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks())

    @classmethod
    def from_folder(
        cls, data_dir: str, val_fraction: float = 0.0, train: bool = True, class_names: list[str] | None = None
    ) -> "DataSource":
        """`train/` and `val/` (or `validation/`, `test/`) of class folders, or class folders to split by file name.

        Args:
            val_fraction: share of each class held out when there is no validation folder.
            train: False opens the validation images only; without a `val/` these are all of `data_dir`.
            class_names: label order to keep; folders may then be a part of it.

        Raises:
            UserError: one sentence about what is wrong with the folder.
        """
        train_dir, val_dir = find_splits(data_dir)
        root = Path(os.path.expanduser(data_dir))
        notes: list[str] = []
        if not train:
            if val_dir is None and train_dir != root and val_fraction == 0:
                raise UserError(f"--data_dir {data_dir} has a train/ but none of {_choices()}; validation needs one.")
            if val_dir is not None or val_fraction == 0:
                split, names = _folder_split(root, val_dir or train_dir, class_names, notes, by_position=True)
                return cls(names, None, split, notes)
        if val_dir is not None and not train_dir.is_dir():
            raise UserError(f"--data_dir {data_dir} has a {val_dir.name}/ but no train/; training needs one.")
        training, names = _folder_split(root, train_dir, class_names, notes, by_position=not train)
        if len(names) < 2:
            raise UserError(f"{train_dir} has a single class folder, {names[0]}; a classifier needs at least two.")
        if val_dir is not None:
            validation, _ = _folder_split(root, val_dir, names, notes)
            if val_fraction:
                notes.append(f"--val_fraction {val_fraction:g} was ignored because {val_dir} exists.")
        elif val_fraction:
            training, validation = split_by_name(training, val_fraction)
        else:
            raise UserError(
                f"{data_dir} has none of {_choices()}; add one, or hold out a share with --val_fraction 0.1."
            )
        return cls(names, training if train else None, validation, notes)


def split_by_name(split: Split, fraction: float) -> tuple[Split, Split]:
    """Training and validation part: of each class, the share of files whose hashed names come first.

    A file stays where it is when others are added or removed, but for a few at the border. A class of two or more
    images has at least one on each side.
    """
    hashes = np.empty(len(split), np.uint64)
    for index in range(len(split)):
        name = os.path.basename(split.name(index))
        hashes[index] = int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")
    order = np.lexsort((hashes, split.labels))
    held_out = np.zeros(len(split), bool)
    labels, starts, counts = np.unique(split.labels[order], return_index=True, return_counts=True)
    for start, count in zip(starts, counts):
        take = min(max(round(fraction * count), 1), count - 1)
        held_out[order[start : start + take]] = True
    return split.subset(np.flatnonzero(~held_out)), split.subset(np.flatnonzero(held_out))


def _folder_split(
    root: Path, folder: Path, class_names: list[str] | None, notes: list[str], by_position: bool = False
) -> tuple[Split, list[str]]:
    dataset, found = open_folder(folder)
    notes += found
    names = dataset.features["label"].names
    labels = dataset.data.column("label").to_numpy()
    mapping = map_labels(names, class_names, folder, by_position=by_position)
    place = os.path.realpath(folder), "" if folder == root else f"{folder.name}/"
    return Split(dataset, "image", mapping[labels], folder=place), class_names or names


def map_labels(
    found: list[str], class_names: list[str] | None, where, used=None, by_position: bool = False
) -> np.ndarray:
    """For each class that was found, its number in `class_names` (its own position when that is None).

    Args:
        used: the numbers that occur, when not all of `found` do; the others need not be known.
        by_position: as many classes under entirely other names (ImageNet's wnids and words) are the same classes.

    Raises:
        UserError: a class is not among `class_names`.
    """
    if class_names is None or list(found) == list(class_names):
        return np.arange(len(found))
    if by_position and len(found) == len(class_names) and not set(found) & set(class_names):
        return np.arange(len(found))
    position = {name: i for i, name in enumerate(class_names)}
    unknown = [found[i] for i in (range(len(found)) if used is None else used) if found[i] not in position]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise UserError(
            f"{where} has classes that training does not know: {unknown[0]}{more};"
            f" it knows {len(class_names)}, e.g. {', '.join(class_names[:3])}."
        )
    return np.array([position.get(name, -1) for name in found], np.int64)


def _choices() -> str:
    return ", ".join(f"{name}/" for name in VALIDATION_NAMES)
