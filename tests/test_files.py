import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import time

import pytest
import torch
from safetensors.torch import save_file

from effnet_hf import files
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder, atomic_write
from effnet_hf.manifest import MANIFEST, problem
from effnet_hf.run_folder import MARK


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
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    (tmp_path / "f").write_text("old")
    with pytest.raises(RuntimeError):
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "new").write_text("new")
            raise RuntimeError
    with pytest.raises(RuntimeError):
        with atomic_write(tmp_path / "f") as handle:
            handle.write("new")
            raise RuntimeError
    assert names(tmp_path) == ["a", "f"] and names(target) == [MANIFEST, "old"]
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
    assert names(target) == [MANIFEST, "new"] and names(tmp_path) == ["a"]


def test_overwriting_removes_only_what_was_written_here(tmp_path):
    target = tmp_path / "a"
    with atomic_folder(target) as folder:
        (folder / "ours").write_text("1")
    (target / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt, and overwriting would remove it"):
        with atomic_folder(target, overwrite=True):
            raise AssertionError("the body must not run")
    assert (target / "notes.txt").read_text() == "mine"
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "x").write_text("mine")
    with pytest.raises(UserError, match="holds what was not written here, e.g. x"):
        with atomic_folder(tmp_path / "foreign", overwrite=True):
            raise AssertionError("the body must not run")
    for empty in ("", b"".decode()):
        with pytest.raises(UserError, match="is empty"):
            with atomic_folder(empty, overwrite=True):
                raise AssertionError("the body must not run")


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_replaced_folder_is_there_at_every_moment_or_comes_back(tmp_path, monkeypatch, exchanges):
    """Killed between any two changes of names, the next writer in that folder finds the old content or the new."""
    if not exchanges:
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    rename, replace, found = os.rename, os.replace, set()

    def write(content: str) -> None:
        with atomic_folder(tmp_path / "work" / "a", overwrite=True) as folder:
            (folder / "x").write_text(content)

    def killing(function, left: list):
        def change(one, other):
            if len(left) == 1:  # and from here on nothing happens any more
                raise SystemExit
            left.pop()
            function(one, other)

        return change

    for event in range(1, 4):
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        write("old")
        left = [None] * event
        with monkeypatch.context() as patch:
            for name, function in (("replace", replace), ("rename", rename)):
                patch.setattr(files.os, name, killing(function, left))
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # a killed process removes nothing
            with contextlib.suppress(SystemExit):
                write("new")
        (tmp_path / "work" / ".a.lock").touch()  # as one that is killed leaves it
        with atomic_folder(tmp_path / "work" / "other"):
            pass
        found.add((tmp_path / "work/a/x").read_text())
        assert names(tmp_path / "work") == [".a.lock", "a", "other"]
    assert found == ({"new"} if exchanges else {"old", "new"})


def test_rename_that_fails_restores_the_old_folder(tmp_path, monkeypatch):
    target = tmp_path / "a"
    with atomic_folder(target) as folder:
        (folder / "old").write_text("old")
    monkeypatch.setattr(files, "exchange", lambda one, other: False)
    replace = os.replace

    def refuse(source, destination):
        if str(source).endswith(".tmp"):
            raise OSError("no")
        replace(source, destination)

    monkeypatch.setattr(files.os, "replace", refuse)
    with pytest.raises(UserError, match="cannot write .*a: no"):
        with atomic_folder(target, overwrite=True):
            pass
    assert names(tmp_path) == ["a"] and names(target) == [MANIFEST, "old"]


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_folder(tmp_path / "link") as folder:
        (folder / "x").write_text("1")
    assert (tmp_path / "link").is_symlink() and names(tmp_path / "real") == [MANIFEST, "x"]


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
    assert events == ["fsync", "fsync", "fsync", "rename", "fsync"]  # file, manifest, folder; then the parent's entry
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
    with pytest.raises(UserError, match="cannot write .*file is a file"):
        with atomic_write(tmp_path / "file" / "x"):
            pass
    with pytest.raises(UserError, match="cannot write .*name too long"):
        with atomic_folder(tmp_path / ("x" * 255)):
            pass
    with pytest.raises(ValueError, match="mode must be"):
        with atomic_write(tmp_path / "x", "a"):
            pass
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_killed_writer_leaves_no_target(tmp_path):
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            with atomic_folder(tmp_path / "a") as folder:
                (folder / "x").write_text("1")
                os.write(writing, b"1")
                time.sleep(60)
        finally:
            os._exit(1)
    os.close(writing)
    with open(reading, "rb") as pipe:
        assert pipe.read(1) == b"1"
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    assert not (tmp_path / "a").exists() and names(tmp_path) != []


def test_recover_puts_back_what_was_moved_aside_and_removes_the_rest(tmp_path):
    hidden = (
        ".best.effnet_hf-12ab34cd.old",
        ".best.effnet_hf-34cd34cd.tmp",
        ".kept.effnet_hf-56ef56ef.old",
        ".kept.effnet_hf-56ef56ef.gone",
        ".his.effnet_hf-56ef56ef.tmp",
    )
    for name in ("kept", ".best.mine.old", *hidden):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(name)
    files.recover(tmp_path, lambda name: name != "his")
    assert names(tmp_path) == [".best.mine.old", ".his.effnet_hf-56ef56ef.tmp", "best", "kept"]
    assert [(tmp_path / name / "x").read_text() for name in ("best", "kept")] == [
        ".best.effnet_hf-12ab34cd.old",
        "kept",
    ]


