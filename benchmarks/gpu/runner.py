"""Starts sections in process groups of their own, ends them in time, and merges what they write into few files."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lib.report import write_figures
from lib.suite import kill_tree

from .rows import ROOT, Row, tail


@dataclass(frozen=True)
class Section:
    """One process: `words` are what python runs, `target` is the result file that its figures belong to.

    Args:
        seconds: the most it may take.
        least: the seconds without which it is not started.
        half: `"verify"` (several at once), `"measure"` (alone, after them) or `"warm"` (beside the first half).
    """

    name: str
    seconds: float
    half: str
    words: tuple[str, ...]
    target: str | None = None
    least: float = 30.0


@dataclass
class Running:
    section: Section
    process: subprocess.Popen
    started: float
    limit: float


class Runner:
    """Runs sections into `out`.

    Args:
        out: result folder; what other sections left there stays.
        work: scratch folder with `rows/`, `logs/` and `figures/`.
        deadline: `time.monotonic()` at which everything has to be over.
        facts: device, versions and command, written into every result file.
    """

    def __init__(self, out: Path, work: Path, deadline: float, facts: Callable[[], dict]):
        self.out, self.work, self.deadline, self.facts = out, work, deadline, facts
        self.running: list[Running] = []
        self.prepared: dict[str, subprocess.Popen] = {}
        self.rows: list[dict] = read_rows(out / "verify.json")
        self.rerun: set[str] = set()
        self.seen: dict[Path, tuple[float, int]] = {}
        for name in ("rows", "logs", "figures"):
            (work / name).mkdir(parents=True, exist_ok=True)
        out.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, section: Section, until: float | None = None) -> None:
        """Starts it, or writes why not. `until` is a `time.monotonic()` before the deadline."""
        end = min(self.deadline, until or self.deadline)
        limit = min(section.seconds, end - time.monotonic())
        self.forget(section.name)
        if limit < min(section.least, section.seconds):
            why = f"{max(limit, 0):.0f} s left and it takes up to {section.seconds:.0f}; --only {section.name} runs it"
            self.note(Row(section.name, section.name, status="skipped", evidence=why))
            return
        print(f"[{self.left():4.0f} s left] {section.name}", flush=True)
        process = self.prepared.pop(section.name, None)
        if process is None or process.poll() is not None:
            process = self.spawn(section, [], subprocess.DEVNULL, SECTION_DEADLINE=str(time.time() + limit))
        else:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.close()
        self.running.append(Running(section, process, time.monotonic(), limit))

    def prepare(self, section: Section) -> None:
        """Starts a section's process, which imports and then waits until `start`."""
        self.prepared[section.name] = self.spawn(
            section, [str(Path(__file__).with_name("waiting.py"))], subprocess.PIPE
        )

    def spawn(self, section: Section, before: list[str], stdin: int, **environment: str) -> subprocess.Popen:
        with open(self.log(section.name), "w") as log:
            return subprocess.Popen(
                [sys.executable, *before, *section.words], cwd=ROOT, env={**os.environ, **environment}, stdin=stdin,
                stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def forget(self, name: str) -> None:
        """Leaves a section's earlier rows and figures behind."""
        self.rerun.add(name)
        self.rows = [row for row in self.rows if row["section"] != name]
        for path in (self.work / "rows" / f"{name}.jsonl", self.figures(name)):
            path.unlink(missing_ok=True)

    def poll(self) -> None:
        """Takes up what sections have written, ends those whose time is over, lets go of those that ended."""
        for entry in list(self.running):
            section, process, seconds = entry.section, entry.process, time.monotonic() - entry.started
            code = process.poll()
            if code is None and seconds > entry.limit:
                self.end(entry, f"stopped after {seconds:.0f} s")
            elif code is not None:
                kill_tree(process.pid)  # what it left behind
                self.running.remove(entry)
                self.take_up(section)
                self.conclude(section, seconds, "" if code == 0 else f"exit code {code}")
            else:
                self.take_up(section)

    def end(self, entry: Running, why: str) -> None:
        kill_tree(entry.process.pid)
        entry.process.wait()
        self.running.remove(entry)
        self.take_up(entry.section)
        self.conclude(entry.section, time.monotonic() - entry.started, why, cut_off=True)

    def end_all(self, why: str) -> None:
        for entry in list(self.running):
            self.end(entry, why)
        for process in self.prepared.values():
            kill_tree(process.pid)
            process.wait()
        self.prepared.clear()

    def conclude(self, section: Section, seconds: float, trouble: str, cut_off: bool = False) -> None:
        """A row about the section itself: always for one that measures, else only if it did not end well. One that was
        cut off did not fail: rows that it wrote say what it had found."""
        output = tail(self.log(section.name).read_text(errors="replace")) if trouble else []
        kept = f"{trouble}; what it had by then is kept" if trouble else ""
        if section.target is None:
            if trouble:
                status = "skipped" if section.half == "warm" or cut_off else "fail"
                self.note(Row(section.name, section.name, status, kept, round(seconds, 1), output))
            return
        figures = self.read_figures(section.name)
        rows, left_out = len(figures.get("rows", [])), figures.get("left_out", [])
        status = "pass" if rows and (cut_off or not trouble) else "skipped" if cut_off else "fail"
        sentences = [f"{rows} rows", *([kept] if kept else []), *(f"left out: {line}" for line in left_out)]
        sentences += [figures["verdict"]] if "verdict" in figures else []
        if status == "fail" and not output:
            output = tail(self.log(section.name).read_text(errors="replace"))
        self.note(Row(section.name, f"measured: {section.name}", status, "; ".join(sentences), round(seconds, 1),
                      output))  # fmt: skip

    def take_up(self, section: Section) -> None:
        """Rewrites the result files that a section has more for."""
        rows, figures = self.work / "rows" / f"{section.name}.jsonl", self.figures(section.name)
        if self.changed(rows):
            found = [json.loads(line) for line in rows.read_text().splitlines() if line.endswith("}")]
            own = [row for row in self.rows if row["section"] == section.name and row["name"] == section.name]
            self.rows = [row for row in self.rows if row["section"] != section.name] + found + own
            self.write_rows()
        if section.target and self.changed(figures):
            merge(self.out / section.target, section.name, self.read_figures(section.name), self.facts())

    def changed(self, path: Path) -> bool:
        if not path.exists():
            return False
        stat = path.stat()
        mark = (stat.st_mtime, stat.st_size)
        if self.seen.get(path) == mark:
            return False
        self.seen[path] = mark
        return True

    def note(self, row: Row) -> None:
        print(f"           {row.status:<8} {row.name}: {row.evidence}", flush=True)
        self.rows.append(asdict(row))
        self.write_rows()

    def write_rows(self) -> None:
        write_figures({"kind": "verify", **self.facts(), "rows": self.rows}, self.out / "verify.json")

    def log(self, name: str) -> Path:
        return self.work / "logs" / f"{name}.txt"

    def figures(self, name: str) -> Path:
        return self.work / "figures" / f"{name}.json"

    def read_figures(self, name: str) -> dict:
        path = self.figures(name)
        return json.loads(path.read_text("utf-8")) if path.exists() else {}


def read_rows(path: Path) -> list[dict]:
    return json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []


def merge(path: Path, section: str, figures: dict, facts: dict) -> None:
    """Puts a section's figures into a result file instead of those it had there."""
    kind = path.stem
    merged: dict[str, Any] = {"kind": kind, **facts, "settings": {}, "commands": {}, "rows": [], "left_out": []}
    if path.exists():
        merged |= {key: value for key, value in json.loads(path.read_text("utf-8")).items() if key not in facts}
    key = "rows" if figures["kind"] == kind else figures["kind"]
    rows = [{**row, "section": section} for row in figures["rows"]]
    merged[key] = [row for row in merged.get(key, []) if row["section"] != section] + rows
    merged["left_out"] = [line for line in merged["left_out"] if not line.startswith(f"{section}: ")]
    merged["left_out"] += [f"{section}: {line}" for line in figures.get("left_out", [])]
    merged["commands"][section] = figures["command"]
    merged["command"] = "\n".join(merged["commands"].values())
    peers = figures.get("settings", {}).get("peers", [])
    merged["settings"] = {"peers": list(dict.fromkeys([*merged["settings"].get("peers", []), *peers]))}
    merged |= {name: figures[name] for name in ("machine", "datasheet", "predicted", "verdict") if name in figures}
    write_figures(merged, path)
