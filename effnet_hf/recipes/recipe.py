"""The typed recipe: reads YAML, takes flags on top, refuses what cannot be meant."""

import contextlib
import copy
import dataclasses
import json
import math
import os
import reprlib
import stat
import types
import typing
from argparse import SUPPRESS, Action, ArgumentTypeError, Namespace
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from .. import cli
from ..cli import HelpFormatter, OneLineErrors, program_name, say_new_spelling
from ..configuration import EfficientNetNVConfig
from ..errors import UserError, did_you_mean, first_line, printable
from ..run_folder import RunFolder
from . import options
from .precedence import give_way, hardware_preset


FOLDER = Path(__file__).parent
# What a checkpoint says of itself, in config.json and in preprocessor_config.json if it has one. With --model a flag
# may replace it, a recipe's file does not.
OF_A_CONFIG, OF_A_PROCESSOR = ("image_size", "batch_norm_eps"), ("resize_margin", "interpolation")
# Options that name a file, a folder or a Hub id.
PATHS = ("data_dir", "dataset_name", "labels", "model", "teacher", "output_dir", "resume")
LARGEST = {int: 1_000_000_000, float: 1e30}  # of a number without an end of its own; beyond, arithmetic overflows
LARGEST_FILE = 1 << 16  # bytes of a recipe; ours are of 2,000
_DIGITS = 100
OLD_SPELLINGS = {"--topk": "--top_k"}
FOR_WEIGHTS = ("finetune", "imagenette-finetune")  # recipes that say nothing useful without --model


