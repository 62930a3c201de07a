"""Writing to disk whole or not at all: a reader never meets half a checkpoint, whatever kills the writer.

What is written goes to a hidden sibling first (`.NAME.effnet_hf-XXXXXXXX.tmp`, same file system, so that a rename is
atomic), is flushed to the disk, and is renamed into place. What is removed is first renamed likewise, to `….gone`.
When the body raises, the sibling is removed and the target is as it was; what a killed process left, the next one
clears away.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO

from .errors import UserError, printable, why_not_written
from .lock import held, is_left
from .manifest import MANIFEST, foreign_file, read_manifest, write_manifest
from .run_folder import RunFolder, made_by_a_run


_HIDDEN = re.compile(r"\.(.+)\.effnet_hf-[0-9a-f]{8}\.(tmp|old|gone)")
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EACCES, errno.EISDIR)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # fcntl.h, linux/fs.h


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike, overwrite: bool = False, ours: bool = False) -> Iterator[Path]:
    """Yields an empty folder to fill; it becomes `target` when the body ends without an exception, with a manifest.

    An existing, non-empty `target` is replaced only with `overwrite=True`, and where its manifest names all that is in
    it. Where the file system can, the two change places in one step, so that `target` is there at every moment;
    elsewhere it is renamed aside first and deleted last. A symbolic link is followed, not replaced; a mount point,
    which nothing can take the place of, is filled file by file, its manifest last.

    Args:
        ours: `target` is the name of a part of a run's folder, which the run has locked and whose content is its own.

    Raises:
        UserError: `target` is a file, or is a non-empty folder that may not be replaced, or cannot be written, or
            another process is writing it.
    """
    target = _real(target)
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write to.")
    if not ours:
        _refuse_a_part_of_a_run(target)
    lock, mounted = lock_beside(target), os.path.ismount(target)
    if mounted:
        lock = RunFolder(target).lock
    with _new_parents(target) as parent, contextlib.ExitStack() as stack:
        place = target if mounted else parent  # of everything hidden
        if not ours:
            with writing(target):
                stack.enter_context(held(lock, str(target)))
            recover(place, lambda name: name == target.name or is_left(lock_beside(place / name)))
            _refuse_to_replace(target, overwrite)
        temporary = _sibling(place / target.name, "tmp")
        try:
            with writing(target):
                os.mkdir(temporary)
                yield temporary
                write_manifest(temporary)
                _sync_tree(temporary)
                if not ours:
                    _refuse_to_replace(target, overwrite)  # what has come there meanwhile
                if mounted:
                    _fill(target, temporary)
                else:
                    _put_in_place(temporary, target)
                _sync(place)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def require_place(target: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises `UserError` where `atomic_folder` would, before work that would be in vain; by trying it, of which nothing
    is left."""

    class Tried(Exception):
        pass

    with contextlib.suppress(Tried), atomic_folder(target, overwrite):
        raise Tried


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w") -> Iterator[IO]:
    """Yields an open file, UTF-8 in text modes; it replaces `path` when the body ends without an exception.

    Args:
        mode: `"w"` or `"wb"`.

    Raises:
        UserError: `path` is a folder or cannot be written.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_write writes a new file: mode must be 'w' or 'wb', got {mode!r}.")
    stream = os.path.abspath(path).startswith(("/dev/std", "/dev/fd/", "/proc/"))
    path = _real(path)
    if path.is_dir():
        raise UserError(f"{path} is a folder; name a file to write to.")
    if _is_console(path):
        raise UserError(f"{path} is where this command's own lines go; name another file to write to.")
    if stream or path.exists() and not path.is_file():
        raise UserError(f"{path} is a device or a pipe, which would be replaced; name a file to write to.")
    with _new_parents(path) as parent:
        temporary = _sibling(path, "tmp")
        try:
            with writing(path):
                with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
                    yield handle
                    handle.flush()
                    flush(handle.fileno())
                os.replace(temporary, path)
                _sync(parent)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Says in one sentence why `path` cannot be written, whoever writes it: Python, safetensors, or torch.

    Raises:
        UserError: a full disk, no permission, a name that is too long, a folder that is gone, …
    """
    try:
        yield
    except Exception as error:
        reason = why_not_written(error)
        if reason is None or isinstance(error, UserError):
            raise
        place = error.filename2 or error.filename if isinstance(error, OSError) else ""  # of a copy, where to
        place = place if isinstance(place, str) else ""
        about = f" ({place})" if place and _HIDDEN.search(place) is None and place != str(path) else ""
        raise UserError(f"cannot write {path}: {reason}{about}.") from error


def link_tree(source: Path, target: Path) -> None:
    """Puts the files of a folder into another one that exists, as second names where the file system has such: they are
    never changed in place. Its folders are new, whatever may be done to the old ones."""
    for root, _, names in os.walk(source):
        place = target / Path(root).relative_to(source)
        place.mkdir(exist_ok=True)
        for name in names:
            link(Path(root, name), place / name)


