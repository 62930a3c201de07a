"""One writer at a time, on this machine and on others that share its file system.

The lock is the operating system's (`flock`), which ends with its process, whatever ends that. Host and process id stand
in the file for file systems that keep no locks, or none between machines; the file's time is renewed while its writer
lives. Own code, because the libraries for it (filelock) have one of the two and not both.
"""

import contextlib
import json
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BEAT = 8.0  # seconds between two signs of life
_LARGEST = 4096  # bytes
_LONG_DEAD = 600.0  # without a sign for so long, a writer on another machine needs no second look
_PLAIN = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # no link to a file of others, no pipe to wait for
_held: set[int] = set()


@contextlib.contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Holds the lock file `path` while the body runs, and removes it.

    Args:
        what: the folder that it guards, for sentences.

    Raises:
        UserError: somebody else holds it.
    """
    descriptor, locked = _open(path, what)
    try:
        _refuse_other_machines(path, what, locked, _owner(os.pread(descriptor, _LARGEST, 0)))
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
    except BaseException:
        _close(descriptor)
        raise
    stop, owner = threading.Event(), os.getpid()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), name="lock", daemon=True)
    beat.start()
    try:
        yield
    finally:
        if os.getpid() == owner:  # not in a forked child that ends by an exception
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                if is_held(path):  # and not another's, where the folder was replaced meanwhile
                    path.unlink()  # before it is unlocked, so that nobody locks a file that is about to go
            _close(descriptor)


def is_left(path: Path) -> bool:
    """Whether a killed process left this lock file: it is there, it is one, and nobody on this machine holds it."""
    try:
        descriptor = os.open(path, os.O_RDWR | _PLAIN)
    except OSError:
        return False
    try:
        return _is_a_lock(descriptor) and _lock(descriptor)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)


def is_held(path: Path) -> bool:
    """Whether this process holds the lock file that lies there now, and not one that was moved away or removed."""
    try:
        there = os.stat(path)
    except OSError:
        return False
    return any(os.path.samestat(os.fstat(descriptor), there) for descriptor in _held)


def _is_a_lock(descriptor: int) -> bool:
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST:
        return False
    return not status.st_size or bool(_owner(os.pread(descriptor, _LARGEST, 0)))


def _open(path: Path, what: str) -> tuple[int, bool]:
    """The opened lock file and whether the operating system has locked it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _PLAIN, 0o666)
        _held.add(descriptor)
        if not _is_a_lock(descriptor):
            _close(descriptor)
            raise UserError(f"{path} is no lock file of ours; move it away, or name another folder.")
        try:
            locked = _lock(descriptor)
            there = os.stat(path)
        except BlockingIOError:
            owner = _owner(os.pread(descriptor, _LARGEST, 0))
            _close(descriptor)
            raise UserError(
                f"{what} is in use by another process{_named(owner)}; wait for it, or name another."
            ) from None
        except FileNotFoundError:  # its last holder has just removed it
            _close(descriptor)
            continue
        if os.path.samestat(os.fstat(descriptor), there):
            return descriptor, locked
        _close(descriptor)


def _lock(descriptor: int) -> bool:
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:  # this file system keeps no locks
        return False
    return True


def _refuse_other_machines(path: Path, what: str, locked: bool, owner: dict) -> None:
    """Raises `UserError` where the file names a living writer whom the operating system's lock did not stop."""
    here = owner.get("host") == socket.gethostname()
    if not owner or here and (locked or not _runs(owner["pid"])):
        return
    if not here:
        seen = path.stat().st_mtime
        if abs(time.time() - seen) > _LONG_DEAD:
            return
        print(f"{what}: waiting {2 * BEAT:.0f} s for a sign of its last writer{_named(owner)}", file=sys.stderr)
        end = time.monotonic() + 2 * BEAT
        while time.monotonic() < end and path.stat().st_mtime == seen:
            time.sleep(BEAT / 20)
        if path.stat().st_mtime == seen:
            return
    raise UserError(
        f"{what} is in use by another process{_named(owner)}; wait, name another, or remove {path} if it is dead."
    )


def _owner(content: bytes) -> dict:
    with contextlib.suppress(ValueError):
        owner = json.loads(content)
        if isinstance(owner, dict) and isinstance(owner.get("host"), str) and isinstance(owner.get("pid"), int):
            return owner
    return {}


def _named(owner: dict) -> str:
    return f" (pid {owner['pid']} on {owner['host']})" if owner else ""


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return pid != os.getpid()


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _close(descriptor: int) -> None:
    _held.discard(descriptor)
    os.close(descriptor)


def _let_go_in_a_child() -> None:
    """A forked child (a loader process) has the lock too, and would keep it when its parent is killed."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_a_child)
