"""Which folders, or named splits, are trained on, validated on and passed over: one rule for both.

`train`, `val` and `test` have synonyms in any case, see `names.SPLIT_NAMES`. What is called `test` chooses the best
epoch only where nothing is called `val`, which is said, or where `--val_split` names it. What could be meant two ways
is refused.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Generic, Literal, NamedTuple, TypeVar

from ..errors import UserError, did_you_mean
from ..recipes import Recipe
from .folder import Tree, folders_in, holds_images, scan_tree
from .names import SPLIT_NAMES, beside_roles, is_image, is_junk, role_of, roles_in


Place = TypeVar("Place", str, Path)


class Fold(NamedTuple):
    """`--fold` of `--folds`: which part of the training images, counted from 1, is validated on."""

    number: int
    of: int


class Splits(NamedTuple, Generic[Place]):
    """Names of splits, or folders of class folders.

    Attributes:
        train: None where validation needs none.
        val: None for a share of `train`.
        notes: sentences about the choice.
    """

    train: Place | None
    val: Place | None
    notes: list[str]


def fold_of(recipe: Recipe) -> Fold | None:
    """What `--folds` and `--fold` say."""
    return Fold(recipe.fold, recipe.folds) if recipe.folds else None


def choose_splits(
    names: Iterable[str],
    where: str,
    *,
    train: bool = True,
    val_fraction: float = 0.0,
    val_split: str | None = None,
    fold: Fold | None = None,
    may_hold_out: bool = True,
    mark: str = "",
    unlabelled: Iterable[str] = (),
) -> Splits[str]:
    """The splits that training needs, or with `train` False validation alone.

    Args:
        names: of the splits there are.
        where: what has them, for sentences.
        val_fraction: share of the training images to hold out where nothing is called val.
        val_split: the split to validate on, of any name.
        fold: of the training images, to validate on; then no other split is used, whatever there is.
        may_hold_out: False for a stream, of which no share can be held out.
        mark: what stands behind a name in sentences: "/" for folders.
        unlabelled: names of splits without labels, for sentences.

    Raises:
        UserError: a split is missing, or two could be meant.
    """
    names = list(names)
    by_role = defaultdict(list)
    for name in names:
        by_role[role_of(name)].append(name)

    def the(role: Literal["train", "val", "test"]) -> str | None:
        found = by_role[role]
        if len(found) > 1:
            both = f"{found[0]}{mark} and {found[1]}{mark}"
            mend = "remove or rename one" + (", or name one with --val_split" if role != "train" else "")
            raise UserError(f"{where} has {both}, which mean the same split; {mend}.")
        return found[0] if found else None

    there = ", ".join(f"{name}{mark}" for name in names) or "no split"
    hold_out = "hold out a share of the training images with --val_fraction 0.1" if may_hold_out else ""
    flat = "".join(f" {name}{mark} holds images without class folders." for name in unlabelled)
    notes: list[str] = []
    val: str | None
    if fold is not None:
        if (training := the("train")) is None:
            raise UserError(f"{where} has a {there} but no train{mark}, and --folds divides the training images.")
        if others := [f"{name}{mark}" for name in names if name != training]:
            notes.append(f"--folds divides {training}{mark} alone: {', '.join(others)} stays unseen.")
        return Splits(training, None, notes)
    if val_split is not None:
        if val_fraction:
            raise UserError("--val_fraction and --val_split say two ways to validate; drop one of them.")
        val = _named(val_split.rstrip("/") if mark else val_split, names, where, mark, flat)
    else:
        val = the("val")
    if not train and val is None and not (val_fraction and may_hold_out):
        val = the("test")
        if val is None:
            choices = _written(SPLIT_NAMES["val"], mark)
            raise UserError(f"{where} has a {there} but none of {choices}; validation needs one.{flat}")
        notes.append(f"measured on {val}{mark}: there is no {_written(SPLIT_NAMES['val'][:2], mark, ' or ')}.")
    training = the("train") if train or val is None else None
    if training is None and (train or val is None):
        raise UserError(f"{where} has a {there} but no train{mark}; training needs one.")
    if train and training == val:
        raise UserError(f"--val_split {val_split} is what is trained on; name another, or {hold_out}.")
    if val is None and not (val_fraction and may_hold_out):
        val = the("test")
        if val is None:
            mend = f"; add one, or {hold_out}" if hold_out else ""
            raise UserError(f"{where} has none of {_written(SPLIT_NAMES['val'], mark)}, only {there}{mend}.{flat}")
    if val is not None and val_fraction:
        notes.append(f"--val_fraction {val_fraction:g} was ignored because {val}{mark} exists.")
    if val is not None and train and role_of(val) == "test":
        instead = f"; to keep it for that, {hold_out}" if hold_out and val_split is None else ""
        notes.append(f"the best epoch is chosen on {val}{mark}, which is then no test of the model{instead}.")
    unused = [name for name in names if name not in (training, val) and (train or role_of(name) != "train")]
    if unused and not mark:  # of folders there are more
        notes.append(f"passed over: {', '.join(unused)}.")
    return Splits(training, val, notes)


def find_splits(
    data_dir: str | os.PathLike,
    flag: str = "--data_dir",
    *,
    train: bool = True,
    val_fraction: float = 0.0,
    val_split: str | None = None,
    fold: Fold | None = None,
) -> Splits[Path]:
    """The folders of training and validation images below `data_dir`, or `data_dir` itself where it holds classes.

    A folder of a split's name is a split where it holds class folders, and a class where it holds images, like the
    folders beside it.

    Args:
        flag: the option that names it, for sentences; "" where it has none.
        train, val_fraction, val_split, fold: see `choose_splits`.

    Raises:
        UserError: `data_dir` is no folder, a split is missing, or names could be meant two ways.
    """
    root = existing_folder(data_dir, flag)
    where = f"{flag} {root}".strip()
    found = _Folders(root)
    wanted = (val_split or "").rstrip("/").casefold()
    named = next((name for name in found.all if name.casefold() == wanted), None)
    if found.holds_classes(where, named):
        notes = []
        if (as_class := next((name for name in found.flat if role_of(name) == "train"), None)) is not None:
            notes.append(f"{as_class}/ in {root} is a class, like the folders beside it.")
        if val_split is not None:
            raise UserError(f"{where} has class folders and no splits, so none to name with --val_split.")
        if not train:
            return Splits(root, None, notes=notes) if val_fraction or fold else Splits(None, root, notes=notes)
        if not val_fraction and not fold:
            scan_tree(root)  # what is wrong with the images comes first
            choices = _written(SPLIT_NAMES["val"], "/")
            raise UserError(f"{where} has none of {choices}; add one, or hold out a share with --val_fraction 0.1.")
        return Splits(root, None, notes=notes)
    unlabelled = [name for name in found.flat if role_of(name) != "train" and name != named]
    names = [name for name in found.roles if name not in unlabelled]
    names += [named] if named is not None and named not in names else []
    try:
        chosen = choose_splits(
            names, where, train=train, val_fraction=val_fraction, val_split=val_split, fold=fold, mark="/",
            unlabelled=unlabelled,
        )  # fmt: skip
    except UserError:
        for name in names:
            if train and role_of(name) == "train":
                scan_tree(root / name)  # what is wrong with the images comes first
        raise
    passed_over = [f"{name}/ (holds images without class folders)" for name in unlabelled]
    unused = [name for name in names if name not in chosen and (train or role_of(name) != "train") and not fold]
    passed_over += [f"{name}/" for name in [*unused, *found.others] if name != named]
    notes = list(chosen.notes)
    if passed_over:
        more = f" and {len(passed_over) - 5:,} more" if len(passed_over) > 5 else ""
        notes.append(f"passed over in {root}: {', '.join(passed_over[:5])}{more}.")
    training, val = (None if name is None else root / name for name in chosen[:2])
    return Splits(training, val, notes)


def split_folders(root: Path) -> list[Path]:
    """The folders below `root` that could be splits; `root` itself where there are none."""
    found = _Folders(root)
    return [root / name for name in found.of_classes] or [root]


def existing_folder(data_dir: str | os.PathLike, flag: str = "--data_dir") -> Path:
    """`data_dir` with its `~` written out.

    Raises:
        UserError: it is no folder, or may not be looked into.
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
    return root