def link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system knows one name only."""
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)  # not its times and modes, which such a file system lacks as well


def remove(path: Path) -> None:
    """Removes a file or folder that is ours; of a symbolic link the link. Killed in between, nothing of it is seen.

    Raises:
        UserError: it cannot be removed.
    """
    try:
        if not os.path.lexists(path):
            return
        gone = _sibling(path, "gone")
        os.rename(path, gone)
        _delete(gone)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}.") from error


def meant(name: str) -> str:
    """The name that a hidden file or folder of ours stands for, or will; any other name is its own."""
    hidden = _HIDDEN.fullmatch(name)
    return hidden[1] if hidden else name


def refuse_to_remove(target: str | os.PathLike, sources: Mapping[str, str | os.PathLike | None]) -> None:
    """Raises `UserError` where one of `sources`, by what they are called, is `target` or lies in it: overwriting would
    remove what is read."""
    place = os.path.realpath(target)
    for what, source in sources.items():
        if source and os.path.exists(source) and Path(os.path.realpath(source)).is_relative_to(place):
            raise UserError(f"{target} holds {what} {source}, which overwriting would remove; name another place.")


def recover(folder: Path, concerns: Callable[[str], bool]) -> None:
    """Clears away what killed processes left in `folder` of the names that `concerns` says: a target moved aside is
    put back, the rest is removed."""
    with contextlib.suppress(OSError):
        found = [(path, match) for path in sorted(folder.iterdir()) if (match := _HIDDEN.fullmatch(path.name))]
        for path, match in found:
            if match[2] == "old" and concerns(match[1]) and not os.path.lexists(folder / match[1]):
                os.rename(path, folder / match[1])
        for path, match in found:
            if concerns(match[1]) and os.path.lexists(path):
                with contextlib.suppress(OSError):
                    _delete(path)


def lock_beside(folder: Path) -> Path:
    """The lock file of a folder that is replaced as a whole."""
    if not folder.name:
        raise UserError(f"{folder} is the root of the file system; name a folder in it.")
    return folder.with_name(f".{folder.name}.lock")


def make_folders(missing: list[Path]) -> None:
    """Creates folders, the innermost being the first; however deep (`Path.mkdir` calls itself)."""
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)


def _real(path: str | os.PathLike) -> Path:
    if not os.fspath(path):
        raise UserError("the place to write to is empty; name one.")
    if "\0" in os.fspath(path):
        raise UserError(f"{printable(os.fspath(path))} is no path: it holds a null character.")
    return Path(os.path.realpath(path))


def _is_console(path: Path) -> bool:
    """Whether standard output or error go to this file, by `>` or under a name such as /dev/stdout."""
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return True
    return False


def _refuse_a_part_of_a_run(target: Path) -> None:
    for folder in target.parents:
        part = target.relative_to(folder).parts[0]
        if made_by_a_run(folder) and RunFolder.is_a_runs_name(part):
            raise UserError(f"{target} is a part of the run in {folder}; name a folder outside {folder / part}.")


def _refuse_to_replace(target: Path, overwrite: bool) -> None:
    if not target.is_dir() or not _content(target):
        return
    if not overwrite:
        raise UserError(
            f"{target} already exists and is not empty; name another folder, or add --overwrite (in Python"
            " overwrite=True)."
        )
    refuse_foreign(target)


def refuse_foreign(target: Path, edited: bool = False) -> None:
    """Raises `UserError` where a folder holds what was not written here; with `edited`, also where such was changed."""
    if foreign := foreign_file(target, but_hidden=os.path.ismount(target), edited=edited):
        raise UserError(
            f"{target} holds what was not written here, e.g. {printable(foreign)}, and overwriting would remove it;"
            " move it away, or name another folder."
        )


def _content(folder: Path) -> list[str]:
    """What lies in it; in a mount point but for what is hidden, and what a file system keeps there for itself."""
    names = os.listdir(folder)
    return [name for name in names if name[0] != "." and name != "lost+found"] if os.path.ismount(folder) else names


def _fill(target: Path, temporary: Path) -> None:
    """Moves the content of `temporary` into a mount point, in the place of what an earlier manifest names there."""
    with contextlib.suppress(UserError):
        for name in read_manifest(target):
            remove(target / name)
    remove(target / MANIFEST)
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == MANIFEST):
        os.rename(path, target / path.name)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        try:
            shutil.rmtree(path)
        except PermissionError:  # a checkpoint that its owner protected against writing
            for root, _, _ in os.walk(path):
                os.chmod(root, 0o700)
            shutil.rmtree(path)
    else:
        path.unlink()


def _sibling(path: Path, ending: str) -> Path:
    # Not tempfile.mkdtemp: its folders are 0700, and the finished one should follow the user's umask.
    return path.with_name(f".{path.name}.effnet_hf-{secrets.token_hex(4)}.{ending}")


def _put_in_place(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.replace(temporary, target)
        return
    if exchange(temporary, target):  # the caller deletes what is `temporary` now
        return
    old = _sibling(target, "old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    shutil.rmtree(old)


def exchange(one: Path, other: Path) -> bool:
    """Lets two paths change places in one step; False where the system or the file system cannot.

    Own code: Python has no name for Linux's renameat2.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


@contextlib.contextmanager
def _new_parents(path: Path) -> Iterator[Path]:
    """Creates the missing folders above `path`, and removes them again if the body raises."""
    with writing(path):
        missing = [parent for parent in path.parents if not parent.exists()]
        existing = path.parents[len(missing)]
        if not existing.is_dir():
            raise UserError(f"cannot write {path}: {existing} is a file.")
        make_folders(missing)
    try:
        yield path.parent
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # somebody else has put something there since
                parent.rmdir()
        raise


def _sync_tree(folder: Path) -> None:
    readers = folder.stat().st_mode & 0o666  # what the umask leaves; safetensors makes files that only we could read
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError, NotImplementedError):  # a file system without modes
                os.chmod(Path(root, name), os.stat(Path(root, name)).st_mode | readers)
            _sync(Path(root, name))
        _sync(Path(root))


def _sync(path: Path) -> None:
    """Asks the operating system to put a file, or a folder's list of names, on the disk now."""
    if path.is_symlink() or os.name == "nt" and path.is_dir():  # Windows has no handle for a folder
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in _NO_FSYNC:
            return
        raise
    try:
        flush(descriptor)
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """`os.fsync`, where the file system has it."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FSYNC:  # some network and FUSE file systems have no fsync, and some none for folders
            raise