@dataclass(frozen=True)
class Recipe(
    options.ModelOptions,
    options.DataOptions,
    options.OptimizationOptions,
    options.PrecisionOptions,
    options.RunOptions,
    options.QuantizationOptions,
):
    """Everything that defines a run; see `options.py` for each field.

    Raises:
        UserError: one sentence naming the option, its value and what is allowed.
    """

    name: str = dataclasses.field(default="custom", metadata={"help": SUPPRESS})

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = _coerce(field.name, getattr(self, field.name), _HINTS[field.name])
            object.__setattr__(self, field.name, value)
            low, high = field.metadata.get("low"), field.metadata.get("high", math.inf)
            for entry in value if isinstance(value, list) else [value]:
                if type(entry) not in LARGEST:
                    continue
                if low is not None and entry < low or entry > high:
                    bound = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                    raise UserError(f"--{field.name} must be {bound}, got {entry}.")
                if high == math.inf and entry > LARGEST[type(entry)]:
                    raise UserError(f"--{field.name} must be at most {LARGEST[type(entry)]:g}, got {entry:g}.")
        for name in PATHS:
            object.__setattr__(self, name, _path(name, getattr(self, name)))
        if self.name != printable(self.name):
            raise UserError(f"the recipe's name must be one line of text, got {self.name!r}.")
        if len(self.adam_betas) != 2:
            raise UserError(f"--adam_betas takes two numbers, e.g. 0.9 0.999; got {self.adam_betas}.")
        if self.epochs < self.warmup_epochs:
            raise UserError(
                f"--warmup_epochs {self.warmup_epochs:g} is longer than --epochs {self.epochs}; shorten the warm-up."
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise UserError("--nesterov needs --optimizer sgd with a momentum.")
        if self.freeze_epochs and self.freeze == "none":
            raise UserError(
                f"--freeze_epochs {self.freeze_epochs} says for how long, not what; add --freeze stages or backbone."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise UserError("--push_to_hub needs --hub_model_id, e.g. me/effnet-b4.")
        for flag in [flag for flag in ("hub_private", "hub_revision") if getattr(self, flag) and not self.push_to_hub]:
            raise UserError(f"--{flag} does nothing without --push_to_hub.")
        if self.data_dir and self.dataset_name:
            raise UserError("--data_dir and --dataset_name are two sources; give one.")
        if self.streaming and not self.dataset_name:
            raise UserError("--streaming needs --dataset_name; a local folder is read lazily anyway.")
        if self.labels and self.dataset_name:
            raise UserError("--labels and --dataset_name are two sources; give one.")
        if self.problem_type == "single_label_classification" and (self.label_separator or len(self.label_column) > 1):
            flag = "--label_separator" if self.label_separator else "several --label_column"
            raise UserError(f"{flag} means several labels per image, --problem_type {self.problem_type} one; give one.")
        if self.label_separator and len(self.label_column) > 1:
            raise UserError("--label_separator parts the cells of one --label_column, and there are several; give one.")
        if self.label_separator is not None and not self.label_separator:
            raise UserError("--label_separator is empty; give what stands between two labels of a cell, e.g. ';'.")
        k, n = self.fold, self.folds
        if n == 1:
            raise UserError("--folds 1 leaves nothing to train on; give a number of folds from 2 on.")
        if n and not k:
            raise UserError(f"--folds {n} needs --fold, which of them to validate on: one from 1 to {n}.")
        if k > n:
            wrong = (
                f"is not one of --folds {n}; give one from 1 to {n}" if n else "needs --folds, of how many it is one"
            )
            raise UserError(f"--fold {k} {wrong}.")
        for name in ("val_fraction", "val_split", "streaming"):
            if self.folds and getattr(self, name):
                raise UserError(f"--folds says what is validated on, and goes without --{name}; drop one of them.")
        if self.folds and self.accept_changed_data:
            raise UserError(
                "--folds goes without --accept_changed_data true: other images change the folds, and a network would be"
                " measured on what it was trained on; train the fold anew."
            )
        names = ("randaugment_operations", "randaugment_magnitude") if self.augmentation != "randaugment" else ()
        if any(getattr(self, name) != getattr(Recipe, name) for name in names):
            raise UserError(
                "--randaugment_operations and --randaugment_magnitude are the strength of --augmentation randaugment;"
                f" this is {self.augmentation}."
            )
        if self.class_weights == "none":  # a flag over a file that has some
            object.__setattr__(self, "class_weights", None)
        if self.sampler == "balanced" and self.class_weights == "balanced":
            raise UserError(
                "--sampler balanced and --class_weights balanced mend the same thing, together twice; give one."
            )
        unknown = "--streaming" if self.streaming else "--loader synthetic" if self.loader == "synthetic" else ""
        needs = {"--sampler balanced": self.sampler == "balanced", "--class_weights": self.class_weights is not None}
        for flag, given in needs.items():
            if given and unknown:
                raise UserError(f"{flag} has to know how many images each class has, and {unknown} does not; drop one.")
        if self.class_weights not in (None, "balanced"):
            object.__setattr__(self, "class_weights", _path("class_weights", self.class_weights))
        if len(set(self.label_column)) < len(self.label_column):
            raise UserError("--label_column names a column twice.")
        self.model_config()  # the architecture checks its own options

    def model_config(self, **labels) -> EfficientNetNVConfig:
        """The architecture this recipe trains from scratch; `labels` are `num_labels` or `id2label` and `label2id`."""
        try:
            return EfficientNetNVConfig.from_variant(self.variant, **self.architecture_overrides(), **labels)
        except ValueError as error:
            raise UserError(str(error)) from None

    def architecture_overrides(self) -> dict:
        """The configuration fields that this recipe sets, also on a loaded checkpoint."""
        names = ["image_size", "dropout_rate", "survival_prob", "stochastic_depth_mode"]
        names += ["batch_norm_momentum", "batch_norm_eps", "conv_init"]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def replace(self, **changes) -> "Recipe":
        return dataclasses.replace(self, **changes)

    def to_yaml(self) -> str:
        """The whole recipe as a document that `load_recipe` reads back, without how one launch began: read again, it
        must not overwrite the run it describes."""
        left_out = ("overwrite", "resume")
        lines = [f"name: {self.name}"]
        for group in options.GROUPS:
            names = [field.name for field in dataclasses.fields(group) if field.name not in left_out]
            lines += ["", f"# {group._argument_group_name}"]
            lines += [f"{name}: {json.dumps(getattr(self, name))}" for name in names]  # JSON values are YAML values
        return "\n".join(lines) + "\n"


_HINTS = typing.get_type_hints(Recipe)
_NAMES = [field.name for field in dataclasses.fields(Recipe)]


def available_recipes() -> list[str]:
    """Names of the built-in recipes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem not in ("hardware", "memory"))


def load_recipe(name_or_path: str, **overrides) -> Recipe:
    """Reads a built-in recipe (`"b4"`) or a YAML file, with `overrides` on top.

    With `hardware` its preset lies between the two. With `model`, image size, resize margin, filter and batch norm's
    epsilon are that checkpoint's, not the file's; `overrides` may change them.

    Raises:
        UserError: no such recipe, not YAML, an unknown key (the nearest valid one is named), a wrong value.
    """
    for key in overrides.keys() - _NAMES:
        raise UserError(f"unknown option {key!r} of a recipe.{did_you_mean(key, _NAMES)}")
    return Recipe(**_merged(_read_values(name_or_path), overrides))


def parse_recipe(
    argv: list[str] | None = None,
    description: str = "",
    extra_flags=None,
    groups=options.TRAINING_GROUPS,
    config: str = "b0",
) -> tuple[Recipe, Namespace]:
    """The recipe that a command line describes: `--config`, then `--hardware`'s preset, then every flag given.

    Args:
        argv: the arguments, `sys.argv[1:]` by default.
        extra_flags: called with the parser to add a command's own flags.
        groups: the options that become flags; `config`: the recipe without `--config`.

    Returns:
        The recipe and a namespace with `config`, `print_config` and the command's own flags.
    """
    parser: typing.Any = _RecipeParser(
        (),
        prog=program_name(),
        usage="%(prog)s [--config RECIPE] --data_dir DIR [any option below]",
        description=description,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    own = parser.add_argument_group("recipe")
    own.add_argument("-h", "--help", action="store_true", help="print this, with the values of --config, and stop")
    own.add_argument(
        "--config",
        "--recipe",
        default=config,
        metavar="RECIPE",
        help=f"built-in recipe or YAML file; built in: {', '.join(available_recipes())}",
    )
    own.add_argument("--print_config", action="store_true", help="print the resulting recipe and stop")
    if extra_flags is not None:
        extra_flags(own)
    for group in groups:
        parser._add_dataclass_arguments(group)
    options_ = [action for action in parser._actions if action.dest in _NAMES]
    for action in options_:
        action.default = SUPPRESS  # what the namespace has of a recipe was typed
    arguments = parser.parse_args(argv)
    values = _read_values(arguments.config)
    if arguments.help:
        recipe = Recipe(**values)
        for action in options_:
            action.default = getattr(recipe, action.dest)
        parser.print_help()
        parser.exit()
    given = {name: vars(arguments).pop(name) for name in _NAMES if name in arguments}
    if "learning_rate" in given and "lr_scaling" not in given:
        given["lr_scaling"] = "none"  # a rate typed by hand is meant as typed
    if "epochs" in given and "warmup_epochs" not in given:  # a shorter run keeps the recipe's share of warm-up
        warmup, epochs = (
            _coerce(name, values.get(name, getattr(Recipe, name)), _HINTS[name]) for name in ("warmup_epochs", "epochs")
        )
        given["warmup_epochs"] = warmup * given["epochs"] / max(epochs, 1)
    recipe = Recipe(**_merged(values, given))
    if recipe.resume and recipe.model is None and (model := _resumed_model(recipe)):
        recipe = Recipe(**_merged(values, {**given, "model": model}))
    if recipe.model is None and arguments.config in FOR_WEIGHTS and not arguments.print_config:
        raise UserError(
            f"--config {arguments.config} fine-tunes weights; give them with --model, a folder or a Hub id, or train"
            " from scratch with --config b0."
        )
    return recipe, arguments


class _RecipeParser(OneLineErrors, HfArgumentParser):
    old_spellings = OLD_SPELLINGS
    if typing.TYPE_CHECKING:
        __init__ = HfArgumentParser.__init__

    @staticmethod
    def _parse_dataclass_field(parser, field):
        add_option(parser, field)


def add_option(parser: typing.Any, field: dataclasses.Field) -> Action:
    """Adds the flag of an option, whose type hint is a type and no text, to a parser or a group of one."""
    field = copy.copy(field)
    field.metadata = {"help": field.metadata["help"]}  # type: ignore[assignment]  # the bounds are the recipe's to check
    HfArgumentParser._parse_dataclass_field(parser, field)
    return next(action for action in parser._actions if action.dest == field.name)


def _read_values(name_or_path: str) -> dict:
    path = Path(os.path.expanduser(name_or_path))
    if path.suffix not in (".yaml", ".yml"):
        path = FOLDER / f"{name_or_path}.yaml"
        if name_or_path not in available_recipes():
            raise UserError(
                f"--config {name_or_path!r} is neither a built-in recipe nor a .yaml file."
                f"{did_you_mean(name_or_path, available_recipes())} Built in: {', '.join(available_recipes())}."
            )
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):  # a pipe would be waited for
            raise UserError(f"cannot read the recipe {path}: it is no regular file.")
        if status.st_size > LARGEST_FILE:
            raise UserError(
                f"cannot read the recipe {path}: it has {status.st_size:,} bytes, more than {LARGEST_FILE:,}."
            )
        values = yaml.load(path.read_text(encoding="utf-8"), _Plain)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}.") from None
    except Exception as error:  # PyYAML raises its own kind and half a dozen of Python's
        reason = "nested too deeply" if isinstance(error, RecursionError) else printable(first_line(error)).rstrip(".")
        fault = "is refused" if isinstance(error, _TooMuch) else "is not valid YAML"
        raise UserError(f"{path} {fault}: {reason}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold `option: value` lines, one per option.")
    for key in list(values):
        if f"--{key}" in OLD_SPELLINGS:
            new = OLD_SPELLINGS[f"--{key}"].removeprefix("--")
            if new in values:
                raise UserError(f"{path}: {key} and {new} are one option; keep {new}.")
            values[new] = values.pop(key)
            say_new_spelling(f"{path}: {key}", new)
        elif key == "hub_token":
            raise UserError(f"{path}: a token is no part of a recipe; give --hub_token, or set HF_TOKEN.")
        elif key not in _NAMES:
            raise UserError(f"{path}: unknown option {reprlib.repr(key)}.{did_you_mean(key, _NAMES)}")
    values.setdefault("name", path.stem)
    return values


class _TooMuch(Exception):
    """A short file that would become a long one."""


class _Plain(yaml.SafeLoader):
    """Refuses what stands twice, of which YAML's own loader would take the last one without a word; and what makes a
    short file long: mappings merged into others over and over, numbers of thousands of digits."""

    def flatten_mapping(self, node):
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise _TooMuch("it merges mappings (<<), which no recipe needs; write the options out")

    def construct_scalar(self, node):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and len(node.value) > _DIGITS:
            raise _TooMuch(f"the number {reprlib.repr(node.value)} has {len(node.value):,} digits")
        return super().construct_scalar(node)

    def construct_mapping(self, node, deep=False):
        names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for name, times in names.items():
            if times > 1:
                raise yaml.YAMLError(f"{reprlib.repr(name)} stands twice")
        return super().construct_mapping(node, deep)


def _path(name: str, value: Any) -> Any:
    """A path whose `~` is the home folder, so that the recipe which a run writes means the same folder to everybody."""
    if not isinstance(value, str):
        return value  # None, or refused by `_coerce`
    try:
        return cli.path(value)
    except ArgumentTypeError as error:
        raise UserError(f"--{name} {printable(str(error))}.") from None


def _merged(values: dict, given: dict) -> dict:
    """A file's `values` and what was `given` over them.

    What a flag makes meaningless in the file is dropped. The preset of `hardware` goes over the file when it is given,
    and under it when the file names it itself, as one does that `to_yaml` wrote.
    """
    values, given = (
        {name: _path(name, value) if name in PATHS else value for name, value in source.items()}
        for source in (values, given)
    )
    if given.get("model") and not _same_place(given["model"], values.get("model")):
        folder = RunFolder(given["model"])
        speaks = not folder.path.is_dir() or folder.processor.is_file()
        its_own = OF_A_CONFIG + (OF_A_PROCESSOR if speaks else ())
        values = {name: value for name, value in values.items() if name not in its_own}
    values = give_way(values, given)
    merged = {**values, **given}
    preset = hardware_preset(merged) if merged.get("hardware") else {}
    return {**values, **preset, **given} if given.get("hardware") else {**preset, **merged}


def _resumed_model(recipe: Recipe) -> str | None:
    """The `--model` of the run that is gone on with; None where it had none, or where no checkpoint can be read."""
    run = RunFolder(recipe.output_dir if recipe.resume == "auto" else str(recipe.resume))
    for folder in [run.path] if run.progress.is_file() else reversed(run.all_checkpoints()):
        with contextlib.suppress(UserError):
            return _read_values(str(RunFolder(folder).recipe)).get("model")
    return None


def _same_place(one: str, other: object) -> bool:
    """Whether two values of `model` mean the same folder or Hub id."""
    return isinstance(other, str) and os.path.realpath(one) == os.path.realpath(other)


def _coerce(name: str, value, hint):
    """Checks a value against the option's type; YAML reads `1e-5` as text and `1` where `1.0` is meant."""
    choices = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None:
        if type(None) in choices:
            return None
        raise UserError(f"--{name} needs a value.")
    hint = next(choice for choice in choices if choice is not type(None))
    if typing.get_origin(hint) is typing.Literal:
        allowed = typing.get_args(hint)
        if value is False and "none" in allowed:  # YAML: `augmentation: no`
            return "none"
        if value not in allowed:
            got = f"{reprlib.repr(value)}.{did_you_mean(value, allowed) if isinstance(value, str) else ''}"
            raise UserError(f"--{name} must be one of {', '.join(allowed)}, got {got}")
        return value
    if typing.get_origin(hint) is list:
        entries = value if isinstance(value, (list, tuple)) else [value]
        return [_coerce(name, entry, typing.get_args(hint)[0]) for entry in entries]
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and math.isfinite(number) and (hint is float or number == int(number)):
            return hint(number)
    elif hint is bool and isinstance(value, bool) or hint is str and isinstance(value, str):
        return value
    wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}[hint]
    raise UserError(f"--{name} must be {wanted}, got {reprlib.repr(value)}.")
