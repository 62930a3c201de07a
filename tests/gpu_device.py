"""Where tests marked `gpu` run: on CUDA; with EFFNET_HF_REHEARSE=1 on the CPU, to see that their lines would run."""

import os

import pytest

from effnet_hf.training.precision import allow_tf32


REHEARSAL = bool(os.environ.get("EFFNET_HF_REHEARSE"))
DEVICE = "cpu" if REHEARSAL else "cuda"


@pytest.fixture
def exact_products():
    """Without TF32, before and after."""
    allow_tf32(False)
    yield
    allow_tf32(False)
