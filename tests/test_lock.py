"""One writer at a time: against processes, machines, and file systems that keep no locks."""

import json
import os
import signal
import socket
import threading
import time
import warnings

import pytest

from effnet_hf import lock
from effnet_hf.errors import UserError
from effnet_hf.lock import held, is_held, is_left


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


def holder(path, ready) -> int:
    """A forked process that holds the lock until it is killed."""
    pid = os.fork()
    if pid == 0:
        with held(path, "the folder"):
            os.write(ready, b"x")
            signal.pause()
    return pid


@pytest.mark.parametrize("flock", [True, False], ids=["flock", "no flock"])
def test_another_process_is_refused_by_name_until_it_ends(path, monkeypatch, flock):
    if not flock:
        monkeypatch.setattr(lock, "fcntl", None)
    readable, writable = os.pipe()
    pid = holder(path, writable)
    os.read(readable, 1)
    try:
        with pytest.raises(
            UserError, match=f"the folder is in use by another process \\(pid {pid} on {socket.gethostname()}\\)"
        ):
            with held(path, "the folder"):
                raise AssertionError("two at once")
        assert not is_left(path)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(readable)
        os.close(writable)
    assert path.exists()  # a killed process removes nothing
    assert is_left(path) is flock  # without the system's lock nobody here can tell
    with held(path, "the folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not path.exists() and not is_left(path)
    path.write_text("mine")
    assert not is_left(path)


def test_the_lock_of_another_is_not_removed(tmp_path):
    """The folder was replaced, and another process has begun in the new one."""
    (tmp_path / "a").mkdir()
    with held(tmp_path / "a/.lock", "a"):
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").mkdir()
        (tmp_path / "a/.lock").write_text("another's")
    assert (tmp_path / "a/.lock").read_text() == "another's"


def test_the_same_process_twice_is_refused(path):
    with held(path, "the folder"):
        with pytest.raises(UserError, match="in use"):
            with held(path, "the folder"):
                raise AssertionError("two at once")
    with held(path, "the folder"):
        pass


def test_a_forked_child_does_not_keep_the_lock_of_a_killed_parent(path):
    """Loader processes outlive a killed trainer by seconds; its restart must not wait for them."""
    readable, writable = os.pipe()
    parent = os.fork()
    if parent == 0:
        warnings.simplefilter("ignore")  # Python 3.12 knows that the lock has a thread
        with held(path, "the folder"):
            if os.fork() == 0:
                os.write(writable, f"{os.getpid()}\n".encode())
                signal.pause()
            signal.pause()
    child = int(os.read(readable, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    try:
        with held(path, "the folder"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_living_writer_on_another_machine_is_refused_and_a_dead_one_is_not(path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "BEAT", 0.2)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    with held(path, "the folder"):
        assert json.loads(path.read_text())["host"] == socket.gethostname()
    assert "waiting 0 s for a sign of its last writer (pid 7 on elsewhere)" in capsys.readouterr().err

    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    stop = threading.Event()

    def live():
        while not stop.wait(0.02):
            os.utime(path)

    living = threading.Thread(target=live)
    living.start()
    try:
        with pytest.raises(
            UserError, match=r"pid 7 on elsewhere\); wait, name another, or remove .*\.lock if it is dead"
        ):
            with held(path, "the folder"):
                raise AssertionError("two at once")
    finally:
        stop.set()
        living.join()

    os.utime(path, (time.time() - 3600,) * 2)  # nobody waits for one that has been silent for an hour
    started = time.monotonic()
    with held(path, "the folder"):
        assert time.monotonic() - started < 0.2


def test_a_holder_gives_signs_of_life(path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.02)
    with held(path, "the folder"):
        os.utime(path, (0, 0))
        end = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.01)
        assert path.stat().st_mtime > 0


@pytest.mark.parametrize("kind", ["text", "JSON", "other JSON", "link", "pipe", "long"])
def test_what_is_no_lock_is_left_alone(path, kind, tmp_path):
    content = {"text": "precious", "JSON": "[]", "other JSON": '{"host": 1, "pid": 2}', "long": "x" * 10_000}
    if kind == "link":
        (tmp_path / "precious").write_text("")
        path.symlink_to(tmp_path / "precious")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.write_text(content[kind])
    with pytest.raises((UserError, OSError), match="is no lock file of ours|symbolic links"):
        with held(path, "the folder"):
            raise AssertionError("taken for a lock")
    assert os.path.lexists(path) and (kind not in content or path.read_text() == content[kind])
    if kind == "link":
        assert (tmp_path / "precious").read_text() == ""


def test_an_empty_lock_file_is_nobodys(path):
    path.touch()  # killed before it was written
    with held(path, "the folder"):
        assert is_held(path)
        path.rename(path.with_name("moved"))
        path.touch()
        assert not is_held(path)