class _Folders:
    """What lies right below a data folder.

    Attributes:
        all: names of the folders that are neither junk nor a run's or a model's.
        roles: of them, those of a split's name.
        flat: of these, those that hold images and no folders.
        of_classes: of these, those that hold folders.
        others: the other ones with images in or below them; looked for only where there are `roles`.
    """

    def __init__(self, root: Path):
        self.root = root
        self.all = folders_in(Tree(str(root)))
        self.roles = [name for name in self.all if role_of(name)]
        shapes = {name: _shape(root / name) for name in self.roles}
        self.flat = [name for name in self.roles if shapes[name] == "flat"]
        self.of_classes = [name for name in self.roles if shapes[name] == "classes"]
        self.others = [name for name in self.all if self.roles and not role_of(name) and holds_images(root / name)]

    def holds_classes(self, where: str, named: str | None) -> bool:
        """Whether they are classes. Raises `UserError` where that could be meant or not."""
        if role_of(self.root.name) and not self.of_classes and named is None:  # a split, and what is in it are classes
            return True
        if not self.roles and (named is None or _shape(self.root / named) != "classes"):
            self._refuse_odd_splits(where)
            return True
        if named is not None or not self.others:
            return False
        if not self.of_classes:
            unclear = next((name for name in self.flat if role_of(name) != "train"), None)
            if unclear is None:
                self._refuse_odd_splits(where)
                return True
            raise UserError(
                f"{where} has {unclear}/ with images beside {_beside(self.others)}: a class, or images without labels?"
                " Put all classes into a folder called train/ if it is one, or move it elsewhere."
            )
        if len({role_of(name) for name in self.of_classes}) > 1:
            return False
        split = self.of_classes[0]
        like_it = [name for name in self.others if _shape(self.root / name) == "classes"]
        mend = f"Give {self.root / split} alone"
        if like_it and role_of(split) == "train":
            mend = f"Name the validation images with --val_split {like_it[0]}, or give {self.root / split} alone"
        elif like_it:
            mend = f"If {like_it[0]}/ has the training images, rename it to train/"
        raise UserError(
            f"{where} has {split}/ with folders in it beside {_beside(self.others)}: splits or classes? {mend}, or move"
            " all classes into a folder of their own."
        )

    def _refuse_odd_splits(self, where: str) -> None:
        """Raises `UserError` for "training_set" and "test_set", with the same classes or images without labels."""
        roles = {name: roles_in(name) for name in self.all if roles_in(name)}
        pairs = [pair for pair in combinations(roles, 2) if roles[pair[0]] != roles[pair[1]]]
        if not pairs:
            return
        images = {name for name in self.all if holds_images(self.root / name)}
        of_classes = {name for name in roles if _shape(self.root / name) == "classes"}
        for pair in pairs:
            look = f"{where} has {pair[0]}/ and {pair[1]}/"
            if of_classes.issuperset(pair):
                raise UserError(
                    f"{look} with folders in them, which look like splits, not classes; call them train/, val/ or"
                    " test/."
                )
            alike = beside_roles(pair[0]) == beside_roles(pair[1])  # not of "train_station" and "test_tube"
            if images.issuperset(pair) and (alike or images <= roles.keys()):
                raise UserError(
                    f"{look}, which look like splits, not classes; move the images of each class into a folder of its"
                    " own, as in train/cat/, or list them with --labels FILE.csv. If they are classes, rename them."
                )


def _shape(folder: Path) -> Literal["classes", "flat", "empty"]:
    images = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_junk(entry.name):
                    continue
                if entry.is_dir():
                    return "classes"
                images = images or is_image(entry.name)
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}.") from None
    return "flat" if images else "empty"


def _beside(others: list[str]) -> str:
    return f"{others[0]}/" + (f" and {len(others) - 1:,} more" if len(others) > 1 else "")


def _named(name: str, names: list[str], where: str, mark: str, flat: str) -> str:
    same = [name] if name in names else [each for each in names if each.casefold() == name.casefold()]
    if not same and (role := role_of(name)):
        same = [each for each in names if role_of(each) == role]
    if len(same) != 1:
        there = ", ".join(f"{each}{mark}" for each in names) or "none"
        raise UserError(f"--val_split {name}: {where} has {there}.{did_you_mean(name, names)}{flat}")
    return same[0]


def _written(names: Iterable[str], mark: str, between: str = ", ") -> str:
    return between.join(f"{name}{mark}" for name in names)
