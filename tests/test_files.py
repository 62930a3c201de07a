import os
import signal
import stat
import subprocess
import sys

import pytest

from effnet_hf import files
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder, atomic_write


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_folder_appears_whole(tmp_path):
    target = tmp_path / "a" / "b"
    with atomic_folder(target) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert not target.exists()
    assert (target / "sub" / "x").read_text() == "1"
    assert names(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_failure_leaves_nothing(tmp_path, error):
    with pytest.raises(error):
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "x").write_text("1")
            raise error
    with pytest.raises(error):
        with atomic_write(tmp_path / "c" / "d.json") as handle:
            handle.write("1")
            raise error
    assert names(tmp_path) == []


def test_failure_keeps_the_old_content(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("old")
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError
    with pytest.raises(RuntimeError):
        with atomic_write(tmp_path / "f") as handle:
            handle.write("new")
            raise RuntimeError
    assert names(tmp_path) == ["a", "f"] and names(target) == ["old"]
    assert (tmp_path / "f").read_text() == "old"


def test_overwriting_a_folder_is_asked_for(tmp_path):
    target = tmp_path / "a"
    target.mkdir()
    with atomic_folder(target) as folder:  # an empty folder is as good as none
        (folder / "old").write_text("old")
    with pytest.raises(UserError, match="already exists and is not empty"):
        with atomic_folder(target):
            raise AssertionError("the body must not run")
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "new").write_text("new")
    assert names(target) == ["new"] and names(tmp_path) == ["a"]


def test_rename_that_fails_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "a"
    target.mkdir()
    (target / "old").write_text("old")
    replace = os.replace

    def refuse(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        replace(source, destination)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(OSError, match="no"):
        with atomic_folder(target, overwrite=True):
            pass
    assert names(tmp_path) == ["a"] and names(target) == ["old"]


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == ["x"]


def test_text_is_utf8_and_binary_is_binary(tmp_path):
    with atomic_write(tmp_path / "t") as handle:
        handle.write("großer Panda")
    with atomic_write(tmp_path / "b", "wb") as handle:
        handle.write(b"\x00\x01")
    assert (tmp_path / "t").read_bytes() == "großer Panda".encode()
    assert (tmp_path / "b").read_bytes() == b"\x00\x01"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with atomic_folder(tmp_path / "a") as folder:
            (folder / "x").write_text("1")
            (folder / "x").chmod(0o600)  # as safetensors leaves its files
        with atomic_write(tmp_path / "f") as handle:
            handle.write("1")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a" / "x").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


def test_everything_is_flushed_before_the_rename(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(files.os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(files.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    assert events == ["fsync", "fsync", "rename", "fsync"]  # file, folder; then the parent's entry
    events.clear()
    with atomic_write(tmp_path / "f") as handle:
        handle.write("1")
    assert events == ["fsync", "rename", "fsync"]


def test_wrong_targets_are_user_errors(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        with atomic_folder(tmp_path / "file"):
            pass
    with pytest.raises(UserError, match="is a folder"):
        with atomic_write(tmp_path):
            pass
    with pytest.raises(UserError, match="Cannot write .*file is a file"):
        with atomic_write(tmp_path / "file" / "x"):
            pass
    with pytest.raises(UserError, match="Cannot write .*name too long"):
        with atomic_folder(tmp_path / ("x" * 255)):
            pass
    with pytest.raises(ValueError, match="mode must be"):
        with atomic_write(tmp_path / "x", "a"):
            pass
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_writer_leaves_no_target(tmp_path):
    code = (
        "import sys, time; from effnet_hf.files import atomic_folder\n"
        "with atomic_folder(sys.argv[1]) as folder:\n"
        "    (folder / 'x').write_text('1'); print('ready', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "a")], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert not (tmp_path / "a").exists()


def test_recover_puts_back_what_was_moved_aside_and_removes_the_rest(tmp_path):
    for name in (".best.12ab.old", ".best.34cd.tmp", "kept", ".kept.56ef.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    files.recover(tmp_path)
    assert names(tmp_path) == ["best", "kept"]
    assert [(tmp_path / name / "x").read_text() for name in ("best", "kept")] == [".best.12ab.old", "kept"]
