"""Where images come from, behind one face: `Split.read(i)` gives the bytes of a file, `Split.labels[i]` its class."""

import hashlib
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .classes import match_classes, match_split
from .folder import open_folder
from .labels import Labels
from .listing import SCHEMA, DataListing, rows, rows_of_dataset, rows_of_files, sizes_of_files
from .names import one_spelling
from .pictures import BadPicture, read_file
from .splits import Fold, find_splits
from .survey import notes_on_copies


NO_IMAGE = {"bytes": None, "path": None}  # what a null in a column of images stands for


class Split:
    """Images and labels of a `datasets.Dataset` whose image column is not decoded.

    Args:
        dataset: with an `Image` column.
        image_column: its name.
        labels: int64, one per row of `dataset`: a class, or a row of `DataSource.label_sets`.
        rows: the rows that belong to this split; all by default.
        folder: where the files are, and what stands before their names in a listing; None for rows of a data set.
        name_column: text that names the images, as a list of them does.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        image_column: str,
        labels: np.ndarray,
        rows: np.ndarray | None = None,
        folder: tuple[str, str] | None = None,
        name_column: str | None = None,
    ):
        self._dataset = dataset
        self._name_column = name_column
        self._image_column = image_column
        self._rows = rows
        self._folder = folder
        self._by_class: tuple[np.ndarray, np.ndarray] | None = None
        self.labels = np.asarray(labels, np.int64) if rows is None else np.asarray(labels, np.int64)[rows]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def folder(self) -> str | None:
        """Where the files are; None for rows of a data set."""
        return None if self._folder is None else self._folder[0]

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
        if self._name_column is not None:
            names = self._dataset.data.column(self._name_column)
            own = pa.array(np.arange(len(names)) if self._rows is None else self._rows)
            files = pc.struct_field(images, "path").take(own).to_pylist()
            return rows(split, names.take(own), self.labels, sizes_of_files(files))
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
        present: where `class_names` are a checkpoint's, the numbers of those that the data has, ascending.
        label_sets: uint8 (sets, classes) where an image has several labels: the labels of the splits are its rows.
    """

    class_names: list[str]
    train: Split | None
    val: Split | None
    notes: list[str] = field(default_factory=list)
    present: np.ndarray | None = None
    label_sets: np.ndarray | None = None

    def listing(self) -> DataListing:
        """What these images are, by name, label and size, as the disk says now."""
        splits = {"train": self.train, "val": self.val}
        tables = [images.listing(name) for name, images in splits.items() if images is not None]
        table = pa.concat_tables([SCHEMA.empty_table(), *tables]).combine_chunks()
        return DataListing(list(self.class_names), table, self.label_sets)

    def notes_on_copies(self, listing: DataListing) -> list[str]:
        """Sentences about images that are trained and validated on; `listing` is what `listing()` gave."""
        if not isinstance(self.train, Split) or not isinstance(self.val, Split):
            return []  # a stream, or nothing but validation
        sizes = listing.table["size"].to_numpy()
        return notes_on_copies(self.train, self.val, (sizes[: len(self.train)], sizes[len(self.train) :]))

    @classmethod
    def from_folder(
        cls,
        data_dir: str,
        val_fraction: float = 0.0,
        train: bool = True,
        class_names: list[str] | None = None,
        classes_by_position: bool = False,
        several: bool = False,
        val_split: str | None = None,
        fold: Fold | None = None,
    ) -> "DataSource":
        """`train/` and `val/` of class folders (see `find_splits`), or class folders to split by file name.

        Args:
            val_fraction: share of each class held out when there is no validation folder.
            train: False opens the validation images only; without a `val/` these are all of `data_dir`.
            class_names: a checkpoint's, whose label order is kept; folders may then be a part of them.
            classes_by_position: where the folders have other names, take both in order.
            several: images could have several labels, and each has one.
            val_split: the folder of the validation images, where it has another name.
            fold: of the training images, to validate on.

        Raises:
            UserError: one sentence about what is wrong with the folder.
        """
        splits = find_splits(data_dir, train=train, val_fraction=val_fraction, val_split=val_split, fold=fold)
        root, train_dir, val_dir = Path(os.path.expanduser(data_dir)), splits.train, splits.val
        labeller = Labeller(class_names, classes_by_position)
        labeller.notes += splits.notes
        if train_dir is None:
            assert val_dir is not None
            return labeller.source(None, _folder_split(root, val_dir, labeller, several))
        training = _folder_split(root, train_dir, labeller, several)
        names = labeller.class_names
        if len(names) < 2:
            raise UserError(f"{train_dir} has a single class folder, {names[0]}; a classifier needs at least two.")
        if val_dir is not None:
            validation = _folder_split(root, val_dir, labeller, several)
        else:
            training, validation = split_by_name(training, val_fraction, labeller.groups, fold)
        return labeller.source(training if train else None, validation)


