"""What a section leaves: one line of JSON for each claim, written the moment it is known."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path


ROOT = Path(__file__).parents[2]
LINES = 40  # of a child's output that a failed row keeps
AT_ONCE = 3  # commands of one section beside each other
# Seconds: with fewer left a command is not started, and one that had fewer was cut off and did not fail.
TO_START, TO_END = 20.0, 200.0


class Skip(Exception):
    """The claim cannot be looked at here; the text says why."""


class Failed(Exception):
    """The claim is false; the text is the evidence, `output` the end of what a child printed."""

    def __init__(self, evidence: str, output: list[str] | None = None):
        super().__init__(evidence)
        self.output = output or []


@dataclass
class Row:
    """`status` is pass, fail or skipped."""

    section: str
    name: str
    status: str = "pass"
    evidence: str = ""
    seconds: float = 0.0
    output: list[str] = field(default_factory=list)


@dataclass
class Book:
    """Where one section writes its rows, and what its functions need to know.

    Args:
        work: folder for everything that is not kept.
        rehearse: tiny, on a CPU.
        deadline: `time.time()` at which the section is killed.
    """

    section: str
    work: Path
    rehearse: bool
    deadline: float

    @property
    def file(self) -> Path:
        return self.work / "rows" / f"{self.section}.jsonl"

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def left(self) -> float:
        """Seconds until the section is killed, less two to say so."""
        return max(self.deadline - time.time() - 2, 0.1)

    @contextmanager
    def row(self, name: str) -> Iterator[Row]:
        """One claim: passes unless the block raises; nothing that it raises gets out."""
        entry, started = Row(self.section, name), time.monotonic()
        try:
            yield entry
        except Skip as reason:
            entry.status, entry.evidence = "skipped", str(reason)
        except Exception as error:
            entry.status = "fail"
            known = isinstance(error, Failed)
            entry.evidence = str(error) if known else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            entry.output = error.output if isinstance(error, Failed) else tail(traceback.format_exc())
        entry.seconds = round(time.monotonic() - started, 1)
        self.write(entry)

    def write(self, entry: Row) -> None:
        line = json.dumps(asdict(entry)) + "\n"
        with open(self.file, "a", encoding="utf-8") as file:  # one write: rows of several threads do not mix
            file.write(line)
        print(f"{entry.status:<8} {entry.name}: {entry.evidence}", flush=True)


def expect(condition: bool, evidence: str) -> None:
    if not condition:
        raise Failed(evidence)


def tail(text: str) -> list[str]:
    return text.strip().splitlines()[-LINES:]


def call(words: list[str], limit: float, code: int = 0, **environment: str) -> str:
    """Output (both streams) of `python words`, run in the repository's root.

    It stays in the section's process group, so that it dies with the section.

    Raises:
        Failed: another exit code than `code`, or not done in a `limit` that was long enough.
        Skip: the time was too short to say.
    """
    if limit < TO_START:
        raise Skip(f"no time left for {words[0]}: {limit:.0f} s")
    command = words if words[0].startswith("/") else [sys.executable, *words]
    shown = " ".join(Path(word).name if word.startswith("/") else word for word in words)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, text=True, errors="replace", timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        printed = error.stdout or b""
        text = printed.decode(errors="replace") if isinstance(printed, bytes) else printed
        if limit < TO_END:
            raise Skip(f"cut off: {shown} had {limit:.0f} s") from None
        raise Failed(f"{shown}: not done after {limit:.0f} s", tail(text)) from None
    if done.returncode != code:
        raise Failed(f"{shown}: exit code {done.returncode} instead of {code}", tail(done.stdout))
    return done.stdout


def relative(mine, right) -> float:
    """Norm of the difference of two tensors over the norm of the right one."""
    return ((mine.double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)).item()
