"""Lists of images and labels: `--labels FILE`, and the metadata.csv or metadata.jsonl of a folder of images."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..cli import say
from ..errors import UserError, first_line, printable
from .cells import read_cells
from .folder import Tree, folders_in, holds_images, list_images
from .labels import (
    MULTI,
    PREFERRED_IMAGES,
    PREFERRED_LABELS,
    SINGLE,
    Columns,
    Labels,
    choose,
    is_text,
    preferred_first,
    read_labels,
)
from .listing import UNKNOWN, sizes_of_files
from .names import as_on_disk, is_image, one_spelling, role_of
from .source import DataSource, Labeller, Split, split_by_name
from .splits import Fold, choose_splits, existing_folder


METADATA = "metadata.csv", "metadata.jsonl"  # of a folder of images, as `datasets` has it
_IMAGE_NAMES = (*PREFERRED_IMAGES, "path", "filename", "filepath", "file", "file_path", "image_path", "img")
_NO_SPLIT = "rows without a split"
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
    fold: Fold | None = None,
) -> DataSource:
    """The images of a list; rows of a column `split`, or in folders called train and val, are splits.

    Args:
        columns: which ones are meant, and what a cell holds.
        train, val_fraction, val_split, fold, class_names: as for `DataSource.from_folder`. Without splits and a part
            to hold out all images are measured.

    Raises:
        UserError: it cannot be meant, in one sentence.
    """
    labeller = Labeller(class_names, columns.classes_by_position)
    labeller.notes += images.notes
    label_columns = _label_columns(images, columns, labeller.notes)
    _note_missing(images, labeller.notes)
    # Once for all splits, so that no word means one thing here and another there.
    every = read_labels({name: (None, images.cells.column(name)) for name in label_columns}, columns, images.where)

    def split(name: str | None) -> Split:
        rows = np.arange(len(images.names))
        if name is not None:
            assert images.splits is not None
            rows = np.flatnonzero(np.array(images.splits, object) == name)
        where = images.where if name is None else f"{name} of {images.where}"
        labels = every.part(rows) if len(label_columns) == 1 else replace(every, numbers=every.numbers[rows])
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
        if not train and not val_fraction and not fold:
            return labeller.source(None, split(None))
        if not val_fraction and not fold:
            raise UserError(
                f"{images.where} does not say what to validate on: add a column `split` of train and val, or hold out"
                " a share with --val_fraction 0.1."
            )
        training, held_out = split(None), None
    else:
        names = sorted(set(images.splits))
        chosen = choose_splits(
            names, images.where, train=train, val_fraction=val_fraction, val_split=val_split, fold=fold
        )
        labeller.notes += chosen.notes
        others = [name for name in names if name not in chosen and role_of(name) != "train" and not fold]
        if others:
            count, words = sum(map(images.splits.count, others)), ", ".join(map(printable, others))
            labeller.notes.append(f"{count:,} images of {images.where} are of other splits: passed over ({words}).")
        if chosen.train is None:
            return labeller.source(None, split(chosen.val))
        training, held_out = split(chosen.train), None if chosen.val is None else split(chosen.val)
    if train:
        labeller.require_variety(training, images.where)
    if held_out is None:
        training, held_out = split_by_name(training, val_fraction, labeller.groups, fold)
    return labeller.source(training if train else None, held_out)


def read_list(file: str, data_dir: str | None, columns: Columns) -> ImageList:
    """`--labels FILE`. Its paths are below `data_dir`, or without one below its own folder.

    Raises:
        UserError: it cannot be read, or has no column of images.
    """
    root = Path(os.path.abspath(file)).parent if data_dir is None else existing_folder(data_dir)
    if not os.path.exists(file) and os.path.isfile(root / file):
        raise UserError(f"--labels {file} does not exist; say --labels {root / file}, which does.")
    return _listed(f"--labels {file}", [("", *read_cells(file, f"--labels {file}"))], root, columns)


def find_metadata(root: Path) -> list[tuple[str, Path]]:
    """The metadata.csv or metadata.jsonl of a folder of images, or those of its splits, each with its folder's name.

    Raises:
        UserError: there is one too many.
    """
    below = [entry.name for entry in os.scandir(root) if role_of(entry.name) and entry.is_dir()]
    found = []
    for name in ["", *sorted(below)]:
        try:
            files = sorted(os.listdir(root / name))
        except OSError as error:
            raise UserError(f"cannot list {root / name}: {error.strerror}.") from None
        found += [(name, root / name / file) for file in files if file.lower() in METADATA]
    found = [(name, path) for name, path in found if path.is_file()]
    for (one, first), (other, second) in zip(found, found[1:]):
        if one == other or not one:
            raise UserError(f"{first} and {second} are two lists of images; remove one, or name one with --labels.")
    return found


def read_metadata(root: Path, found: list[tuple[str, Path]], columns: Columns) -> ImageList | None:
    """What `find_metadata` found; None where the folder's class folders say it all.

    Raises:
        UserError: a list cannot be read, or says one thing and the class folders another.
    """
    where = str(found[0][1]) if len(found) == 1 else f"{found[0][1].name} in the splits of {root}"
    folders = _class_folders(root)
    several = len({folder.name for folder in folders}) > 1
    try:
        # One without labels may be that of a split that nobody uses.
        parts = [(name, *read_cells(os.fspath(path), str(path), alone=True)) for name, path in found]
        labelled = columns.label_column or [
            name for _, cells, *_ in parts for name in cells.column_names if name.casefold() in PREFERRED_LABELS
        ]
        if several and not labelled:
            return None
        images = _listed(where, parts, root, columns)
    except UserError as error:  # a table about something else
        if not several or columns.label_column or columns.image_column:
            raise
        say(f"passed over, since class folders name the classes: {error}")
        return None
    images.notes.insert(0, f"the labels are those of {where}.")
    if not several or not set(labelled).issubset(images.cells.column_names):
        return images
    listed = {name for name, _ in found}
    inside = [folder for folder in folders if listed == {""} or folder.parts[0] in listed]
    beside = sorted({folder.parts[0] for folder in folders if folder not in inside})
    held = {one_spelling(os.path.normpath(path)) for folder in inside for path in list_images(root / folder)[0]}
    paths = [one_spelling(path) for path in images.paths]
    names = [os.path.basename(os.path.dirname(path)) for path in paths]
    labels = images.cells.column(labelled[0]).to_pylist()
    agrees = len(set(labelled)) == 1 and [one_spelling(_word(label)) for label in labels] == names
    if agrees and images.split_column is None and held == set(paths):
        return None
    if beside and not {"train", "val"} <= set(map(role_of, listed)):
        raise UserError(
            f"{found[0][1]} lists images, and {root / beside[0]} has class folders and no list; add one there, or move"
            " what is listed into class folders."
        )
    if beside:
        images.notes.append(f"passed over in {root}: {', '.join(f'{name}/' for name in beside)}, which has no list.")
    if held and not agrees:
        mend = f", or train on what it says with --labels {where}" if len(found) == 1 else ""
        raise UserError(
            f"{root} has class folders ({inside[0]}/, …) and {where}, which says something else; move the list"
            f" elsewhere{mend}."
        )
    if left_out := sorted(held.difference(paths)):
        images.notes.append(f"{len(left_out):,} images of {root} are not in {where}: left out, e.g. {left_out[0]}.")
    return images


def _class_folders(root: Path) -> list[Path]:
    """Below `root` or its splits, as paths from there."""
    places = [name for name in folders_in(Tree(str(root))) if role_of(name)] or [""]
    found = [Path(place, name) for place in places for name in folders_in(Tree(str(root / place))) if not role_of(name)]
    return sorted(folder for folder in found if holds_images(root / folder))


def _listed(where: str, parts: list[tuple[str, pa.Table, bool, list[str]]], root: Path, columns: Columns) -> ImageList:
    """The images of one list, or of one per split below `root`."""
    try:
        cells = pa.concat_tables([part[1] for part in parts], promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"{where} differ in their columns: {printable(first_line(error))}") from None
    if not len(cells):
        raise UserError(f"{where} lists no images.")
    notes = [note for _, _, _, each in parts for note in each]
    image_column = _image_column(cells, columns.image_column, where, notes)
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
        split_column = _split_column(cells, image_column, columns, where, notes)
        if split_column is None:
            splits = _split_folders(paths, where, notes)
        else:
            splits = [_word(cell) or _NO_SPLIT for cell in cells.column(split_column).to_pylist()]
    return ImageList(where, cells, parts[0][2], paths, names, splits, image_column, split_column, notes)


def _word(cell: object) -> str:
    return "" if cell is None else str(cell).strip()


def _split_column(cells: pa.Table, image_column: str, columns: Columns, where: str, notes: list[str]) -> str | None:
    """The one called `split`, or else the only one that speaks of nothing but two splits or more."""
    named, fitting = [], []
    for column in cells.column_names:
        kind = cells.column(column).type
        if column in (image_column, *columns.label_column) or column.casefold() in PREFERRED_LABELS:
            continue
        if pa.types.is_nested(kind) or column.casefold() != "split" and not is_text(kind):
            continue
        values = {_word(cell) for cell in pc.unique(cells.column(column)).to_pylist()} - {""}
        roles = set(map(role_of, values))
        if column.casefold() == "split" and values:
            named.append(column)
        elif len(roles - {None}) > 1 and None not in roles:
            fitting.append(column)
        elif len(roles - {None}) > 1:
            notes.append(
                f"the column {printable(column)} of {where} has splits in it, and other things too: it is not used; one"
                " called `split` is."
            )
    found = named or fitting
    if len(found) > 1:
        raise UserError(
            f"{where} has several columns of splits, {', '.join(map(printable, found))}; call the right one `split`."
        )
    if fitting and not named:
        notes.append(f"the splits of {where} are its column {printable(fitting[0])}.")
    return found[0] if found else None


def _split_folders(paths: list[str], where: str, notes: list[str]) -> list[str] | None:
    """The splits of images that all lie in folders of such names, equally deep below what they share."""
    folders = [path.replace("\\", "/").rpartition("/")[0] for path in paths]
    parts = {folder: folder.split("/") for folder in set(folders)}
    shared = len(os.path.commonprefix(list(parts.values())))
    below = {folder: names[shared:] for folder, names in parts.items()}
    for names in zip(*below.values()):
        roles = set(map(role_of, names))
        if len(roles) > 1 and None not in roles:
            own = dict(zip(below, names))
            return [own[folder] for folder in folders]
    found = sorted({name for names in below.values() for name in names if role_of(name)})
    called = " and ".join(f"{printable(name)}/" for name in found[:2])
    if len(set(map(role_of, found))) > 1:
        raise UserError(
            f"some images of {where} lie in {called}, but not all in such folders; say which are trained on in a column"
            " `split` of train and val."
        )
    if found:
        notes.append(f"{called} in the paths of {where} is taken for no split; a column `split` can say otherwise.")
    return None


def _image_column(cells: pa.Table, wanted: str | None, where: str, notes: list[str]) -> str:
    names = cells.column_names
    if wanted is not None:
        return choose("--image_column", wanted, names, names, "images", where)
    texts = [name for name in names if pa.types.is_string(cells.column(name).type)]
    shown = {name: [cell for cell in cells.column(name).slice(0, _SHOWN).to_pylist() if cell] for name in texts}
    possible = [
        name for name, values in shown.items() if values and all(is_image(cell.strip() or " ") for cell in values)
    ]
    possible = possible or [name for name in texts if name.casefold() in _IMAGE_NAMES]
    chosen = choose("--image_column", None, preferred_first(possible), names, "images", where)
    if others := ", ".join(printable(name) for name in possible if name != chosen):
        notes.append(f"the images of {where} are its column {chosen}; --image_column can name another: {others}.")
    return chosen


def _label_columns(images: ImageList, columns: Columns, notes: list[str]) -> list[str]:
    taken = images.image_column, images.split_column
    possible = [name for name in images.cells.column_names if name not in taken]
    if columns.label_column:
        if not images.has_header:
            raise UserError(f"--label_column: {images.where} has no names of columns in its first line.")
        if images.image_column in columns.label_column:
            raise UserError(f"--label_column {images.image_column} is the column of images of {images.where}.")
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
    if len(possible) > 1:
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
    spelt: dict[str, dict[str, str]] = {}
    for row in absent:  # or on macOS
        images.paths[row] = as_on_disk(images.paths[row], spelt)
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
