"""Finds the images of a folder tree in one fast pass.

`datasets`' own imagefolder resolver takes minutes on ImageNet (huggingface/datasets#6359); listing the folders takes
two seconds. The result is the same `datasets.Dataset` of paths and class labels. Nothing is remembered from one start
to the next: another version of a data set may come with the same folder times, and comparing the names takes half as
long as listing them.
"""

import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import datasets
import pyarrow as pa

from ..errors import UserError
from ..manifest import read_manifest
from ..run_folder import RunFolder, made_by_a_run
from .names import EXTENSIONS, is_image, is_junk, one_spelling, role_of


_DEEPEST = 100  # folders in one another below a class
_MOST_SPLITS = 50  # folders with folders in them that are compared with one another
_LOCK = ".lock"  # all that a run has in its folder while it looks at the data for the first time


@dataclass
class Tree:
    """What a folder of class folders holds.

    Attributes:
        classes: their names in NFC, sorted.
        paths: every image, by class, then by path in NFC; `labels` has its class's position.
        notes: sentences about what looks odd but is usable.
        problems: sentences about why it cannot be used.
        runs: the folders of training runs, which were passed over.
        models: the folders without images that `convert` and `export` wrote, which were too.
    """

    root: str
    classes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    @property
    def note_on_runs(self) -> str:
        """A sentence about them, or ""."""
        return f"passed over, a training run's: {self.runs[0]}{_more(self.runs)}." if self.runs else ""


def folders_in(tree: Tree) -> list[str]:
    """The names of the folders right below `tree.root` that may hold a user's images; it notes those of runs."""
    folders = [entry for entry in _entries(tree.root) if _is_folder(entry) and not _passed_over(entry, tree)]
    return [entry.name for entry in folders if not _is_a_models(entry.path)]


def holds_images(folder: str | os.PathLike) -> bool:
    """Whether there is an image in or below it."""
    tree = Tree(os.fspath(folder))
    for place, below, names in os.walk(tree.root):
        if any(is_image(name) and not is_junk(name) for name in names):
            return True
        below[:] = [name for name in below if not is_junk(name) and not made_by_a_run(os.path.join(place, name))]
    return False


def scan_tree(root: str | os.PathLike) -> Tree:
    """Lists a folder of class folders.

    Raises:
        UserError: one sentence about what is wrong with it.
    """
    tree = survey_tree(root)
    if tree.problems:
        raise UserError(tree.problems[0])
    return tree


def survey_tree(root: str | os.PathLike) -> Tree:
    """The same with all that is wrong with it in `Tree.problems`.

    Raises:
        UserError: a folder cannot be listed, or links make it endless.
    """
    root = str(root)
    tree = Tree(root)
    loose, nested = 0, 0
    left_out: list[str] = []
    empty: list[str] = []
    inner: list[str] = []  # class folders with a split in them
    deep: dict[str, list[str]] = {}  # the images of class folders with folders in them
    found: dict[str, list[str]] = {}
    spellings: dict[str, list[str]] = defaultdict(list)
    ancestors = (_identity(root),)
    for entry in _entries(root):
        if not _is_folder(entry):
            loose += is_image(entry.name)
            continue
        if _passed_over(entry, tree):
            continue
        paths: list[str] = []
        beside: list[str] = []
        below: list[str] = []
        deeper = _collect(entry.path, ancestors, {}, paths, beside, tree, below=below)
        nested += deeper
        if not paths and os.path.lexists(os.path.join(entry.path, _LOCK)):
            tree.runs.append(entry.path)
            continue
        if not paths and _is_a_models(entry.path):
            tree.models.append(entry.path)
            continue
        left_out += beside
        if not paths:
            empty.append(entry.name)
        if any(role_of(name) == "train" for name in below):
            inner.append(entry.name)
        if deeper:
            deep[entry.name] = paths
        name = one_spelling(entry.name)
        found.setdefault(name, []).extend(paths)
        spellings[name].append(entry.name)
    for name in sorted(found):
        tree.paths += sorted(found[name], key=one_spelling)  # one order, whatever a system has made of the names
        tree.labels += [len(tree.classes)] * len(found[name])
        tree.classes.append(name)
    tree.problems += _problems(tree, loose, empty, inner, deep)
    if loose:
        tree.notes.append(f"{_images(loose)} in {root} itself, outside any class folder: left out.")
    if left_out:
        tree.notes.append(
            f"{_images(len(left_out), 'file')} under {root} without an image's ending: left out, e.g. {left_out[0]}."
        )
    if nested:
        tree.notes.append(f"{_images(nested)} under {root} deeper than a class folder: they count towards that class.")
    if twice := [name for name, folders in spellings.items() if len(folders) > 1]:
        tree.notes.append(f"{root} has two folders {twice[0]}{_more(twice)}, spelt alike in Unicode: one class.")
    if tree.runs:
        tree.notes.append(tree.note_on_runs)
    if tree.models:
        tree.notes.append(f"passed over, a converted or exported model's: {tree.models[0]}{_more(tree.models)}.")
    return tree


