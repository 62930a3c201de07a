import functools
import gc
import os
import re
import signal
import sys
from pathlib import Path


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


# `make quick` leaves out files that say one of these words: they start processes, train, quantize, or export.
_TAKES_TIME = re.compile(
    r"\b(subprocess|multiprocessing|DataLoader|workbench|export_model|hypothesis)\b|num_workers=[1-9]"
    r"|\b(run|train|calibrate|build_run|backward)\("
)
# And these rooms and files, which do it elsewhere, or open many whole networks.
_TAKE_TIME_TOO = (
    "benchmark",
    "conversion",
    "errors",
    "export",
    "test_batches",
    "test_common",
    "test_dali",
    "test_loaders",
    "test_memory",
    "test_processor_settings",
    "test_timm_parity",
)


def pytest_configure(config):
    # As in a terminal: under nohup and in a shell's background some are ignored, which every command respects.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    for marker in _TRANSFORMERS_MARKERS:
        config.addinivalue_line("markers", f"{marker}: of transformers' own tests")


@functools.cache
def _is_quick(path: Path) -> bool:
    named = {path.stem, path.parent.name}.intersection(_TAKE_TIME_TOO)
    return not named and not _TAKES_TIME.search(path.read_text("utf-8"))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as `quick` what neither trains nor starts processes."""
    for item in items:
        if _is_quick(item.path) and not any(item.iter_markers("slow")) and not any(item.iter_markers("gpu")):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="module", autouse=True)
def no_pipeline_left(request):
    """Ends DALI's pipelines here: one that a forked loader process collects waits for ever for threads it has not."""
    yield
    if "dali" in request.path.read_text("utf-8"):
        gc.collect()


def forget_accelerator():
    """Accelerate keeps one precision per process."""
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


def pytest_fixture_setup(fixturedef):
    """A fixture of a whole file, which is made before those of a test, starts as a new process would."""
    if fixturedef.scope != "function":
        forget_accelerator()


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """And so does every test."""
    forget_accelerator()
    yield
    forget_accelerator()


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture
def nobody():
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


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
