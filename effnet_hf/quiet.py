"""Without what libraries say in the middle of our own lines, which say what matters."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Shows none inside the block; transformers 5 draws one for a single file, in the middle of our own output."""
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
    """Called before torch's profiler is: else it announces itself, that it found no GPU, and that it forgets a cycle.

    torch 2.11 warns of the last even in the first cycle, where there is nothing to forget.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")
    warnings.filterwarnings("ignore", message="Warning: Profiler clears events at the end of each cycle")
