"""What of others' exceptions is a sentence, and what stays a traceback."""

import errno
import os

import pytest
import torch
from safetensors.torch import save_file

from effnet_hf.errors import sentence_of


def of_the_system(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), *([path] if path else []))


@pytest.mark.parametrize("path", ["runs/x", None])
@pytest.mark.parametrize("name", ["ENOSPC", "EDQUOT", "EROFS", "EFBIG"])
def test_what_cannot_be_written_is_named(name, path):
    number = getattr(errno, name)
    where = f" {path}" if path else ""
    assert sentence_of(of_the_system(number, path)) == f"cannot write{where}: {os.strerror(number)}."


@pytest.mark.parametrize(
    "name", ["EACCES", "EPERM", "EIO", "ENAMETOOLONG", "ENOENT", "ESTALE", "EMFILE", "ENOTDIR", "ELOOP"]
)
def test_a_file_that_the_system_refuses_is_named(name):
    number = getattr(errno, name)
    assert sentence_of(of_the_system(number, "runs/x")) == f"runs/x: {os.strerror(number)}."


def test_a_system_out_of_descriptors_says_so():
    assert sentence_of(of_the_system(errno.EMFILE)) == "the system says: Too many open files."


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda folder: save_file({"a": torch.zeros(9)}, folder / "gone/a"), "No such file or directory"),
        (lambda folder: torch.save({}, folder / "gone/a"), "its folder is gone"),
        (
            lambda folder: torch.save({"a": torch.zeros(10**6)}, open("/dev/full", "wb")),
            "the disk is full or refuses it",
        ),
    ],
    ids=["safetensors", "torch", "torch, on a full disk"],
)
def test_writers_of_libraries_have_their_own_errors(write, reason, tmp_path):
    with pytest.raises(Exception) as caught:
        write(tmp_path)
    assert sentence_of(caught.value) == f"cannot write: {reason}."


@pytest.mark.parametrize(
    "error",
    [ValueError("x"), OSError("x"), RuntimeError("x"), KeyError("x"), BrokenPipeError(errno.EPIPE, "Broken pipe")],
    ids=repr,
)
def test_a_bug_keeps_its_traceback(error):
    assert sentence_of(error) is None


def test_memory_is_a_sentence_whoever_lacks_it():
    assert sentence_of(MemoryError()) == (
        "out of memory (the machine's); lower the batch per device (--help has its flag) or --image_size."
    )
