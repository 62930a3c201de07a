"""The converter of a format and its runtime, in a process of their own: started, asked, ended, and what it ends with.

Its working directory and its place for temporary files is a folder that the caller removes; what it prints goes there,
too. So nothing of it is left, torch in this process is what it was, and a converter that crashes is one sentence.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from multiprocessing.connection import Pipe
from pathlib import Path

import numpy as np
import torch

from ...errors import UserError, printable
from . import DEVICES, extra


PACKAGE = __package__.split(".")[0]
_NEARLY_NOTHING = 100_000  # bytes that are free on a disk that is full


class Bench:
    """A context: the process lives inside it.

    Args:
        format: one of [`DEVICES`].
        work: an empty folder for whatever it leaves.
        file: what is being written, for sentences about the disk.

    Raises:
        UserError: by any of its methods: a package is damaged, the network cannot be converted, the process ended.
        OSError: the disk is full.
    """

    def __init__(self, format: str, work: Path, file: Path):
        self.device, self.format, self.work, self.file = DEVICES[format], format, work, file
        self._log = work / "log"

    def __enter__(self) -> "Bench":
        ours, theirs = Pipe()
        self._connection = ours
        where = [str(Path(sys.modules[PACKAGE].__file__ or "").parents[1]), os.environ.get("PYTHONPATH", "")]
        quiet = {"TMPDIR": str(self.work), "PYTHONPATH": os.pathsep.join(filter(None, where)), "TQDM_DISABLE": "1"}
        quiet |= {"TF_CPP_MIN_LOG_LEVEL": "3", "DISABLE_TELEMETRY": "1", "JAX_PLATFORMS": "cpu"}
        arguments = [self.format, str(theirs.fileno()), str(torch.get_num_threads())]
        with theirs, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", f"{__package__}.child", *arguments],
                cwd=self.work,
                env=os.environ | quiet,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
            )
        return self

    def __exit__(self, *_) -> None:
        self._connection.close()  # which ends it where it waits
        self._process.kill()
        self._process.wait()

    def ask(self, what: str, *arguments):
        """Calls a function of `child.py` there; arguments and answer are pickled."""
        try:
            self._connection.send((what, arguments))
            answer, fault = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError(self._ended()) from error
        if fault is None:
            return answer
        self._raise_if_full()
        number, name, said = fault
        if number is not None:
            raise OSError(number, os.strerror(number), str(self.file))
        if name in ("ImportError", "ModuleNotFoundError"):
            raise UserError(
                f"--format {self.format} cannot be used: {printable(said)} Its packages are damaged, or too old or new"
                f" for each other: {extra(self.format)}"
            )
        raise UserError(f"{self.device.name} cannot do this: {name}: {printable(said)} Nothing was written.")

    def run(self, which: str, array: np.ndarray) -> tuple[np.ndarray, float]:
        """The outputs of a file that is open there, (1, classes), and the seconds that they took."""
        return self.ask("run", which, array)

    def _ended(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGXFSZ:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(self.file))
        self._raise_if_full()
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        lines = self._log.read_text("utf-8", "replace").strip().splitlines()
        last = f", whose last line is: {printable(lines[-1].strip())}" if lines else ""
        memory = "; is there memory enough?" if code == -signal.SIGKILL else ""
        return f"the process of --format {self.format} ended ({how}){memory}{last}"

    def _raise_if_full(self) -> None:
        if shutil.disk_usage(self.work).free < _NEARLY_NOTHING:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.file))
