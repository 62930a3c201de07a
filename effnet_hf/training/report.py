"""Everything a run says: console lines, one JSON-lines file, Accelerate's trackers.

`metrics.jsonl` holds one object per line with a `type`: `run` (once per launch), `train` (every `log_every` steps),
`val`, `val_ema`, `limit` and `epoch` (every epoch), `summary`. Names are the original's: `train.loss`, `val.top1`, …;
figures are honest: the loss is not divided by the accumulation steps, an epoch's first steps count in no speed.
"""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from accelerate import Accelerator
from PIL import Image
from tqdm.auto import tqdm

from ..cli import Lasting
from ..errors import UserError, first_line, printable
from ..files import flush, writing
from ..run_folder import RunFolder
from .progress import Progress
from .trackers import send_picture, start_settings


class Report:
    """Speaks on the first process only; to the console at once, to the disk after `open`."""

    def __init__(self, accelerator: Accelerator, quiet: bool = False):
        self.accelerator, self.quiet = accelerator, quiet
        self.enabled = accelerator.is_main_process
        self.live = self.enabled and not quiet and (sys.stderr.isatty() or "ipykernel" in sys.modules)  # or a notebook
        self.bar: tqdm | None = None
        self.file: IO | None = None
        self.lost: set[tuple[str, str]] = set()  # trackers that failed, and with what

    def open(self, recipe, progress: Progress | None = None) -> None:
        """Starts the log and the trackers. A resumed run keeps what its checkpoint knows of: the steps after that will
        happen again.

        Raises:
            UserError: the log cannot be written, or a tracker cannot start.
        """
        progress = progress or Progress()
        if self.enabled:
            path = RunFolder(recipe.output_dir).metrics
            with writing(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                if path.exists() and not path.is_file():  # a pipe would be waited for
                    raise UserError(f"{path} is no regular file; move it away.")
                self.file = open(path, "ab", buffering=0)
                self.file.truncate(min(progress.metrics_bytes, path.stat().st_size))
                self.file.seek(0, os.SEEK_END)
        if recipe.report_to:
            values = {name: value for name, value in vars(recipe).items() if isinstance(value, (int, float, str))}
            try:
                settings = start_settings(recipe, progress.total_updates)
                self.accelerator.init_trackers("effnet_hf", config=values, init_kwargs=settings)
            except Exception as error:  # of a service that wants a login, a network, a newer Accelerate, …
                raise UserError(
                    f"--report_to {' '.join(recipe.report_to)}: the tracker does not start: {first_line(error)}"
                ) from error
            if self.enabled and progress.total_updates:
                self._tell_again(RunFolder(recipe.output_dir).metrics, progress)

    def line(self, text: str = "") -> None:
        """One line on the console, above a running progress bar. A run outlives its console: the log goes on."""
        if not self.enabled:
            return
        console = Lasting(sys.stdout)
        with contextlib.redirect_stdout(console):
            tqdm.write("\n".join(map(printable, text.split("\n"))), file=sys.stdout)
            sys.stdout.flush()
        if console.lost is not None:
            log = f"; its log is {self.file.name}" if self.file is not None else ""
            print(f"standard output: {console.lost.strerror}: the run goes on without{log}", file=Lasting(sys.stderr))

    def log(self, kind: str, step: int, values: dict, **where) -> None:
        """One line of `metrics.jsonl` and one entry in every tracker. JSON has no NaN: such a figure is null there."""
        if self.enabled:
            assert self.file is not None, "logged before open"
            row = {"type": kind, "time": round(time.time(), 3), **where, **values}
            row = {name: None if _is_no_number(value) else value for name, value in row.items()}
            self._append(json.dumps(row, allow_nan=False, default=str).encode() + b"\n")
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        if numbers:
            self._tell(lambda tracker: tracker.log(numbers, step=step))

    def picture(self, file: Path, step: int) -> None:
        """A picture in every tracker, as `plots/` and its file's name."""
        if self.enabled and self.accelerator.trackers:
            with Image.open(file) as opened:
                image = opened.convert("RGB")
            self._tell(lambda tracker: send_picture(tracker, f"plots/{file.stem}", image, step), "pictures")

    def _tell(self, say: Callable, what: str = "figures") -> None:
        """No run ends because of a tracker: one that fails is said once, and gets no more of the same kind."""
        for tracker in self.accelerator.trackers if self.enabled else ():
            if (tracker.name, what) in self.lost:
                continue
            try:
                say(tracker)
            except Exception as error:
                self.lost.add((tracker.name, what))
                self.line(f"WARNING  {tracker.name} gets no more {what}: {printable(first_line(error))}")

    def _tell_again(self, log: Path, progress: Progress) -> None:
        """The figures of the very step that the run goes on from, which were logged before its checkpoint was written:
        TensorBoard forgets a step as a whole."""
        rows = []
        for number, line in enumerate(log.read_bytes().splitlines(), 1):
            try:
                rows.append({**json.loads(line)})
            except (ValueError, TypeError):
                self.line(f"WARNING  {log}: line {number:,} is not JSON of ours; it is left out")
        last = max((number for number, row in enumerate(rows) if row.get("type") == "train"), default=None)
        if last is None or (rows[last].get("epoch"), rows[last].get("update")) != (progress.epoch, progress.update):
            return
        numbers = {name: value for row in rows[last:] for name, value in row.items() if name.startswith("train.")}
        numbers = {name: value for name, value in numbers.items() if isinstance(value, (int, float))}

        def say(tracker) -> None:
            if tracker.name == "tensorboard":
                tracker.log(numbers, step=progress.total_updates)

        self._tell(say)

    def _append(self, line: bytes) -> None:
        """A whole line, or an error and none of it."""
        assert self.file is not None
        with writing(self.file.name):
            before = self.file.tell()
            try:
                written = self.file.write(line)
                while written < len(line):  # the disk has just filled: the next one raises
                    written += self.file.write(line[written:])
            except OSError:
                self.file.truncate(before)
                raise

    def position(self) -> int:
        """Bytes of `metrics.jsonl` so far, on the disk."""
        if self.file is None:
            return 0
        with writing(self.file.name):
            flush(self.file.fileno())
        return self.file.tell()

    def start_bar(self, description: str, total: int, initial: int = 0) -> None:
        if self.live:
            self.bar = tqdm(
                total=total, initial=initial, desc=description, leave=False, dynamic_ncols=True, unit="step"
            )

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        self.end_bar()
        if self.accelerator.trackers:
            try:
                self.accelerator.end_training()
            except Exception as error:  # an upload that fails
                self.line(f"WARNING  a tracker did not end well: {first_line(error)}")
        if self.file is not None:
            with writing(self.file.name):
                self.file.close()


def _is_no_number(value) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
