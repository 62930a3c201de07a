import os


# Nothing here may reach for the network; both libraries read this when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Some tests fork a process to have two ranks; a fork of a process with OpenMP's threads waits for them for ever.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


# Carried by transformers' own tests, which test_common.py runs against our classes.
_TRANSFORMERS_MARKERS = (
    "accelerate_tests",
    "bitsandbytes",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "flash_attn_test",
    "order",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config):
    for marker in _TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def tiny_config():
    """Makes a three-stage network of 16 to 40 channels for 32-pixel pictures, with every kind of block in it."""
    from effnet_hf import EfficientNetNVConfig

    def make(**overrides):
        settings = {
            "image_size": 32,
            "kernel_sizes": [3, 5, 3],
            "strides": [1, 2, 2],
            "num_block_repeats": [1, 2, 2],
            "expand_ratios": [1, 6, 4],
            "out_channels": [16, 24, 40],
            "stem_channels": 16,
            "head_channels": 64,
        }
        if "id2label" not in overrides:
            settings["num_labels"] = 5
        return EfficientNetNVConfig(**{**settings, **overrides})

    return make
