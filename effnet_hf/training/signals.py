"""Stops between two steps: SIGTERM (preemption), SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning)."""

import signal

import torch
from accelerate import Accelerator


EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command with --resume auto


class Interruption:
    """Asks the loop to save and stop after the running step; a second signal stops at once.

    Used as a context manager; restores the previous handlers when left.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self.received: str | None = None

    def __enter__(self):
        self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        self.received = signal.Signals(number).name
        for other in self.SIGNALS:
            signal.signal(other, signal.default_int_handler if other == signal.SIGINT else signal.SIG_DFL)

    def agreed(self) -> bool:
        """Whether any process was asked to stop. With several processes this is a collective call."""
        if self.accelerator.num_processes == 1:
            return self.received is not None
        flag = torch.tensor(int(self.received is not None), device=self.accelerator.device)
        return bool(self.accelerator.reduce(flag, reduction="sum").item())
