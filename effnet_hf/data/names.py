"""What the names of files and folders mean, for every command alike: images, splits, and what systems leave behind."""

import contextlib
import os
import re
import unicodedata
from typing import Literal


Role = Literal["train", "val", "test"]
EXTENSIONS = frozenset(
    ".jpg .jpeg .jpe .jfif .jif .pjpeg .pjp .png .apng .webp .avif .gif .tif .tiff".split()
    + ".bmp .dib .ppm .pgm .pbm .pnm".split()
)
SPLIT_NAMES: dict[Role, tuple[str, ...]] = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
# Beside hidden files, `._1.jpg` and `.ipynb_checkpoints` among them. `@` and `#` are those of network storage.
_JUNK = frozenset(
    ["@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information", "lost+found", "__macosx"]
    + ["__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"]
)


def is_image(name: str) -> bool:
    """Whether a file has an image's ending."""
    return name[name.rfind(".") :].lower() in EXTENSIONS


def is_junk(name: str) -> bool:
    """Whether a file or folder is hidden, or of a system or a tool that leaves such things in everybody's folders."""
    return name[0] == "." or name.lower() in _JUNK


def one_spelling(name: str) -> str:
    """A name in NFC: macOS writes the same letters as others."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def as_on_disk(path: str, listed: dict[str, dict[str, str]]) -> str:
    """A path as the folders on it spell it; a name that is in none of them stays as it is.

    Args:
        listed: of each folder looked into, its names by spelling; it is added to.
    """
    found = os.sep if path.startswith(os.sep) else ""
    for name in path.split(os.sep):
        if not name.isascii():
            if found not in listed:
                names: list[str] = []
                with contextlib.suppress(OSError, ValueError):
                    names = os.listdir(found or os.curdir)
                listed[found] = {one_spelling(each): each for each in names} | {each: each for each in names}
            name = listed[found].get(name) or listed[found].get(one_spelling(name), name)
        found = os.path.join(found, name)
    return found


def role_of(name: str) -> Role | None:
    """What a split of that name is for, in any case; None for any other name."""
    return _ROLES.get(name.strip().casefold())


def roles_in(name: str) -> set[Role]:
    """What the words of a name speak of: `training_set`, `val2017`, `trainA`, `testdir`."""
    return {_SPOKEN[word] for word in _words(name) if word in _SPOKEN}


def beside_roles(name: str) -> list[str]:
    """The other words of a name, but for those that say nothing: none of `train_images`, `tube` of `test_tube`."""
    return [word for word in _words(name) if word and word not in _SPOKEN]


def _words(name: str) -> list[str]:
    found: list[str] = []
    for word in re.findall(r"[^\W\d_]+", name):
        plain = _without_filling(word)
        parts = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[^A-Z]+", word)  # as in "trainA"
        found += [plain] if plain in _SPOKEN else map(_without_filling, parts)
    return found


def _without_filling(word: str) -> str:
    return re.sub(f"({_FILLING})+$", "", word.casefold())


_FILLING = "sets?|dirs?|data|images?|imgs?|pictures|pics|folders?|files|splits?|parts?|samples?"
_ROLES: dict[str, Role] = {name: role for role, names in SPLIT_NAMES.items() for name in names}
# Names of no split of ours, and yet no classes beside another one.
_SPOKEN: dict[str, Role] = {**_ROLES, "evaluation": "val", "validate": "val", "holdout": "val", "tst": "test"}