def list_images(root: str | os.PathLike) -> tuple[list[str], str]:
    """Every image below a folder whatever the folders in it mean, sorted, and a note about what was passed over.

    Raises:
        UserError: a folder cannot be listed, or links back to one above it.
    """
    tree = Tree(os.fspath(root))
    paths: list[str] = []
    _collect(tree.root, (), {}, paths, [], tree)
    return sorted(paths), tree.note_on_runs


def open_folder(root: str | os.PathLike) -> tuple[datasets.Dataset, list[str]]:
    """The images under a folder of class folders as a dataset, and notes about it.

    Returns:
        A `datasets.Dataset` with the columns `image` (undecoded) and `label` (a `ClassLabel`), and `Tree.notes`.

    Raises:
        UserError: see `scan_tree`.
    """
    tree = scan_tree(os.path.realpath(root))
    return dataset_of(tree), tree.notes


def dataset_of(tree: Tree) -> datasets.Dataset:
    """The images of a tree as a dataset. Raises `UserError` for a name that is not valid UTF-8."""
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=tree.classes)}
    )
    try:
        paths = pa.array(tree.paths, pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {error.object!r} under {tree.root} is not valid UTF-8; rename it.") from None
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    table = pa.table([images, pa.array(tree.labels, pa.int64())], schema=features.arrow_schema)
    return datasets.Dataset(datasets.table.InMemoryTable(table))


def _images(count: int, kind: str = "image") -> str:
    return f"{count:,} {kind}" + ("" if count == 1 else "s")


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_junk(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None


def _passed_over(entry: os.DirEntry, tree: Tree) -> bool:
    """Whether a folder below `tree.root` is a training run's, which it then notes."""
    # Of a run whose output_dir is the folder of images itself.
    inside = RunFolder.is_a_runs_name(entry.name) and made_by_a_run(os.path.dirname(entry.path))
    if inside or made_by_a_run(entry.path):
        tree.runs.append(entry.path)
        return True
    return False


def _collect(
    folder: str,
    ancestors: tuple,
    seen: dict,
    paths: list,
    left_out: list,
    tree: Tree,
    depth: int = 0,
    below: list | None = None,
) -> int:
    """Adds the images below one class folder to `paths`; returns how many lie deeper than it.

    Args:
        seen: the folders that were entered below that class folder, by identity; it is added to.
        below: is given the names of the folders right in it.
    """
    identity = _identity(folder)
    if identity in ancestors:
        raise UserError(f"{folder} links back to a folder above it; remove that symbolic link.")
    if identity in seen:  # once more in each of its folders' links, and so on: 30 links can be a billion folders
        raise UserError(f"{folder} and {seen[identity]} are one folder; remove one of the symbolic links to it.")
    if depth > _DEEPEST:
        raise UserError(f"{tree.root} has folders more than {_DEEPEST} deep in one another; move the images up.")
    seen[identity] = folder
    deeper = 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                name = entry.name
                if name[0] == ".":
                    continue
                if _is_folder(entry):
                    if is_junk(name):
                        continue
                    if below is not None:
                        below.append(name)
                    if not _passed_over(entry, tree):
                        deeper += _collect(entry.path, (*ancestors, identity), seen, paths, left_out, tree, depth + 1)
                elif is_image(name):
                    paths.append(entry.path)
                    deeper += depth > 0
                elif not is_junk(name):
                    left_out.append(entry.path)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    return deeper


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _problems(tree: Tree, loose: int, empty: list[str], inner: list[str], deep: dict[str, list[str]]) -> list[str]:
    root = tree.root
    if not tree.classes:
        found = _images(loose) if loose else "no images"
        return [f"{root} holds {found} and no class folders; it must look like {root}/<class>/<image>."]
    if not tree.paths:
        return [f"there are no images under {root}; known endings: {', '.join(sorted(EXTENSIONS))}."]
    problems = []
    if inner:
        problems.append(
            f"{root} holds a whole data set in {inner[0]}/; give that folder: {os.path.join(root, inner[0])}."
        )
    else:
        problems += _one_level_too_high(tree, deep)
    spellings = defaultdict(list)
    for name in tree.classes:
        spellings[_plain(name)].append(name)
    for names in spellings.values():
        if len(names) > 1:
            blanks = any(name != name.strip() for name in names)
            what, shown = ("blanks", map(repr, names)) if blanks else ("case", names)
            problems.append(
                f"{root} has class folders that differ only in {what}, {' and '.join(shown)}; merge or rename them."
            )
    if empty:
        where = os.path.join(root, empty[0])
        problems.append(f"the class folder {where} holds no images{_more(empty)}; fill or remove it.")
    return problems


def _one_level_too_high(tree: Tree, deep: dict[str, list[str]]) -> list[str]:
    """Where the class folders lie deeper, in one folder or in each of several: the sentence that says so."""
    root = tree.root
    if role_of(os.path.basename(root)):  # what is in a split are classes, whatever they hold
        return []
    found: dict[str, set[str]] = {}  # of folders with folders, the names of these
    for name, paths in list(deep.items())[:_MOST_SPLITS]:
        places = {os.path.dirname(path) for path in paths}
        core = os.path.commonpath(places)  # below folders with nothing but one folder in them
        below = {os.path.relpath(place, core).split(os.sep)[0] for place in places} - {os.curdir}
        if len(below) < 2:
            continue
        if core not in places and len(tree.paths) == len(paths):
            inside = os.path.relpath(core, root)
            return [f"the folders of {root} lie in {inside}/; give that folder: {core}, or move its folders up."]
        found[name] = below
    for (one, first), (other, second) in combinations(found.items(), 2):
        known = set(map(_plain, second))
        same = sorted(name for name in first if _plain(name) in known)
        if _plain(one) != _plain(other) and len(same) > 1 and 2 * len(same) > min(len(first), len(second)):
            shown = ", ".join(f"{name}/" for name in same[:2]) + (", …" if len(same) > 2 else "")
            return [
                f"{root} has {one}/ and {other}/ with the same folders in them ({shown}): splits or classes? Call"
                f" splits train/ and val/, or one train/ and name the other, as with --val_split {other}; or give one"
                f" alone: {os.path.join(root, one)}. If they are classes, put them all into a folder called train/."
            ]
    return []


def _plain(name: str) -> str:
    return one_spelling(name).strip().casefold()


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _is_a_models(folder: str) -> bool:
    """Whether `convert` or `export` wrote a folder, as its manifest says, which names no image."""
    try:
        return not any(map(is_image, read_manifest(Path(folder))))
    except UserError:
        return False
