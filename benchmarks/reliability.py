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

from effnet_hf.cli import ArgumentParser, path, run
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
        "SIGKILL at file-system events: at every one of a conversion, every second of a return to an older checkpoint"
        " and of an overwrite, every tenth of a resume with its publication and of an import, every twelfth of an"
        " export, every thirtieth of a start",
        kills=["--events"],
    ),
    "moments": Promise(
        "the same, at any time",
        "SIGKILL at random moments of a run that writes a checkpoint every step",
        kills=["--kills", "30"],
    ),
    "proved": Promise(
        "A damaged checkpoint is named before anything of it is loaded, and `auto` takes the newest whole one",
        "every file flipped by a bit, emptied, halved, zeroed, removed, swapped; manifests with single flipped bits",
        tests=[
            "tests/training/test_proved_checkpoints.py",
            "tests/test_manifest.py",
            "-k",
            "not progress and not changed",
        ],
    ),
    "code": Promise(
        "Nothing in a checkpoint, a converted folder or a `--model` folder runs, and nobody is asked whether to run it",
        "payloads, raw and zipped, under every name that a loader might open, and every command",
        tests=["tests/test_nothing_runs.py"],
    ),
    "fields": Promise(
        "A wrong value is one sentence that names file and field",
        "wrong types, signs, sizes and nestings in every field of config.json, preprocessor_config.json, recipes,"
        " trainer state and progress.json; crafted pickles, shards and graphs",
        tests=[
            "tests/errors/test_fields.py",
            "tests/test_checkpoint.py",
            "tests/test_reading.py",
            "tests/conversion/test_malformed.py",
            "tests/conversion/test_trainer_state.py",
            "tests/export/test_foreign.py",
            "tests/training/test_proved_checkpoints.py",
            "-k",
            "not damage",
        ],
    ),
    "data": Promise(
        "A run is not gone on with on other images without a word",
        "images and classes renamed, replaced, moved, added, removed, in both splits",
        tests=[
            "tests/training/test_proved_checkpoints.py",
            "tests/data/test_listing.py",
            "-k",
            "changed or moved_data or listing",
        ],
    ),
    "owner": Promise(
        "A run touches only what runs made, and is alone in its folder",
        "folders of others, links, names taken meanwhile, two runs at once, machines without common locks,"
        " damaged marks, devices, mount points",
        tests=[
            "tests/training/test_owner.py",
            "tests/test_lock.py",
            "tests/test_file_systems.py",
            "tests/test_small_outputs.py",
            "tests/errors/test_paths.py",
        ],
    ),
    "disk": Promise(
        "A full disk is one line, and what was saved before is whole",
        "real small disks of many sizes, and limits of a file's size, in training, conversion and export",
        tests=["tests/training/test_full_disk.py", "tests/export/test_full_disk.py", "tests/test_files.py"],
    ),
    "ends": Promise(
        "A run ends with the truth, whatever signal, console or divergence ends it: 0 done, 75 saved, 2 a line",
        "signals at start, in steps, validation, publication and waits for data; pipes that close; NaN;"
        " processes of one run that are lost",
        tests=["tests/training/test_ends_with_the_truth.py", "tests/training/test_launcher.py"],
    ),
    "workers": Promise(
        "A loader process that dies or finds shared memory full is one line, and no hang",
        "SIGKILL, SIGSEGV and SIGBUS in both splits; a /dev/shm of 4 KB, 2 MB and 14 MB",
        tests=["tests/data/test_workers.py"],
    ),
    "images": Promise(
        "A broken or hostile image is one reason in a list, and costs neither the run nor its neighbours",
        "truncated, forged, huge, deep, locked and vanishing files of every format, endless scans, damaged EXIF,"
        " pipes, links, odd names",
        tests=[
            "tests/data/test_pictures.py",
            "tests/data/test_folder.py",
            "tests/data/test_bad_files.py",
            "tests/test_classify.py",
        ],
    ),
    "serve": Promise(
        "The serving example answers good callers while bad ones do their worst, and ends when told",
        "25 kinds of bad callers ([under load](/benchmarks/2026-11-26-serve.md))",
        tests=["tests/export/serve"],
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
    command = [sys.executable, "-m", "pytest", "-m", "not gpu", "-o", "junit_family=xunit1"]
    command += [f"--junitxml={scratch}/junit.xml", *words]
    subprocess.run(command, cwd=ROOT, check=False)
    return count(scratch / "junit.xml")


def by_killing(words: list[str], scratch: Path) -> dict[str, int]:
    script = [sys.executable, "tests/training/kill_and_resume.py", *words, "--json", str(scratch / "kills.json")]
    subprocess.run(script, cwd=ROOT, check=False)
    return sum_kills([scratch / "kills.json"])


def sum_kills(files: list[Path]) -> dict[str, int]:
    """Of the results that kill_and_resume.py writes with `--json`."""
    found = [each for file in files for each in json.loads(file.read_text())]
    tries, wrong = sum(each["kills"] for each in found), sum(len(each["wrong"]) for each in found)
    return {"tries": tries, "survived": tries - wrong, "skipped": 0}


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=f"of {', '.join(PROMISES)}")
    parser.add_argument(
        "--kills", nargs="+", type=path, metavar="JSON", help="of events: results of kill_and_resume.py, not new ones"
    )
    arguments = parser.parse_args(argv)
    names = arguments.only or list(PROMISES)
    if unknown := set(names) - PROMISES.keys():
        raise UserError(f"--only {sorted(unknown)[0]}: there are {', '.join(PROMISES)}.")
    lost = 0
    for name in names:
        promise, started = PROMISES[name], time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            scratch = Path(folder)
            if name == "events" and arguments.kills:
                found = sum_kills(list(map(Path, arguments.kills)))
            elif promise.tests:
                found = by_pytest(promise.tests, scratch)
            else:
                found = by_killing(promise.kills or [], scratch)
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
