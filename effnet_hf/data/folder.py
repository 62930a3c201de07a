"""Finds the images of a folder tree in one fast pass, and remembers them.

`datasets`' own imagefolder resolver takes minutes on ImageNet (huggingface/datasets#6359); listing the folders takes a
second. The result is the same `datasets.Dataset` of paths and class labels, kept as an Arrow file in the cache of
`datasets` and mapped into memory by every process. It is valid for as long as no folder of the tree changes its
modification time, that is, until a file is added, removed or renamed.
"""

import contextlib
import hashlib
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa

from ..errors import UserError
from ..files import atomic_write
from ..manifest import read_manifest
from ..run_folder import RunFolder, made_by_a_run


EXTENSIONS = frozenset(".jpg .jpeg .jpe .jfif .png .ppm .pgm .pbm .pnm .bmp .gif .tif .tiff .webp .avif".split())
VALIDATION_NAMES = ("val", "validation", "test")
_METADATA = b"effnet_hf"
_DEEPEST = 100  # folders in one another below a class
_FORMAT = 3
_LOCK = ".lock"  # all that a run has in its folder while it looks at the data for the first time
_SETTLED_NS = 1_500_000_000  # a folder changed this recently may change again within its clock's tick: not remembered


@dataclass
class Tree:
    """What a folder of class folders holds.

    Attributes:
        classes: their names, sorted.
        paths: every image, by class, then by path; `labels` has its class's position.
        notes: sentences about what looks odd but is usable.
        folders: every folder below and including the root, with its modification time in ns.
        runs: the folders of training runs, which were passed over.
        models: the folders without images that `convert` and `export` wrote, which were too.
    """

    root: str
    classes: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folders: dict[str, int] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    models: list[str] = field(default_factory=list)

    @property
    def note_on_runs(self) -> str:
        """A sentence about them, or ""."""
        return f"passed over, a training run's: {self.runs[0]}{_more(self.runs)}." if self.runs else ""


def find_splits(data_dir: str | os.PathLike, flag: str = "--data_dir") -> tuple[Path, Path | None]:
    """The folders of training and validation images; (`data_dir`, None) when these are class folders themselves.

    The first one need not exist: a `data_dir` that holds nothing but a `val/` is one to validate on.

    Args:
        flag: the option that names it, for sentences; "" where it has none.

    Raises:
        UserError: `data_dir` is not a folder.
    """
    if not os.fspath(data_dir):  # which would mean the working folder
        raise UserError(f"{flag or 'the folder'} is empty; name a folder of images.")
    root = Path(os.path.expanduser(data_dir))
    where = f"{flag} {root}".strip()
    try:
        os.stat(root)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{where} does not exist.") from None
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be looked into
        raise UserError(f"{where} cannot be opened: {getattr(error, 'strerror', None) or error}.") from None
    if not root.is_dir():
        raise UserError(f"{where} is a file; name the folder that holds train/ and val/.")
    validation = next((root / name for name in VALIDATION_NAMES if _holds_data(root / name)), None)
    if _holds_data(root / "train") or validation is not None and not _other_folders(root):
        return root / "train", validation
    return root, None


def _holds_data(folder: Path) -> bool:
    return folder.is_dir() and not made_by_a_run(folder)


def _other_folders(root: Path) -> list[str]:
    tree = Tree(str(root))
    folders = [entry.name for entry in _entries(tree.root) if _is_folder(entry) and not _passed_over(entry, tree)]
    return [name for name in folders if name not in VALIDATION_NAMES and not _is_a_models(os.path.join(root, name))]


def scan_tree(root: str | os.PathLike) -> Tree:
    """Lists a folder of class folders.

    Raises:
        UserError: one sentence about what is wrong with it.
    """
    root = str(root)
    tree = Tree(root)
    loose, nested = 0, 0
    left_out: list[str] = []
    empty: list[str] = []
    ancestors = (_identity(root, tree.folders),)
    for entry in _entries(root):
        if not _is_folder(entry):
            loose += _is_image(entry.name)
            continue
        if _passed_over(entry, tree):
            continue
        paths: list[str] = []
        beside: list[str] = []
        nested += _collect(entry.path, ancestors, {}, paths, beside, tree)
        if not paths and os.path.lexists(os.path.join(entry.path, _LOCK)):
            tree.runs.append(entry.path)
            continue
        if not paths and _is_a_models(entry.path):
            tree.models.append(entry.path)
            continue
        left_out += beside
        if not paths:
            empty.append(entry.name)
        tree.paths += sorted(paths)
        tree.labels += [len(tree.classes)] * len(paths)
        tree.classes.append(entry.name)
    _refuse(tree, loose, empty)
    if loose:
        tree.notes.append(f"{_images(loose)} in {root} itself, outside any class folder: left out.")
    if left_out:
        tree.notes.append(
            f"{_images(len(left_out), 'file')} under {root} without an image's ending: left out, e.g. {left_out[0]}."
        )
    if nested:
        tree.notes.append(f"{_images(nested)} under {root} deeper than a class folder: they count towards that class.")
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


