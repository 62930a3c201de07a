"""Lists of images and labels: `--labels FILE`, and the metadata.csv or metadata.jsonl of a folder of images."""

import csv
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError, first_line, printable
from .folder import Tree, folders_in, holds_images
from .labels import (
    MULTI,
    PREFERRED_IMAGES,
    PREFERRED_LABELS,
    SINGLE,
    Columns,
    Labels,
    choose,
    preferred_first,
    read_labels,
)
from .listing import UNKNOWN, sizes_of_files
from .names import is_image, role_of
from .source import DataSource, Labeller, Split, split_by_name
from .splits import choose_splits, existing_folder


METADATA = "metadata.csv", "metadata.jsonl"  # of a folder of images, as `datasets` has it
_IMAGE_NAMES = (*PREFERRED_IMAGES, "path", "filename", "filepath", "file", "file_path", "image_path", "img")
_DELIMITERS = ",", ";", "\t"
_LARGEST = 1 << 30  # bytes of a list; that of ImageNet's 1.28 million images has 70 million
_SHOWN = 1000  # rows that say whether a column holds names of images


@dataclass(frozen=True)
class ImageList:
    """A list that has been read.

    Attributes:
        where: for sentences, e.g. "--labels list.csv".
        cells: a column of text each, but for those of a .jsonl, which have the types that they have there.
        has_header: whether the columns have names of their own.
        paths: of the images, absolute.
        names: of the images, as the list has them.
        splits: of the rows, or None.
        image_column: which one `names` is.
        split_column: which one `splits` is, if any.
        notes: sentences about how it was read.
    """

    where: str
    cells: pa.Table
    has_header: bool
    paths: list[str]
    names: list[str]
    splits: list[str] | None
    image_column: str
    split_column: str | None
    notes: list[str]


def open_list(
    images: ImageList,
    columns: Columns,
    val_fraction: float = 0.0,
    train: bool = True,
    class_names: list[str] | None = None,
    val_split: str | None = None,
) -> DataSource:
    """The images of a list; rows of a column `split`, or in folders called train and val, are splits.

    Args:
        columns: which ones are meant, and what a cell holds.
        train, val_fraction, val_split, class_names: as for `DataSource.from_folder`. Without splits and `val_fraction`
            all images are measured.

    Raises:
        UserError: it cannot be meant, in one sentence.
    """
    labeller = Labeller(class_names, columns.classes_by_position)
    labeller.notes += images.notes
    label_columns = _label_columns(images, columns, labeller.notes)
    _note_missing(images, labeller.notes)

    def split(name: str | None) -> Split:
        rows = np.arange(len(images.names))
        if name is not None:
            assert images.splits is not None
            rows = np.flatnonzero(np.array(images.splits, object) == name)
        where = images.where if name is None else f"{name} of {images.where}"
        found = {column: (None, images.cells.column(column).take(pa.array(rows))) for column in label_columns}
        labels = read_labels(found, columns, where)
        paths = [images.paths[row] for row in rows]
        labels, kept = _each_image_once(labels, paths, columns, where, labeller.notes)
        names = pa.array([images.names[row] for row in rows[kept]], pa.string())
        files = pa.array([paths[row] for row in kept], pa.string())
        pictures = pa.StructArray.from_arrays([pa.nulls(len(files), pa.binary()), files], ["bytes", "path"])
        table = pa.table({"image": pictures, "name": names})
        dataset = datasets.Dataset(datasets.table.InMemoryTable(table))
        return labeller.split(dataset, "image", labels, where, name_column="name")

    if images.splits is None:
        if val_split is not None:
            raise UserError(
                f"--val_split {val_split}: {images.where} has no column `split`, and no folders train/ and val/."
            )
        if not train and not val_fraction:
            return labeller.source(None, split(None))
        if not val_fraction:
            raise UserError(
                f"{images.where} does not say what to validate on: add a column `split` of train and val, or hold out"
                " a share with --val_fraction 0.1."
            )
        training, held_out = split(None), None
    else:
        names = sorted(set(images.splits))
        chosen = choose_splits(names, images.where, train=train, val_fraction=val_fraction, val_split=val_split)
        labeller.notes += chosen.notes
        others = [name for name in names if name not in chosen and role_of(name) != "train"]
        if others:
            count = sum(map(images.splits.count, others))
            words = ", ".join(printable(name) if name else "none" for name in others)
            labeller.notes.append(f"{count:,} images of {images.where} are of other splits: passed over ({words}).")
        if chosen.train is None:
            return labeller.source(None, split(chosen.val))
        training = split(chosen.train)
        held_out = None if chosen.val is None else split(chosen.val)
    if train:
        labeller.require_variety(training, images.where)
    if held_out is None:
        training, held_out = split_by_name(training, val_fraction, by_class=labeller.label_sets is None)
    return labeller.source(training if train else None, held_out)


