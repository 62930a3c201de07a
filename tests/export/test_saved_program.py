"""A `torch.export` program opens without what torch says to its developers."""

import warnings
from types import SimpleNamespace

import numpy as np
import torch

from effnet_hf.export.runners import pt2_runner


def test_saved_program_opens_without_torchs_note_on_its_buffers(monkeypatch):
    """torch 2.11's words about every such file, whichever torch is installed; a warning is an error in these tests."""

    def load(path):
        warnings.warn("The given buffer is not writable, and PyTorch does not support non-writable", stacklevel=1)
        return SimpleNamespace(module=torch.nn.Identity)

    monkeypatch.setattr(torch.export, "load", load)
    assert pt2_runner("model.pt2")(np.ones(2, np.float32)).tolist() == [1, 1]
