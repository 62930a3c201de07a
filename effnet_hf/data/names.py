"""What the names of files and folders mean, for every command alike: images, splits, and what systems leave behind."""

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


def role_of(name: str) -> Role | None:
    """What a split of that name is for, in any case; None for any other name."""
    return _ROLES.get(name.casefold())


def roles_in(name: str) -> set[Role]:
    """What the words of a name speak of: `training_set`, `val2017`."""
    return {role for word in re.findall("[a-z]+", name.casefold()) if (role := _ROLES.get(word))}


_ROLES: dict[str, Role] = {name: role for role, names in SPLIT_NAMES.items() for name in names}