def read_list(file: str, data_dir: str | None, columns: Columns) -> ImageList:
    """`--labels FILE`. Its paths are below `data_dir`, or without one below its own folder.

    Raises:
        UserError: it cannot be read, or has no column of images.
    """
    root = Path(os.path.abspath(file)).parent if data_dir is None else existing_folder(data_dir)
    if not os.path.exists(file) and os.path.isfile(root / file):
        raise UserError(f"--labels {file} does not exist; say --labels {root / file}, which does.")
    return _listed(f"--labels {file}", [("", *_cells(file, f"--labels {file}"))], root, columns)


def find_metadata(root: Path) -> list[tuple[str, Path]]:
    """The metadata.csv or metadata.jsonl of a folder of images, or those of its splits, each with its folder's name.

    Raises:
        UserError: there is one too many.
    """
    below = [entry.name for entry in os.scandir(root) if role_of(entry.name) and entry.is_dir()]
    found = [
        (name, root / name / file)
        for name in ["", *sorted(below)]
        for file in METADATA
        if (root / name / file).is_file()
    ]
    for (one, first), (other, second) in zip(found, found[1:]):
        if one == other or not one:
            raise UserError(f"{first} and {second} are two lists of images; remove one, or name one with --labels.")
    return found


def read_metadata(root: Path, found: list[tuple[str, Path]], columns: Columns) -> ImageList | None:
    """What `find_metadata` found; None where the folder's class folders say it all.

    Raises:
        UserError: a list cannot be read, or says one thing and the class folders another.
    """
    where = str(found[0][1])
    parts = [(name, *_cells(os.fspath(path), str(path))) for name, path in found]
    beside = _class_folders(root)
    labelled = columns.label_column or [
        name for _, cells, *_ in parts for name in cells.column_names if name.casefold() in PREFERRED_LABELS
    ]
    if len(beside) > 1 and not labelled:
        return None
    images = _listed(where, parts, root, columns)
    images.notes.insert(0, f"the labels are those of {where}.")
    if len(beside) < 2:
        return images
    labels = images.cells.column(labelled[0])
    if len(labelled) == 1 and labels.to_pylist() == [os.path.basename(os.path.dirname(path)) for path in images.paths]:
        return None
    raise UserError(
        f"{root} has class folders ({beside[0]}/, {beside[1]}/, …) and {where}, which says something else; move the"
        f" list elsewhere, or train on what it says with --labels {where}."
    )


def _class_folders(root: Path) -> list[str]:
    below = folders_in(Tree(str(root)))
    places = [name for name in below if role_of(name)] or [""]
    names = {each for place in places for each in folders_in(Tree(str(root / place))) if not role_of(each)}
    return sorted(name for name in names if any(holds_images(root / place / name) for place in places))


