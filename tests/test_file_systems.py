"""Targets that are no common files: devices, pipes, mount points, and file systems without modes and links."""

import errno
import os
import shutil
import stat
import subprocess

import pytest

from effnet_hf import files
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_folder, atomic_write
from effnet_hf.manifest import MANIFEST, problem

from .test_files import names


@pytest.mark.parametrize("where", ["device", "pipe", "link to a device", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
def test_a_device_or_a_pipe_is_not_replaced(tmp_path, where):
    path = tmp_path / where if where[0] != "/" else where
    if where == "pipe":
        os.mkfifo(path)
    elif where == "link to a device":
        path.symlink_to("/dev/full")
    elif where == "device":
        try:
            os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("only root may make a device")
    before = os.lstat(path).st_mode
    with pytest.raises(UserError, match="is a device or a pipe, which would be replaced; name a file"):
        with atomic_write(path):
            raise AssertionError("written")
    assert os.lstat(path).st_mode == before


@pytest.mark.parametrize("error", [errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_modes_times_and_links_will_do(tmp_path, monkeypatch, error):
    def refuse(*_, **__):
        raise OSError(error, os.strerror(error))

    for name in ("chmod", "link", "utime"):
        monkeypatch.setattr(files.os, name, refuse)
    (tmp_path / "source").mkdir()
    (tmp_path / "source/x").write_text("1")
    with atomic_folder(tmp_path / "a") as folder:
        files.link_tree(tmp_path / "source", folder)
    assert (tmp_path / "a/x").read_text() == "1" and problem(tmp_path / "a") is None


def test_a_full_disk_names_what_could_not_be_written(tmp_path):
    def copy():
        raise OSError(errno.ENOSPC, "No space left on device", "the source", None, str(tmp_path / "a" / "x"))

    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/a: No space left on device \({tmp_path}/a/x\)\.$"):
        with files.writing(tmp_path / "a"):
            copy()


def test_a_mount_point_is_filled(tmp_path):
    """Nothing can be renamed over it: containers mount the place for their output."""
    target = tmp_path / "out"
    target.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", target], capture_output=True)
    if mounted.returncode:
        pytest.skip("this process may not mount a tmpfs")
    try:
        (target / "lost+found").mkdir()
        with atomic_folder(target) as folder:
            (folder / "old").write_text("old")
            (folder / "sub").mkdir()
            (folder / "sub" / "x").write_text("old")
        assert names(target) == ["lost+found", MANIFEST, "old", "sub"] and problem(target) is None
        with pytest.raises(UserError, match="already exists and is not empty"):
            with atomic_folder(target):
                pass
        with pytest.raises(RuntimeError):
            with atomic_folder(target, overwrite=True) as folder:
                raise RuntimeError
        assert (target / "old").read_text() == "old"
        shutil.rmtree(target / "lost+found")
        with atomic_folder(target, overwrite=True) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "y").write_text("new")
        assert (target / "sub" / "y").read_text() == "new" and not (target / "old").exists()
        assert problem(target) is None and names(tmp_path) == ["out"]
        (target / "mine").touch()
        with pytest.raises(UserError, match="holds what was not written here, e.g. mine"):
            with atomic_folder(target, overwrite=True):
                pass
    finally:
        subprocess.run(["umount", "-l", target], check=True)


@pytest.mark.parametrize("name", ["log", "link", "to-stdout"])
def test_the_file_that_a_shell_writes_our_lines_to_is_not_replaced(tmp_path, name):
    (tmp_path / "link").symlink_to("log")
    (tmp_path / "to-stdout").symlink_to("/dev/stdout")
    before = os.dup(1)
    try:
        with open(tmp_path / "log", "w") as log:
            log.write("said before")
            log.flush()
            os.dup2(log.fileno(), 1)
        with pytest.raises(UserError, match="log is where this command's own lines go; name another file"):
            with atomic_write(tmp_path / name):
                raise AssertionError("written")
    finally:
        os.dup2(before, 1)
        os.close(before)
    assert (tmp_path / "log").read_text() == "said before"