def split_by_name(
    split: Split, fraction: float, groups: Mapping[int, str] | None, fold: Fold | None = None
) -> tuple[Split, Split]:
    """Training and validation part: of each class, the share of files whose hashed names come first.

    A file stays where it is when others are added or removed, but for a few at the border. A class of two or more
    images has at least one on each side.

    Args:
        groups: the data's own name of each label; None takes that share of all files, as where an image has several
            classes.
        fold: the validation part instead: one of so many runs of the hashed names in order. Every file is in one of
            them, and they are of equal length but for one file, in each class and in all: what a class has over goes
            to the folds where that of the class before it, by name, ended.

    Raises:
        UserError: there are fewer images than folds, or no part can be held out.
    """
    if fold is not None and fold.of > len(split):
        raise UserError(f"--folds {fold.of} is more than the {len(split):,} images there are; lower it.")
    hashes = np.empty(len(split), np.uint64)
    for index in range(len(split)):
        name = one_spelling(os.path.basename(split.name(index)))
        hashes[index] = int.from_bytes(hashlib.blake2b(os.fsencode(name), digest_size=8).digest(), "big")
    ranks = np.zeros(len(split), np.int64)
    if groups is not None:  # by name: a checkpoint may number the classes otherwise
        labels, places = np.unique(split.labels, return_inverse=True)
        words = [one_spelling(groups[label]) for label in labels.tolist()]
        ranks = np.argsort(sorted(range(len(words)), key=words.__getitem__))[places]
    order = np.lexsort((hashes, ranks))
    held_out = np.zeros(len(split), bool)
    _, starts, counts = np.unique(ranks[order], return_index=True, return_counts=True)
    for start, count in zip(starts, counts):
        if fold is not None:
            lengths = np.bincount(np.arange(start, start + count) % fold.of, minlength=fold.of)
            first, stop = lengths[: fold.number - 1].sum(), lengths[: fold.number].sum()
        else:
            first, stop = 0, min(max(round(fraction * count), 1), count - 1)
        held_out[order[start + first : start + stop]] = True
    if not held_out.any():
        raise UserError(
            f"--val_fraction {fraction:g} holds out no image: every class has a single one; add images, or a val/"
            " folder."
        )
    return split.subset(np.flatnonzero(~held_out)), split.subset(np.flatnonzero(held_out))