def _cells(file: str, where: str) -> tuple[pa.Table, bool, list[str]]:
    """The columns, whether they have names, and notes."""
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where} is no file; name a CSV file of images and labels.")
        if status.st_size > _LARGEST:
            raise UserError(f"{where} has {status.st_size:,} bytes, more than {_LARGEST:,}.")
        if file.endswith(".jsonl"):
            return _from_json(file), True, []
        return _from_csv(file, where)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is no text in UTF-8; save it as that.") from None
    except (ValueError, pa.ArrowException, RecursionError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {printable(first_line(error))}") from None


def _from_json(file: str) -> pa.Table:
    with open(file, encoding="utf-8-sig") as lines:
        rows = [json.loads(line) for line in lines if line.strip()]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError('each line must be an object, such as {"file_name": "1.jpg", "label": "cat"}')
    return pa.Table.from_struct_array(pa.array(rows))


def _from_csv(file: str, where: str) -> tuple[pa.Table, bool, list[str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        first = next((line for line in lines if line.strip()), "")
    rows = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    fitting = [delimiter for delimiter, cells in rows.items() if len(cells) > 1]
    if not fitting:
        raise UserError(
            f"{where} has one column, or none: {printable(first.strip()[:80])!r}; it needs images and labels, with a"
            " comma, a semicolon or a tab between."
        )
    # "1.jpg,cat;dog" has two: the one is right that leaves the image's name alone.
    delimiter, *others = [
        each for each in fitting if any(map(is_image, filter(None, map(str.strip, rows[each]))))
    ] or fitting
    if others:
        raise UserError(
            f"{where} has both {delimiter!r} and {others[0]!r} in its first line; name the columns there, e.g."
            " path,label."
        )
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        cells = []
        for row in filter(None, reader):
            if len(row) != len(rows[delimiter]):
                raise UserError(
                    f"{where} has {len(row)} cells in line {reader.line_num}, but {len(rows[delimiter])} in the first"
                    " one; a cell that holds a comma or the like stands in quotes."
                )
            cells.append(row)
    has_header = not any(is_image(cell.strip()) for cell in cells[0] if cell.strip())
    names = [cell.strip() for cell in cells.pop(0)] if has_header else [str(i) for i in range(len(cells[0]))]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two columns called {printable(twice)!r}; rename one.")
    notes = [f"{where} is read with {delimiter!r} between its columns."] if delimiter != "," else []
    # As text: whatever looks like a number or like "nothing" may be the name of a class.
    columns = [pa.array(column, pa.string()) for column in zip(*cells)] or [pa.array([], pa.string())] * len(names)
    return pa.table(columns, names), has_header, notes


def _listed(where: str, parts: list[tuple[str, pa.Table, bool, list[str]]], root: Path, columns: Columns) -> ImageList:
    """The images of one list, or of one per split below `root`."""
    try:
        cells = pa.concat_tables([part[1] for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{where} and {parts[-1][0]}'s differ: {printable(first_line(error))}") from None
    if not len(cells):
        raise UserError(f"{where} lists no images.")
    image_column = _image_column(cells, columns.image_column, where)
    folders = [split for split, part, *_ in parts for _ in range(len(part))]
    names, paths, base = [], [], str(root)
    for number, (folder, name) in enumerate(zip(folders, cells.column(image_column).to_pylist())):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where} names no image in row {number + 1}; its column of images is {image_column}.")
        names.append(f"{folder}/{name.strip()}" if folder else name.strip())
        paths.append(os.path.normpath(os.path.join(base, names[-1])))
    splits: list[str] | None = folders
    split_column = None
    if len(parts) == 1 and not parts[0][0]:
        splits, split_column = _splits(cells, image_column, names, columns)
    notes = [note for _, _, _, each in parts for note in each]
    if split_column is not None and split_column.casefold() != "split":
        notes.append(f"the splits of {where} are its column {printable(split_column)}.")
    return ImageList(where, cells, parts[0][2], paths, names, splits, image_column, split_column, notes)


def _splits(
    cells: pa.Table, image_column: str, names: list[str], columns: Columns
) -> tuple[list[str] | None, str | None]:
    for column in cells.column_names:
        if column == image_column or column in columns.label_column or column.casefold() in PREFERRED_LABELS:
            continue
        if not pa.types.is_string(cells.column(column).type):
            continue
        values = [(value or "").strip() for value in pc.unique(cells.column(column)).to_pylist()]
        if column.casefold() == "split" or all(map(role_of, values)):
            return [(value or "").strip() for value in cells.column(column).to_pylist()], column
    first = [name.replace("\\", "/").removeprefix("./").split("/")[0] for name in names]
    roles = {role_of(name) for name in set(first)}
    return (first, None) if len(roles) > 1 and None not in roles else (None, None)


def _image_column(cells: pa.Table, wanted: str | None, where: str) -> str:
    names = cells.column_names
    if wanted is not None:
        return choose("--image_column", wanted, names, names, "images", where)
    texts = [name for name in names if pa.types.is_string(cells.column(name).type)]
    shown = {name: [cell for cell in cells.column(name).slice(0, _SHOWN).to_pylist() if cell] for name in texts}
    possible = [
        name for name, values in shown.items() if values and all(is_image(cell.strip() or " ") for cell in values)
    ]
    possible = possible or [name for name in texts if name.casefold() in _IMAGE_NAMES]
    return choose("--image_column", None, preferred_first(possible), names, "images", where)


def _label_columns(images: ImageList, columns: Columns, notes: list[str]) -> list[str]:
    taken = images.image_column, images.split_column
    possible = [name for name in images.cells.column_names if name not in taken]
    if columns.label_column:
        if not images.has_header:
            raise UserError(f"--label_column: {images.where} has no names of columns in its first line.")
        return [
            choose("--label_column", wanted, possible, possible, "labels", images.where)
            for wanted in columns.label_column
        ]
    named = preferred_first([name for name in possible if name.casefold() in PREFERRED_LABELS])
    if not images.has_header and len(possible) > 1:
        raise UserError(
            f"{images.where} has {len(images.cells.column_names)} columns and no names for them; write a first line"
            " such as path,label."
        )
    chosen = choose("--label_column", None, named or possible, possible, "labels", images.where)
    if not named and images.has_header:
        distinct = (
            len(set(images.cells.column(chosen).cast(pa.string()).to_pylist())) if _is_plain(images, chosen) else 0
        )
        if distinct == len(images.names) > 2:
            raise UserError(
                f"{images.where} has another value of {printable(chosen)} for every image, which are no classes; name"
                f" the column of labels with --label_column. Its columns: {', '.join(map(printable, possible))}."
            )
    if len(possible) > 1 or not named and images.has_header:
        notes.append(
            f"the labels of {images.where} are its column {printable(chosen)}; --label_column can name another."
        )
    return [chosen]


def _is_plain(images: ImageList, column: str) -> bool:
    return not pa.types.is_nested(images.cells.column(column).type)


def _note_missing(images: ImageList, notes: list[str]) -> None:
    """Refuses a list of files that are somewhere else; single ones that are not there are bad files like others."""
    absent = np.flatnonzero(sizes_of_files(images.paths) == UNKNOWN)
    for row in absent:  # written on Windows
        if os.sep == "/" and "\\" in images.names[row]:
            images.paths[row] = images.paths[row].replace("\\", "/")
    absent = absent[sizes_of_files([images.paths[row] for row in absent]) == UNKNOWN]
    if len(absent) == len(images.paths):
        raise UserError(
            f"none of the {len(images.paths):,} files of {images.where} is there, e.g. {printable(images.paths[0])};"
            " their paths are below --data_dir, or without it below the list's own folder."
        )
    if len(absent):
        are = "is" if len(absent) == 1 else "are"
        notes.append(
            f"{len(absent):,} of {len(images.paths):,} files of {images.where} {are} not there, e.g."
            f" {printable(images.names[absent[0]])}: counted as unreadable."
        )


def _each_image_once(
    labels: Labels, paths: list[str], columns: Columns, where: str, notes: list[str]
) -> tuple[Labels, np.ndarray]:
    """Joins the rows of one image; returns which rows are kept, and their labels.

    Raises:
        UserError: an image that may have one label has two.
    """
    if len(set(paths)) == len(paths):
        return labels, np.arange(len(paths))
    kept: dict[str, int] = {}
    numbers, sets = labels.numbers.copy(), None if labels.sets is None else list(labels.sets)
    for row, path in enumerate(paths):
        first = kept.setdefault(path, row)
        one, other = numbers[first], labels.numbers[row]
        if row == first or other < 0 or one == other:
            continue
        if one < 0:
            numbers[first] = other
        elif sets is not None:
            numbers[first] = len(sets)
            sets.append(sets[one] | sets[other])
        else:
            raise UserError(
                f"{where} gives {printable(path)} two labels, {printable(labels.names[one])} and"
                f" {printable(labels.names[other])}; keep one, or add --problem_type {MULTI}."
            )
    rows = np.array(list(kept.values()))
    joined = "joined" if columns.problem_type != SINGLE and sets is not None else "counted once"
    name = "names" if len(paths) - len(rows) == 1 else "name"
    notes.append(f"{len(paths) - len(rows):,} of {len(paths):,} rows of {where} {name} an image again: {joined}.")
    return Labels(labels.names, numbers[rows], None if sets is None else np.array(sets)), rows