def test_what_is_removed_is_out_of_sight_at_once(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_text("1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    files.remove(tmp_path / "link")
    files.remove(tmp_path / "missing")
    assert names(tmp_path) == ["a", "elsewhere"] and names(tmp_path / "elsewhere") == ["mine"]

    def killed(*_, **__):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(SystemExit):
            files.remove(tmp_path / "a")
    assert not (tmp_path / "a").exists() and len(names(tmp_path)) == 2
    files.recover(tmp_path, lambda name: True)
    assert names(tmp_path) == ["elsewhere"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_without_fsync_and_modes_is_written_to(tmp_path, monkeypatch, code):
    def lacks(*_):
        raise OSError(code, os.strerror(code))

    def forbidden(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(files.os, "fsync", lacks)
    monkeypatch.setattr(files.os, "chmod", forbidden)
    with atomic_folder(tmp_path / "a") as folder:
        (folder / "x").write_text("1")
    with atomic_write(tmp_path / "f") as handle:
        handle.write("1")
    assert problem(tmp_path / "a") is None and (tmp_path / "f").read_text() == "1"


def _full(kind: str):
    if kind == "safetensors":
        save_file({"x": torch.zeros(1 << 20)}, "/dev/full/x")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/somewhere/else")


def test_whoever_writes_the_sentence_says_what_and_why(tmp_path):
    with pytest.raises(UserError, match=r"^cannot write .*a: No space left on device \(/somewhere/else\)\.$"):
        with atomic_folder(tmp_path / "a"):
            _full("OSError")
    with pytest.raises(UserError, match=r"^cannot write .*a: Not a directory\.$"):
        with atomic_folder(tmp_path / "a"):
            _full("safetensors")
    with pytest.raises(ValueError, match="a bug"):
        with atomic_folder(tmp_path / "a"):
            raise ValueError("a bug")
    assert names(tmp_path) == []


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting needs root")
@pytest.mark.parametrize("kib", [4, 64, 600])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, kib):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", disk], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    try:
        for write in (
            lambda folder: save_file({"x": torch.zeros(1 << 20)}, folder / "x"),
            lambda folder: torch.save({"x": torch.zeros(1 << 20)}, folder / "x"),
            lambda folder: (folder / "x").write_bytes(bytes(1 << 20)),
        ):
            with pytest.raises(UserError, match=r"^cannot write .*disk/a: ") as raised:
                with atomic_folder(disk / "a") as folder:
                    write(folder)
            assert "\n" not in str(raised.value)
            assert names(disk) == []
        with pytest.raises(UserError, match="cannot write .*No space left"):
            with atomic_write(disk / "f", "wb") as handle:
                handle.write(bytes(1 << 20))
        assert names(disk) == []
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_hidden_files_of_others_beside_a_target_stay(tmp_path):
    """Some programs hide dated copies; a date is eight hexadecimal digits."""
    theirs = [".bashrc.20261126.old", ".keys.deadbeef.gone", ".notes.20261126.tmp", ".ema.effnet_hf-0123abcd.tmp"]
    for name in theirs:
        (tmp_path / name).touch()
    with atomic_folder(tmp_path / "notes"):
        pass
    assert names(tmp_path) == sorted([*theirs, "notes"])  # the last is of a run that is writing it, and locks elsewhere


@pytest.mark.parametrize("flock", [True, False])
def test_what_a_killed_writer_left_beside_goes_with_the_next(tmp_path, monkeypatch, flock):
    if not flock:
        monkeypatch.setattr("effnet_hf.lock.fcntl", None)
    left = [".a.effnet_hf-0123abcd.tmp", ".other.effnet_hf-0123abcd.tmp"]
    for name in left:
        (tmp_path / name).mkdir()
    (tmp_path / ".other.lock").write_text('{"host": "x", "pid": 1}')
    with atomic_folder(tmp_path / "a"):
        pass
    assert names(tmp_path) == sorted([".other.lock", *([] if flock else left[1:]), "a"])


def test_names_that_are_none_are_user_errors():
    for name in ("", "a\0b", "/"):
        for write in (atomic_folder, atomic_write):
            with pytest.raises(UserError, match="empty|null character|root of the file system|is a folder"):
                with write(name):
                    raise AssertionError("written")


def test_what_is_read_is_not_removed(tmp_path):
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a")
    for target in (tmp_path / "a", tmp_path / "a/model", tmp_path / "link"):
        with pytest.raises(UserError, match="holds --model .*model, which overwriting would remove"):
            files.refuse_to_remove(target, {"--data_dir": None, "--model": tmp_path / "a/model"})
    files.refuse_to_remove(tmp_path / "a/model/onnx", {"--model": tmp_path / "a/model"})
    files.refuse_to_remove(tmp_path / "a", {"--model": "me/on-the-hub"})


def test_a_part_of_a_run_is_replaced_by_no_command(tmp_path):
    (tmp_path / MARK).touch()
    for part in ("checkpoints", "checkpoints/update-00000008", "ema", "plots/x"):
        with pytest.raises(UserError, match=f"{part} is a part of the run in {tmp_path}"):
            with atomic_folder(tmp_path / part, overwrite=True):
                raise AssertionError("written")
    with atomic_folder(tmp_path / "onnx"):
        pass
