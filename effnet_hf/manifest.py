"""`manifest.json`: size and SHA-256 of every file of a folder, written last and checked before anything is loaded."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from .errors import UserError, printable


MANIFEST = "manifest.json"
_FORMAT = 1
_LARGEST = 64 << 20  # bytes of a manifest; a file in it takes 150


def write_manifest(folder: Path) -> None:
    """Describes all files of the folder as they are now, those in folders below it too."""
    text = _text({name: _describe(folder / name) for name in sorted(_files(folder))})
    (folder / MANIFEST).unlink(missing_ok=True)  # which may be a link to another folder's
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def described_anew(folder: Path, names: list[str]) -> str:
    """The folder's manifest with these files as they are now, and the others as they were.

    Raises:
        UserError: there is none, or it is damaged; the message is the end of a sentence about the folder.
    """
    return _text({**read_manifest(folder), **{name: _describe(folder / name) for name in names}})


def problem(folder: Path, only: tuple[str, ...] | None = None, read: re.Pattern | None = None) -> str | None:
    """What differs from the manifest, as the end of a sentence about the folder; None where all is as it was written.

    Args:
        only: look at the files of these names, as far as there are any, and at no others.
        read: a pattern of names that somebody would read: none of these may lie there that the manifest has not.
    """
    try:
        files = read_manifest(folder)
    except UserError as error:
        return str(error)
    for name, expected in files.items():
        if only is not None and name not in only:
            continue
        try:
            status = os.stat(folder / name)
            if not stat.S_ISREG(status.st_mode):
                return f"{printable(name)} is no file"
            size = status.st_size
            if size != expected["size"]:
                return f"{printable(name)} has {size:,} bytes, {expected['size']:,} were written"
            if _describe(folder / name) != expected:
                return f"{printable(name)} is not what was written: its SHA-256 differs"
        except FileNotFoundError:
            return f"{printable(name)} is missing"
        except OSError as error:
            return f"{printable(name)} cannot be read: {error.strerror}"
    there = only or ()
    if read is not None:
        there = tuple(filter(read.fullmatch, sorted(_files(folder))))
    for name in there:
        if name not in files and os.path.lexists(folder / name):
            return f"{printable(name)} is not in its {MANIFEST}"
    return None


def read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    """`{"size", "sha256"}` of every file, by its name in the folder.

    Raises:
        UserError: there is none, or it is damaged itself; the message is the end of a sentence about the folder.
    """
    try:
        if not (folder / MANIFEST).is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError
        if (folder / MANIFEST).stat().st_size > _LARGEST:
            raise ValueError
        text = (folder / MANIFEST).read_text("utf-8")
        found = json.loads(text)["files"]
        files = {name: {"size": int(each["size"]), "sha256": str(each["sha256"])} for name, each in found.items()}
        # Byte for byte what we would write, so that no damaged bit of it passes.
        if _text(files) == text and all(map(_lies_below, files)):
            return files
    except FileNotFoundError:
        raise UserError(f"it has no {MANIFEST}") from None
    except OSError as error:
        raise UserError(f"its {MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise UserError(f"its {MANIFEST} is damaged")


def foreign_file(folder: Path, but_hidden: bool = False, edited: bool = False) -> str | None:
    """A file in the folder that its manifest does not name, `but_hidden` ones: somebody else put it there.

    Args:
        edited: also one that is no longer what the manifest says.
    """
    try:
        own = {MANIFEST, *read_manifest(folder)}
    except UserError:
        own = set()
    found = (name for name in sorted(_files(folder)) if not (but_hidden and name.startswith(".")))
    return next((name for name in found if name not in own or edited and problem(folder, only=(name,))), None)


def _files(folder: Path) -> list[str]:
    found = (Path(root, name) for root, _, names in os.walk(folder) for name in names)
    return [path.relative_to(folder).as_posix() for path in found if path != folder / MANIFEST]


def _describe(path: Path) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            size += len(chunk)
    return {"size": size, "sha256": digest.hexdigest()}


def _text(files: dict) -> str:
    own = hashlib.sha256(json.dumps(files).encode()).hexdigest()  # so that a damaged manifest blames no other file
    return json.dumps({"format": _FORMAT, "files": files, "sha256": own}, indent=1) + "\n"


def _lies_below(name: str) -> bool:
    """Whether a file of that name is one of the folder's. Raises `ValueError` for what no file can be called."""
    return b"\0" not in os.fsencode(name) and not os.path.isabs(name) and ".." not in Path(name).parts