class Labeller:
    """Gives all splits of a data set the same classes, and one table of label sets.

    Args:
        class_names: a checkpoint's, whose label order is kept; the classes are those of the first split without it.
        classes_by_position: where the data has other names, take both in order.

    Attributes:
        class_names: in label order, once a split is labelled.
        notes: sentences about the classes, and about images without a label.
        present: see [`DataSource`].
        groups: what the data calls the class of each label, for `split_by_name`; None where a label is a set of them.
    """

    def __init__(self, class_names: list[str] | None, classes_by_position: bool = False):
        self.class_names = class_names or []
        self.groups: dict[int, str] | None = None
        self.notes: list[str] = []
        self.present: np.ndarray | None = None
        self._of_a_checkpoint = class_names is not None
        self._by_position = classes_by_position
        self._sets: list[np.ndarray] = []

    @property
    def label_sets(self) -> np.ndarray | None:
        """uint8 (sets, classes) of all splits so far, or None where an image has one label."""
        return np.concatenate(self._sets) if self._sets else None

    def split(self, dataset: datasets.Dataset, image_column: str, labels: Labels, where: object, **place) -> Split:
        """The rows of `dataset` that have a label.

        Args:
            where: the data, for sentences.
            place: arguments of `Split`.

        Raises:
            UserError: no row has one, or it is of an unknown class.
        """
        rows = np.flatnonzero(labels.numbers >= 0)
        images = len(labels.numbers)
        if not images:
            raise UserError(f"{where} is empty.")
        if not len(rows):
            raise UserError(
                f"{where} has no labels: they are missing (null, blank or -1) for all of its {images:,} images."
            )
        left_out = images - len(rows)
        if left_out:
            have = "has" if left_out == 1 else "have"
            self.notes.append(f"{left_out:,} of {images:,} images of {where} {have} no label: left out.")
        used = np.unique(labels.numbers[rows])
        if labels.sets is not None:
            used = np.flatnonzero(labels.sets[used].any(axis=0))
        mapping = self.mapping(labels.names, where, used)
        numbers = labels.numbers
        if labels.sets is None:
            numbers = np.where(numbers >= 0, mapping[numbers], -1)
            self.groups = dict(zip(mapping.tolist(), labels.names))
        else:
            sets = np.zeros((len(labels.sets), len(self.class_names)), np.uint8)
            sets[:, mapping[used]] = labels.sets[:, used]
            numbers = numbers + sum(map(len, self._sets))
            self._sets.append(sets)
        return Split(dataset, image_column, numbers, rows if left_out else None, **place)

    def mapping(self, found: list[str], where: object, used: np.ndarray | None = None) -> np.ndarray:
        """For each class of a split its number in `class_names`.

        Args:
            used: the numbers that occur, when not all of `found` do; the others need not be known.

        Raises:
            UserError: see [`match_classes`] and [`match_split`].
        """
        if not self.class_names:
            self.class_names = list(found)
            twins = [names for names in _by_case(found).values() if len(names) > 1]
            if twins:
                self.notes.append(f"classes of {where} that differ only in case: {' and '.join(twins[0])}.")
            return np.arange(len(found))
        if self._of_a_checkpoint:
            match = match_classes(found, self.class_names, where, self._by_position, used)
        else:
            match = match_split(found, self.class_names, where, used)
        if match.note and match.note not in self.notes:
            self.notes.append(match.note)
        if self._of_a_checkpoint and self.present is None:
            self.present = match.present()
        return match.numbers

    def require_variety(self, training: Split, where: str) -> None:
        """Raises `UserError` where all training images have the same label or labels."""
        if self._sets:
            sets = np.concatenate(self._sets)[np.unique(training.labels)]
            if len(training) > 1 and (sets == sets[0]).all():
                words = ", ".join(self.class_names[i] for i in np.flatnonzero(sets[0])) or "none"
                raise UserError(
                    f"all training images of {where} have the same labels, {words}; there is nothing to learn."
                )
        elif len(self.class_names) < 2:
            raise UserError(f"{where} has a single class, {self.class_names[0]}; a classifier needs at least two.")

    def source(self, train: Split | None, val: Split) -> "DataSource":
        """The splits, once both are labelled."""
        return DataSource(self.class_names, train, val, self.notes, self.present, self.label_sets)


def _by_case(names: list[str]) -> dict[str, list[str]]:
    spellings: dict[str, list[str]] = {}
    for name in names:
        spellings.setdefault(name.casefold(), []).append(name)
    return spellings


def _folder_split(root: Path, folder: Path, labeller: Labeller, several: bool) -> Split:
    dataset, found = open_folder(folder)
    labeller.notes += found
    names = dataset.features["label"].names
    sets = np.eye(len(names), dtype=np.uint8) if several else None
    labels = Labels(names, dataset.data.column("label").to_numpy(), sets)
    place = os.path.realpath(folder), "" if folder == root else f"{folder.name}/"
    split = labeller.split(dataset, "image", labels, folder, folder=place)
    if several:  # an image has one all the same
        labeller.groups = dict(enumerate(names))
    return split
