"""Writing to disk whole or not at all: a reader never meets half a checkpoint, whatever kills the writer.

Both helpers write to a hidden sibling (`.NAME.XXXXXXXX.tmp`, same file system, so that a rename is atomic), flush it
to the disk, and rename it into place. When the body raises, the sibling is removed and the target is as it was.
"""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from .errors import UserError


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` when the body ends without an exception.

    An existing, non-empty `target` is replaced only with `overwrite=True`: it is renamed aside first and deleted last,
    so its content exists on the disk at every moment. A symbolic link is followed, not replaced.

    Raises:
        UserError: `target` is a file, or is a non-empty folder and `overwrite` is False, or cannot be created.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write to.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(
            f"{target} already exists and is not empty; name another folder, or allow it to be overwritten."
        )
    with _new_parents(target) as parent:
        temporary = _sibling(target, "tmp")
        _or_user_error(target, os.mkdir, temporary)
        try:
            yield temporary
            _sync_tree(temporary)
            _put_in_place(temporary, target)
            _sync(parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Yields an open file, UTF-8 in text modes; it replaces `path` when the body ends without an exception.

    Args:
        mode: `"w"` or `"wb"`.

    Raises:
        UserError: `path` is a folder or cannot be created.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write writes a new file: mode must be 'w' or 'wb', got {mode!r}.")
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write to.")
    with _new_parents(path) as parent:
        temporary = _sibling(path, "tmp")
        handle = _or_user_error(path, open, temporary, mode, encoding=None if "b" in mode else "utf-8")
        try:
            with handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(temporary, path)
            _sync(parent)
        finally:
            temporary.unlink(missing_ok=True)


def recover(folder: Path) -> None:
    """Undoes what a killed `atomic_folder` left in `folder`: puts back a target moved aside, and removes the rest."""
    for path in folder.glob(".*.old"):
        target = path.with_name(path.name[1:].rsplit(".", 2)[0])
        if not target.exists():
            os.replace(path, target)
    for path in (*folder.glob(".*.tmp"), *folder.glob(".*.old")):
        shutil.rmtree(path, ignore_errors=True)


def _sibling(path: Path, ending: str) -> Path:
    # Not tempfile.mkdtemp: its folders are 0700, and the finished one should follow the user's umask.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{ending}")


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    old = _sibling(target, "old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _new_parents(path: Path) -> Iterator[Path]:
    """Creates the missing folders above `path`, and removes them again if the body raises."""
    missing = [parent for parent in path.parents if not parent.exists()]
    existing = path.parents[len(missing)]
    if not existing.is_dir():
        raise UserError(f"Cannot write {path}: {existing} is a file.")
    _or_user_error(path, path.parent.mkdir, parents=True, exist_ok=True)
    try:
        yield path.parent
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there since
                parent.rmdir()
        raise


def _or_user_error(path: Path, function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except OSError as error:
        raise UserError(f"Cannot write {path}: {error.strerror or error}.") from error


def _sync_tree(folder: Path) -> None:
    readers = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors makes files that only we could read
    for root, _, names in os.walk(folder):
        for name in names:
            os.chmod(Path(root, name), os.stat(Path(root, name)).st_mode | readers)
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Asks the operating system to put a file, or a folder's list of names, on the disk now."""
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder
        return
    if path.is_symlink():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