def open_folder(root: str | os.PathLike, use_cache: bool = True) -> tuple[datasets.Dataset, list[str]]:
    """The images under a folder of class folders as a dataset, and notes about it.

    Returns:
        A `datasets.Dataset` with the columns `image` (undecoded) and `label` (a `ClassLabel`), and `Tree.notes`.

    Raises:
        UserError: see `scan_tree`.
    """
    root = os.path.realpath(root)
    cache = _cache_path(root)
    if use_cache and (found := _read_index(cache)) is not None:
        return found
    started = time.time_ns()
    tree = scan_tree(root)
    table = _table(tree)
    if use_cache and started - max(tree.folders.values()) > _SETTLED_NS:
        with contextlib.suppress(UserError, OSError):  # no room, or a read-only home: then it is scanned every time
            with atomic_write(cache, "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
                writer.write_table(table)
            return datasets.Dataset.from_file(str(cache)), tree.notes
    return datasets.Dataset(datasets.table.InMemoryTable(table)), tree.notes


def _images(count: int, kind: str = "image") -> str:
    return f"{count:,} {kind}" + ("" if count == 1 else "s")


def _entries(folder: str) -> list[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
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


def _collect(folder: str, ancestors: tuple, seen: dict, paths: list, left_out: list, tree: Tree, depth: int = 0) -> int:
    """Adds the images below one class folder to `paths`; returns how many lie deeper than it.

    Args:
        seen: the folders that were entered below that class folder, by identity; it is added to.
    """
    identity = _identity(folder, tree.folders)
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
                    if not _passed_over(entry, tree):
                        deeper += _collect(entry.path, (*ancestors, identity), seen, paths, left_out, tree, depth + 1)
                elif _is_image(name):
                    paths.append(entry.path)
                    deeper += depth > 0
                else:
                    left_out.append(entry.path)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    return deeper


def _identity(folder: str, folders: dict) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    folders[folder] = status.st_mtime_ns
    return status.st_dev, status.st_ino


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link to itself
        return False


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in EXTENSIONS


def _refuse(tree: Tree, loose: int, empty: list[str]) -> None:
    root = tree.root
    if not tree.classes:
        found = _images(loose) if loose else "no images"
        raise UserError(f"{root} holds {found} and no class folders; it must look like {root}/<class>/<image>.")
    if not tree.paths:
        raise UserError(f"there are no images under {root}; known endings: {', '.join(sorted(EXTENSIONS))}.")
    inner = [name for name in tree.classes if os.path.isdir(os.path.join(root, name, "train"))]
    if inner:
        raise UserError(
            f"{root} holds a whole data set in {inner[0]}/; give that folder: {os.path.join(root, inner[0])}."
        )
    spellings = defaultdict(list)
    for name in tree.classes:
        spellings[name.casefold()].append(name)
    twins = next((names for names in spellings.values() if len(names) > 1), None)
    if twins:
        raise UserError(
            f"{root} has class folders that differ only in case, {' and '.join(twins)}; merge or rename them."
        )
    if empty:
        where = os.path.join(root, empty[0])
        raise UserError(f"the class folder {where} holds no images{_more(empty)}; fill or remove it.")


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _table(tree: Tree) -> pa.Table:
    features = datasets.Features(
        {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=tree.classes)}
    )
    try:
        paths = pa.array(tree.paths, pa.string())
    except UnicodeEncodeError as error:
        raise UserError(f"the file name {error.object!r} under {tree.root} is not valid UTF-8; rename it.") from None
    images = pa.StructArray.from_arrays([pa.nulls(len(paths), pa.binary()), paths], ["bytes", "path"])
    own = {"format": _FORMAT, "root": tree.root, "folders": tree.folders, "notes": tree.notes}
    own |= {"runs": tree.runs, "models": tree.models}
    schema = features.arrow_schema
    schema = schema.with_metadata({**schema.metadata, _METADATA: json.dumps(own).encode()})
    return pa.table([images, pa.array(tree.labels, pa.int64())], schema=schema)


def _is_of_a_run(folder: str) -> bool:
    return made_by_a_run(folder) or made_by_a_run(os.path.dirname(folder)) or os.path.lexists(f"{folder}/{_LOCK}")


def _is_a_models(folder: str) -> bool:
    """Whether `convert` or `export` wrote a folder, as its manifest says, which names no image."""
    try:
        return not any(map(_is_image, read_manifest(Path(folder))))
    except UserError:
        return False


def _cache_path(root: str) -> Path:
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:24]
    return Path(datasets.config.HF_DATASETS_CACHE) / "effnet_hf_index" / f"{digest}.arrow"


def _read_index(cache: Path) -> tuple[datasets.Dataset, list[str]] | None:
    """The remembered list, or None when there is none or a folder has changed since."""
    try:
        with pa.memory_map(str(cache)) as file, pa.ipc.open_stream(file) as reader:
            own = json.loads(reader.schema.metadata[_METADATA])
        if own["format"] != _FORMAT or any(os.stat(path).st_mtime_ns != time for path, time in own["folders"].items()):
            return None
        if not all(map(_is_of_a_run, own["runs"])) or not all(map(_is_a_models, own["models"])):
            return None  # classes like any other now
        return datasets.Dataset.from_file(str(cache)), own["notes"]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid):
        return None
