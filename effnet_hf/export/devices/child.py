"""The process of a converter and its runtime: answers what `bench.py` asks, until that closes the connection.

python -m effnet_hf.export.devices.child FORMAT DESCRIPTOR THREADS
"""

import importlib
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

from ...errors import first_line


class Child:
    """What can be asked for. A format's module has a `Converter`, an `opened`, and a `version`."""

    def __init__(self, format: str, threads: int):
        self._module = importlib.import_module(f"{__package__}.{format}")
        self._threads = threads
        self._converter: Any = None
        self._open: dict[str, Callable[[np.ndarray], np.ndarray]] = {}

    def version(self) -> str:
        return self._module.version()

    def start(self, program: str, job: dict) -> None:
        """Takes a `torch.export` program, and what the file is to carry: `properties`, `labels`, `dtype`, `several`
        (labels per image)."""
        self._converter = self._module.Converter(program, job)

    def observe(self, array: np.ndarray) -> None:
        """Takes ranges of activations from one image, as the file takes it."""
        self._converter.observe(array)

    def write(self, file: str, int8: str | None) -> None:
        self._converter.write(file, int8)

    def open(self, which: str, file: str, dtype: str) -> None:
        self._converter = None
        self._open[which] = self._module.opened(file, self._threads, dtype)

    def run(self, which: str, array: np.ndarray) -> tuple[np.ndarray, float]:
        started = time.perf_counter()
        found = self._open[which](array)
        taken = time.perf_counter() - started
        return np.array(found, np.float32).reshape(1, -1), taken


def _fault(error: BaseException) -> tuple[int | None, str, str]:
    cause: BaseException | None = error
    while cause is not None:  # converters wrap what the disk said
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause.errno, type(error).__name__, first_line(error)
        cause = cause.__cause__ or cause.__context__
    return None, type(error).__name__, first_line(error)


def main() -> None:
    format, descriptor, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    child = None
    with Connection(descriptor) as connection:
        while True:
            try:
                what, arguments = connection.recv()
            except EOFError:
                return
            try:
                child = child or Child(format, threads)
                answer: tuple = getattr(child, what)(*arguments), None
            except Exception as error:  # converters have no class of their own for what they cannot do
                traceback.print_exc()
                answer = None, _fault(error)
            connection.send(answer)


if __name__ == "__main__":
    main()
    os._exit(0)  # not through what native libraries do at the end
