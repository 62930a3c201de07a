"""Tries what docs/reliability.md promises, and counts: python benchmarks/reliability.py [--only NAME …]

A promise is tested by pytest or by the kill script of tests/training. A test counts as one try, or as many as it says
itself with `record_property("tries", n)`; what it skips counts as none and is said. Results go to
benchmarks/2026-11-26-reliability/NAME.json, and the page's table is made from these by result_tables.py.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from effnet_hf.cli import ArgumentParser, run
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_write


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/2026-11-26-reliability"


class Promise(NamedTuple):
    """`text` is Markdown; `how` says what a try is; `tests` are pytest's words, or None for the kill script's."""

    text: str
    how: str
    tests: list[str] | None = None
    kills: list[str] | None = None


PROMISES = {
    "events": Promise(
        "A run, a conversion or an export that is killed leaves what was there before or what was asked for; the next"
        " start goes on to the same bits and clears away the rest",
        "SIGKILL at every file-system event of a start, a resume, a return to an older checkpoint, an overwrite, a"
        " publication, a conversion and an export",
        kills=["--events"],
    ),
    "moments": Promise(
        "the same, at any time",
        "SIGKILL at random moments of a run that writes a checkpoint every step",
        kills=["--kills", "30"],
    ),
    "proved": Promise(
        "A damaged checkpoint is noticed and named before anything of it is loaded",
        "every file flipped by a bit, emptied, halved, zeroed, removed, swapped",
        tests=["tests/training/test_proved_checkpoints.py", "-k", "damage or swapped or whole or falls"],
    ),
    "manifest": Promise(
        "and so is every damage of a manifest",
        "single flipped bits of a small folder",
        tests=["tests/test_manifest.py"],
    ),
    "fields": Promise(
        "A wrong value in a file of a checkpoint is one sentence that names the field",
        "wrong types, signs, sizes and nestings in every field",
        tests=["tests/training/test_proved_checkpoints.py", "-k", "progress or position"],
    ),
    "data": Promise(
        "A run is not gone on with on other images without a word",
        "images and classes renamed, replaced, moved, added, removed",
        tests=["tests/training/test_proved_checkpoints.py", "-k", "changed or moved_data"],
    ),
    "owner": Promise(
        "A run touches only what runs made, and is alone in its folder",
        "folders of others, links, two runs at once, names taken meanwhile",
        tests=["tests/training/test_owner.py", "tests/test_lock.py", "tests/test_files.py"],
    ),
}


def count(junit: Path) -> dict[str, int]:
    """Tries, survived and skipped of a pytest run."""
    tries = survived = skipped = 0
    for case in ElementTree.parse(junit).iter("testcase"):
        if case.find("skipped") is not None:
            skipped += 1
            continue
        said = [each.get("value") for each in case.iter("property") if each.get("name") == "tries"]
        own = int(said[0] or 1) if said else 1
        tries += own
        survived += own if case.find("failure") is None and case.find("error") is None else 0
    return {"tries": tries, "survived": survived, "skipped": skipped}


def by_pytest(words: list[str], scratch: Path) -> dict[str, int]:
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", f"--junitxml={scratch}/junit.xml", *words]
    subprocess.run(command, cwd=ROOT, check=False)
    return count(scratch / "junit.xml")


def by_killing(words: list[str], scratch: Path) -> dict[str, int]:
    script = [sys.executable, "tests/training/kill_and_resume.py", *words, "--json", str(scratch / "kills.json")]
    subprocess.run(script, cwd=ROOT, check=False)
    found = json.loads((scratch / "kills.json").read_text())
    tries, wrong = sum(each["kills"] for each in found), sum(len(each["wrong"]) for each in found)
    return {"tries": tries, "survived": tries - wrong, "skipped": 0}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(PROMISES)}")
    names = parser.parse_args(argv).only or list(PROMISES)
    if unknown := set(names) - PROMISES.keys():
        raise UserError(f"--only {sorted(unknown)[0]}: there are {', '.join(PROMISES)}.")
    lost = 0
    for name in names:
        promise, started = PROMISES[name], time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            found = (
                by_pytest(promise.tests, Path(scratch))
                if promise.tests
                else by_killing(promise.kills or [], Path(scratch))
            )
        lost += found["tries"] - found["survived"]
        order = list(PROMISES).index(name)
        row = {
            "order": order,
            "promise": promise.text,
            "how": promise.how,
            **found,
            "seconds": round(time.monotonic() - started),
        }
        RESULTS.mkdir(exist_ok=True)
        with atomic_write(RESULTS / f"{name}.json") as file:
            file.write(json.dumps(row, indent=1) + "\n")
        print(f"{name}: {found['survived']} of {found['tries']} survived", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    run(main)
