"""The flags that say which images a command reads: `train`'s own, for commands that take no recipe."""

import argparse
import dataclasses
from collections.abc import Collection

from ..cli import path
from .options import DataOptions
from .recipe import PATHS, Recipe, add_option


# Of a recipe's data options, those that are about what is read; the others are about how fast, and about training.
NAMES = (
    "data_dir",
    "dataset_name",
    "dataset_config",
    "streaming",
    "val_fraction",
    "val_split",
    "folds",
    "fold",
    "labels",
    "image_column",
    "label_column",
    "label_separator",
    "problem_type",
    "classes_by_position",
    "bit_depth",
    "max_pixels",
)


def add_data_flags(parser: argparse._ActionsContainer, but: Collection[str] = ()) -> None:
    """Adds a flag for each of `NAMES` that is not among `but`, as `train` has it."""
    fields = {field.name: field for field in dataclasses.fields(DataOptions)}
    for name in NAMES:
        if name not in but:
            action = add_option(parser, fields[name])
            if name in PATHS:
                action.type = path


def data_words(recipe: Recipe) -> list[str]:
    """The flags that have another command read the images of a run: those of its options that are no defaults."""
    words = []
    for field in dataclasses.fields(recipe):
        value = getattr(recipe, field.name)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if field.name in NAMES and value != default:
            values = value if isinstance(value, list) else [str(value).lower() if isinstance(value, bool) else value]
            words += [f"--{field.name}", *map(str, values)]
    return words


def data_options(arguments: argparse.Namespace) -> dict:
    """What the flags say, as fields of a `Recipe`, whose constructor checks them."""
    return {name: getattr(arguments, name) for name in NAMES if hasattr(arguments, name)}
