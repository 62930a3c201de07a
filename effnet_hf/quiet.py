"""Silences messages of libraries that would interrupt our own output."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """No progress bars inside the block; transformers 5 draws one even for a single file."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def only_errors() -> Iterator[None]:
    """Silences transformers' warnings inside the block, where the caller looks at the loading report itself."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def quiet_profiler() -> None:
    """Call this before torch's profiler starts. It silences three messages: its banner, that there is no GPU, and
    (torch 2.11) that it clears events after each cycle.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events at the end of each cycle")
