"""From a column of labels to classes, by one rule for lists in files and `datasets`.

No label, which leaves an image out, is: null, NaN, empty or blank text, and -1 where labels are whole numbers. Words
such as "nan", "None" or "NA" are classes. Where every word is a whole number, one with `.0` behind is the same without:
table programs write it so beside empty cells.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, did_you_mean, printable
from .names import one_spelling


MULTI, SINGLE = "multi_label_classification", "single_label_classification"
NO_LABEL = -1
# Which of several columns is meant; `cls` and `json` are WebDataset's, `file_name` a metadata.csv's.
PREFERRED_LABELS = ("label", "labels", "cls", "json.label", "json.labels")
PREFERRED_IMAGES = ("image", "file_name")
_JOINTS = ";", "|"  # what stands between labels in a cell, in public data sets
_ONE_OF_SEVERAL = {"0": 0, "1": 1, "false": 0, "true": 1, "": NO_LABEL, "nan": NO_LABEL, "-1": NO_LABEL}
_EACH = "of several --label_column each holds 0 or 1"
_WHOLE = re.compile(r"([+-]?[0-9]+)(\.0+)?")
_EXACT = 2**53  # above it not every whole number is a float


@dataclass(frozen=True)
class Columns:
    """Which columns hold images and labels, and how a cell is read; the fields are those of a recipe."""

    image_column: str | None = None
    label_column: tuple[str, ...] = ()
    label_separator: str | None = None
    problem_type: str | None = None
    classes_by_position: bool = False

    @classmethod
    def of(cls, recipe) -> "Columns":
        return cls(
            recipe.image_column,
            tuple(recipe.label_column),
            recipe.label_separator,
            recipe.problem_type,
            recipe.classes_by_position,
        )


ANY = Columns()  # those that are called so, or the only ones of their kind


@dataclass(frozen=True)
class Labels:
    """The labels of some rows.

    Attributes:
        names: the classes; sorted, or in the order of a `ClassLabel`.
        numbers: int64 (rows,), each row's class, or its label set; -1 is none.
        sets: uint8 (label sets, classes), 1 for the classes of a set; None where each image has one class.
    """

    names: list[str]
    numbers: np.ndarray
    sets: np.ndarray | None = None

    def part(self, rows: np.ndarray) -> "Labels":
        """Of these rows, with the classes that they have."""
        own, numbers = np.unique(np.append(self.numbers[rows], NO_LABEL), return_inverse=True)
        own, numbers = own[1:], numbers.reshape(-1)[:-1] - 1  # the first is NO_LABEL
        if self.sets is None:
            return Labels([self.names[number] for number in own], numbers)
        used = np.flatnonzero(self.sets[own].any(axis=0))
        return Labels([self.names[number] for number in used], numbers, self.sets[own][:, used])


def choose(flag: str, wanted: str | None, possible: list[str], all_columns: list[str], kind: str, where: str) -> str:
    """The column that is meant.

    Args:
        flag: that names it, and `wanted`: what it says.
        possible: the columns that could be meant, those preferred first that are called so.
        kind: what they hold, for sentences.

    Raises:
        UserError: there is none, no such one, or several.
    """
    listed = ", ".join(map(printable, all_columns)) or "none"
    if wanted is not None:
        if wanted not in possible:
            what = f"holds no {kind}" if wanted in all_columns else "is no column"
            hint = did_you_mean(wanted, possible)
            raise UserError(f"{flag} {wanted} {what} of {where}.{hint} Its columns: {listed}.")
        return wanted
    if not possible:
        raise UserError(f"{where} has no column of {kind}; name one with {flag}. Its columns: {listed}.")
    if len(possible) > 1 and possible[0].casefold() not in (*PREFERRED_LABELS, *PREFERRED_IMAGES):
        raise UserError(
            f"{where} has several columns of {kind}, {', '.join(map(printable, possible))}; say which with {flag}."
        )
    return possible[0]


def preferred_first(names: list[str]) -> list[str]:
    """The same columns, those that are chosen without a flag in front."""
    order = [*PREFERRED_LABELS, *PREFERRED_IMAGES]
    return sorted(names, key=lambda name: order.index(name.casefold()) if name.casefold() in order else len(order))


def read_labels(columns: Mapping[str, tuple[Any, pa.ChunkedArray]], how: Columns, where: str) -> Labels:
    """The labels of a data set's rows.

    Args:
        columns: by name, the `datasets` feature and the values; several are several classes, of 0 and 1 each.

    Raises:
        UserError: they are no labels, or could be read in two ways.
    """
    if len(columns) > 1:
        return _of_columns(columns, where)
    ((name, (feature, column)),) = columns.items()
    what = f"the column {printable(name)} of {where}"
    kind = column.type
    if _is_list(kind):
        if how.label_separator:
            raise UserError(f"--label_separator: {what} holds lists, which need none.")
        return _of_lists(feature, column, how, what)
    single = _classes(feature, column, what)
    separates = how.label_separator and any(how.label_separator in name for name in single.names)
    if how.problem_type != SINGLE and not separates:
        _refuse_joined(single, what)
    if how.label_separator:
        return _of_cells(single, how, what)
    if how.problem_type == MULTI:
        return Labels(single.names, single.numbers, np.eye(len(single.names), dtype=np.uint8))
    return single


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _classes(feature: Any, column: pa.ChunkedArray | pa.Array, what: str) -> Labels:
    """One class per row."""
    kind = column.type
    if isinstance(feature, datasets.ClassLabel):
        numbers = pc.fill_null(column, -1).to_numpy().astype(np.int64)
        if len(numbers) and not -1 <= numbers.min() <= numbers.max() < len(feature.names):
            wrong = numbers.max() if numbers.max() >= len(feature.names) else numbers.min()
            raise UserError(f"{what} has the label {wrong}, and names for {len(feature.names)} classes only.")
        return Labels(list(feature.names), numbers)
    column = _plain(column)
    kind = column.type
    if pa.types.is_floating(kind):  # whole numbers with gaps: pandas has no others
        column = pc.if_else(pc.is_nan(column), None, column)
        largest = pc.max(pc.abs(column)).as_py()
        if largest is not None and largest > _EXACT:
            raise UserError(f"{what} holds {largest:g} or its negative; the numbers of classes are at most {_EXACT:,}.")
        if pc.all(pc.equal(column, pc.floor(column))).as_py() is False:
            raise UserError(f"{what} holds {kind}, no classes: they should be a ClassLabel, whole numbers or words.")
        column = column.cast(pa.int64())
    elif not (pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind) or is_text(kind)):
        raise UserError(f"{what} holds {kind}, no classes: they should be a ClassLabel, whole numbers or words.")
    cells = column.cast(pa.string())
    cells = cells.combine_chunks() if isinstance(cells, pa.ChunkedArray) else cells
    found = cells.dictionary_encode()
    return _sorted([one_spelling(str(word).strip()) for word in found.dictionary.to_pylist()], found.indices, what)


def _plain(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Without a dictionary, and without half floats, for which Arrow has no functions."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    return column.cast(pa.float32() if pa.types.is_float16(kind) else kind)


def _sorted(words: list[str], indices: pa.Array, what: str) -> Labels:
    """Classes by their words, of which blank ones are none; two that differ in blanks around them are one."""
    if all(_WHOLE.fullmatch(word) for word in words if word):
        words = [word.split(".")[0] for word in words]
        negative = sorted(word for word in words if re.fullmatch("-0*[1-9][0-9]*", word))
        if beyond := [word for word in negative if not re.fullmatch("-0*1", word)]:
            raise UserError(f"{what} has the label {beyond[-1]}; whole numbers count classes from 0, and -1 is none.")
        words = ["" if word in negative else word for word in words]
    names = sorted({word for word in words if word})
    place = {name: number for number, name in enumerate(names)}
    numbers = np.array([place.get(word, -1) for word in words] + [-1], np.int64)
    return Labels(names, numbers[pc.fill_null(indices, len(words)).to_numpy(zero_copy_only=False)])


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _refuse_joined(labels: Labels, what: str) -> None:
    """Raises `UserError` for cells that look like several labels each, when nobody said what they are."""
    known = set(labels.names)
    counts = np.bincount(labels.numbers[labels.numbers >= 0], minlength=len(labels.names))
    for joint in _JOINTS:
        joined = [i for i, name in enumerate(labels.names) if joint in name]
        parts_known = any(known.issuperset(part.strip() for part in labels.names[i].split(joint)) for i in joined)
        if joined and (parts_known or counts[joined].sum() * 2 > counts.sum()):
            raise UserError(
                f"{what} holds {printable(labels.names[joined[0]])!r}: if these are several labels, add"
                f" --label_separator '{joint}'; if it is one, add --problem_type {SINGLE}."
            )


def _of_cells(single: Labels, how: Columns, what: str) -> Labels:
    """Several labels in a cell: a list of them in each distinct cell."""
    parts = [[part.strip() for part in cell.split(how.label_separator) if part.strip()] for cell in single.names]
    labels = _of_lists(None, pa.array(parts, pa.list_(pa.string())), how, what)
    return Labels(labels.names, np.append(labels.numbers, NO_LABEL)[single.numbers], labels.sets)


def _as_sets(numbers: np.ndarray, members: list[tuple], names: list) -> tuple[np.ndarray, np.ndarray]:
    place = {name: number for number, name in enumerate(names)}
    sets = np.zeros((len(members), len(names)), np.uint8)
    for number, each in enumerate(members):
        sets[number, [place[name] for name in each]] = 1
    return numbers, sets


def _of_lists(feature: Any, column: pa.ChunkedArray, how: Columns, what: str) -> Labels:
    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    inner = _classes(getattr(feature, "feature", feature), pc.list_flatten(column), what)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    ends = np.cumsum(lengths)
    null = pc.is_null(column).to_numpy(zero_copy_only=False)
    numbers = np.empty(len(column), np.int64)
    place: dict[tuple, int] = {}
    for row, (end, length) in enumerate(zip(ends.tolist(), lengths.tolist())):
        own = inner.numbers[end - length : end].tolist()
        if null[row] or -1 in own:
            numbers[row] = -1
            continue
        if len(set(own)) < length and not how.label_separator:
            twice = inner.names[next(number for number in own if own.count(number) > 1)]
            raise UserError(
                f"{what} has a list in which {printable(twice)} stands twice; a list names the classes of its image,"
                " and is no row of 0 and 1."
            )
        numbers[row] = place.setdefault(tuple(sorted(set(own))), len(place))
    members = list(place)
    if how.problem_type == SINGLE:
        if any(len(own) != 1 for own in members):
            raise UserError(f"--problem_type {SINGLE}: {what} has lists of none or several labels.")
        return Labels(inner.names, np.array([own for (own,) in members] + [-1], np.int64)[numbers])
    numbers, sets = _as_sets(numbers, members, list(range(len(inner.names))))
    return Labels(inner.names, numbers, sets)


def _of_columns(columns: Mapping[str, tuple[Any, pa.ChunkedArray]], where: str) -> Labels:
    """A class per column, which says of each row 1 or 0; a row with an empty cell has no label."""
    names = sorted(columns)
    marks = np.empty((len(names), len(columns[names[0]][1])), np.int64)
    for row, name in enumerate(names):
        column = _plain(columns[name][1])
        if pa.types.is_nested(column.type) or pa.types.is_binary(column.type):
            raise UserError(f"the column {printable(name)} of {where} holds {column.type}; {_EACH}.")
        found = column.cast(pa.string()).combine_chunks().dictionary_encode()
        words = [re.sub(r"\.0+$", "", str(word).strip().lower()) for word in found.dictionary.to_pylist()]
        for word in words:
            if word not in _ONE_OF_SEVERAL:
                raise UserError(f"the column {printable(name)} of {where} holds {printable(word)!r}; {_EACH}.")
        values = np.array([_ONE_OF_SEVERAL[word] for word in words] + [NO_LABEL], np.int64)
        marks[row] = values[pc.fill_null(found.indices, len(words)).to_numpy(zero_copy_only=False)]
    sets, numbers = np.unique(marks.T, axis=0, return_inverse=True)
    numbers = np.where((marks < 0).any(axis=0), -1, numbers.reshape(-1))
    return Labels(names, numbers.astype(np.int64), (sets > 0).astype(np.uint8))
