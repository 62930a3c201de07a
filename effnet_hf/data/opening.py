"""From a recipe to its images: the one way to a `DataSource`, for training, validation, export and calibration."""

import os
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..recipes import Recipe
from ..run_folder import made_by_a_run
from .labels import MULTI, Columns
from .named_dataset import is_saved, open_named
from .names import is_image, is_junk, role_of
from .source import DataSource, Split
from .splits import existing_folder, fold_of
from .survey import images_per_class, note_on_balance, notes_on_classes
from .table import find_metadata, open_list, read_list, read_metadata


_SHARDS = ".parquet", ".arrow", ".tar", ".tar.gz", ".tgz"
_DEPTH = 4  # folders below each other that `datasets` may read, as DIR/config/data/train/; links may make them endless


def open_data(recipe: Recipe, train: bool = True, class_names: list[str] | None = None) -> DataSource:
    """The images that a recipe's data options name.

    Args:
        train: False opens the validation images only.
        class_names: label order to keep, for weights that already have one.

    Raises:
        UserError: no data, or unusable data, in one sentence.
    """
    source = _open(recipe, Columns.of(recipe), train, class_names)
    if recipe.num_labels is not None and recipe.num_labels != len(source.class_names):
        raise UserError(f"--num_labels is {recipe.num_labels}, but the data has {len(source.class_names)} classes.")
    if isinstance(source.train, Split) and isinstance(source.val, Split):
        own = len(source.class_names), source.label_sets
        counts = [images_per_class(split.labels, *own) for split in (source.train, source.val)]
        source.notes += notes_on_classes(source.class_names, *counts)
        source.notes += note_on_balance(source.class_names, counts[0], _remedies(recipe, source))
        images = sum(counts)
        rare = np.flatnonzero((images > 0) & (images < recipe.folds))
        if source.label_sets is None and len(rare):
            more = f" and {len(rare) - 1:,} more" if len(rare) > 1 else ""
            some = f"{source.class_names[rare[0]]}{more}"
            source.notes.append(f"fewer images than --folds {recipe.folds}, so not in every fold: {some}.")
    return source


def _remedies(recipe: Recipe, source: DataSource) -> list[str]:
    """The flags for classes that are rare, as words of a sentence, but for those in use."""
    several, flags = source.label_sets is not None, []
    if recipe.sampler == "shuffled" and recipe.class_weights is None:
        flags.append("--class_weights balanced" if several else "--sampler balanced or --class_weights balanced")
    if recipe.select_best is None and not several:  # whose mAP is a mean over classes anyway
        flags.append("--select_best macro_recall")
    return flags


def _open(recipe: Recipe, columns: Columns, train: bool, class_names: list[str] | None) -> DataSource:
    share, val_split, fold = recipe.val_fraction, recipe.val_split, fold_of(recipe)
    if recipe.labels:
        images = read_list(recipe.labels, recipe.data_dir, columns)
        return open_list(images, columns, share, train, class_names, val_split, fold)
    if recipe.dataset_name:
        name, config = recipe.dataset_name, recipe.dataset_config
        return open_named(name, config, recipe.streaming, share, train, class_names, columns, val_split, fold)
    if not recipe.data_dir:
        raise UserError(
            "no data: give --data_dir DIR, --labels FILE.csv, --dataset_name user/name, or --loader synthetic."
        )
    root = existing_folder(recipe.data_dir)
    if is_saved(str(root)) or _is_for_datasets(root):
        flag = "--data_dir"
        config = recipe.dataset_config
        return open_named(str(root), config, False, share, train, class_names, columns, val_split, fold, flag)
    if found := find_metadata(root):
        listed = read_metadata(root, found, columns)
        if listed is not None:
            return open_list(listed, columns, share, train, class_names, val_split, fold)
    for flag in ("image_column", "label_column", "label_separator"):
        if getattr(recipe, flag):
            raise UserError(
                f"--{flag}: --data_dir {root} holds class folders, which have no columns; name a list of images with"
                " --labels FILE.csv."
            )
    by_position, several = recipe.classes_by_position, recipe.problem_type == MULTI
    try:
        return DataSource.from_folder(recipe.data_dir, share, train, class_names, by_position, several, val_split, fold)
    except UserError as error:
        if any(_is_shard(name) for _, _, names in os.walk(root) for name in names):
            raise UserError(f"{error} The Parquet or .tar files in it are read with --dataset_name {root}.") from None
        raise


def _is_for_datasets(root: Path) -> bool:
    """Whether a folder is one that `datasets` reads: WebDataset's or Parquet files, and no image in a folder that could
    be a class."""
    found, ahead = False, [(root, False)]
    while ahead:
        folder, may_be_class = ahead.pop()
        if folder != root and made_by_a_run(folder):
            continue
        files, folders = _content(folder)
        if may_be_class and any(map(is_image, files)) or len(folder.parts) - len(root.parts) > _DEPTH:
            return False
        found = found or any(map(_is_shard, files))
        ahead += [(folder / name, may_be_class or folder != root or not _is_split(name)) for name in folders]
    return found


def _is_shard(name: str) -> bool:
    return name.lower().endswith(_SHARDS)


def _is_split(name: str) -> bool:
    return name == "data" or role_of(name) is not None


def _content(folder: Path) -> tuple[list[str], list[str]]:
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not is_junk(entry.name)]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    folders = {entry.name for entry in entries if entry.is_dir()}
    return [entry.name for entry in entries if entry.name not in folders], sorted(folders)
