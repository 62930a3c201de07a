"""The runtimes behind one face, and what they leave in the process."""

import ctypes
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effnet_hf.export import export_model, openvino_runner
from effnet_hf.export.runners import pt2_runner


class _Stack(ctypes.Structure):
    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


def signal_stack_is_mapped() -> bool:
    """Whether the memory on which this thread would handle a signal exists; a thread need not have any."""
    stack = _Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    with open("/proc/self/maps") as maps:
        spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps]
    return not stack.address or any(start <= stack.address < stop for start, stop in spans)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "sigaltstack"), reason="asks Linux's C library")
def test_openvino_leaves_a_signal_stack_that_exists(checkpoint, tmp_path):
    """Else the next Ctrl-C, or the end of a loader process, is a segmentation fault."""
    pytest.importorskip("openvino", reason="needs the openvino extra")
    path = export_model(str(checkpoint), tmp_path / "out", format="openvino").file
    first, second = openvino_runner(path), openvino_runner(path)
    del first
    del second
    assert signal_stack_is_mapped()


def test_saved_program_opens_without_torchs_note_on_its_buffers(monkeypatch):
    """torch 2.11's words about every such file, whichever torch is installed; a warning is an error in these tests."""

    def load(path):
        warnings.warn("The given buffer is not writable, and PyTorch does not support non-writable", stacklevel=1)
        return SimpleNamespace(module=torch.nn.Identity)

    monkeypatch.setattr(torch.export, "load", load)
    assert pt2_runner("model.pt2")(np.ones(2, np.float32)).tolist() == [1, 1]
