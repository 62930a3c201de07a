"""Stops between two steps: SIGTERM (preemption), SIGINT (Ctrl-C), SIGUSR1 (Slurm's warning), SIGHUP (a closed
terminal), and the end of the launcher."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator

from .launcher import LAUNCHER_PID


EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command with --resume auto
PATIENCE = 2.0  # seconds that a stop waits for the next batch
# Seconds in which a second signal is the first one on another way: Slurm signals every process of a job, and the
# launcher among them hands its own on.
SAME = 5.0


class Stopped(BaseException):
    """A stop was asked for where no step can be finished. No `Exception`: no library is to take it for its own."""


class StoppedWaiting(Stopped):
    """While this process waits for data; others need not."""


class Interruption:
    """Asks the loop to save and stop after the running step; a second signal stops at once.

    Used as a context manager; restores the previous handlers when left. Signals that are ignored, as SIGHUP is under
    `nohup` and SIGINT in a shell's background, stay ignored. Outside the main thread Python allows no handlers.
    """

    SIGNALS = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name)
    )

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: str | None = None
        self.previous: dict = {}
        self.has_handlers = threading.current_thread() is threading.main_thread()
        self._asked = self._waiting = False
        self._since = 0.0
        self._launcher = LAUNCHER_PID

    def __enter__(self):
        may_be_ignored = [getattr(signal, name) for name in ("SIGINT", "SIGHUP") if hasattr(signal, name)]
        for number in self.SIGNALS if self.has_handlers else ():
            if number not in may_be_ignored or signal.getsignal(number) != signal.SIG_IGN:
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_):
        if self.has_handlers and hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.received, self._asked, self._since = signal.Signals(number).name, True, time.monotonic()
        for other in self.previous:
            signal.signal(other, self._insist)
        if hasattr(signal, "setitimer"):  # not on Windows
            self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._end_wait)
            signal.setitimer(signal.ITIMER_REAL, PATIENCE, PATIENCE)

    def _insist(self, number, frame):
        if LAUNCHER_PID is not None and time.monotonic() - self._since < SAME:
            return
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        signal.raise_signal(number)

    def _end_wait(self, number, frame):
        if self._waiting:
            raise StoppedWaiting

    def watch(self, batches: Iterable) -> Iterator:
        """Passes batches through; once a stop is asked for, the wait for the next one may not last.

        Raises:
            StoppedWaiting: it did.
        """
        iterator = iter(batches)
        while True:
            self._waiting = True
            try:
                batch = next(iterator, None)
            finally:
                self._waiting = False
            if batch is None:
                return
            yield batch

    def pending(self) -> bool:
        """Whether this process was asked to stop."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.received, self._asked, self._launcher = "the launcher has ended", True, None
        return self._asked

    def agreed(self) -> bool:
        """Whether any process was asked to stop. With several processes this is a collective call."""
        if self.accelerator.num_processes == 1:
            return self.pending()
        flag = torch.tensor(int(self.pending()), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())
