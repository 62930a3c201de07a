"""What works on a GPU and how fast it is: python benchmarks/gpu_check.py --out DIR --seconds 540

It does what it can in that time and names what it could not.
First half: claims are verified, several sections at once, while the graphs that are timed later compile beside them.
Second half: measurements, one at a time, alone on the card, in the order of their worth. A section is a process group
with a time limit; what it had written when its time was over is kept, and what no time is left for is named.

    --only NAME,NAME   runs these into the same folder again; --list names them
    --work DIR         keeps compiled graphs, images and runs for the next call
    --rehearse         all of it, tiny, on a CPU

DIR holds verify.json, train.json, inference.json, loop.json, roofline.json, memory.json, fused.json and summary.md;
`python benchmark.py page DIR` makes a page of them. Only DIR and temporary folders are written to.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]  # the package need not be installed

from gpu import summary, verify  # noqa: E402
from gpu.rows import Row  # noqa: E402
from gpu.runner import Runner, Section  # noqa: E402
from lib.suite import CUDA_PARTS  # noqa: E402

from effnet_hf.cli import ArgumentParser, above_zero, path, run  # noqa: E402
from effnet_hf.errors import UserError  # noqa: E402


HERE = str(Path(__file__).resolve())
RESERVE = 6.0  # seconds for the summary
FIRST_HALF = 0.45  # of all seconds, at most
# Seconds: what a section takes beside others, not alone.
VERIFY = {
    "gate": 100, "gpu_tests": 150, "training": 150, "using": 120, "precisions": 150, "qat": 200, "resume": 200,
    "compiled": 300, "variants": 200, "photographs": 90,
}  # fmt: skip
# What is compiled beside the first half, for the measurement of that name, in the order of its worth.
WARM = ("train-b0", "train-b4", "inference-1", "inference-256")
REHEARSAL_SECONDS = 1500.0


def main() -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=path, help="result folder")
    parser.add_argument("--seconds", type=above_zero, default=540.0, help="after which all is over")
    parser.add_argument("--jobs", type=int, default=5, help="verifying sections at once")
    parser.add_argument("--only", default="", help="comma-separated names of sections")
    parser.add_argument("--list", action="store_true", help="print the sections")
    parser.add_argument("--rehearse", action="store_true", help="all of it, tiny, on a CPU; takes ten minutes")
    parser.add_argument("--work", type=path, help="scratch folder to keep; a temporary one that is removed by default")
    parser.add_argument("--section", help=argparse.SUPPRESS)  # one that verifies, in this process
    arguments = parser.parse_args()
    if arguments.section:
        return verify.main(arguments.section, Path(arguments.work), arguments.rehearse)
    if arguments.list:
        print(f"{'half':<8} {'at most':<7} {'section':<22} writes")
        for section in sections(Path("WORK"), arguments.rehearse):
            print(f"{section.half:<8} {section.seconds:5.0f} s {section.name:<22} {section.target or 'verify.json'}")
        return 0
    if not arguments.out:
        parser.error("--out: name a folder for the results")
    if Path(arguments.out).exists() and not Path(arguments.out).is_dir():
        raise UserError(f"--out {arguments.out} is a file; name a folder.")
    if arguments.work:
        return check(arguments, Path(arguments.work).resolve())
    with tempfile.TemporaryDirectory(prefix="gpu-check-", ignore_cleanup_errors=True) as work:
        return check(arguments, Path(work))


def check(arguments: argparse.Namespace, work: Path) -> int:
    """Runs the sections; 0 if no row failed, 1 otherwise."""
    deadline = time.monotonic() + (REHEARSAL_SECONDS if arguments.rehearse else arguments.seconds) - RESERVE
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    set_environment(work, arguments.rehearse)
    todo = choose(sections(work, arguments.rehearse), arguments.only)
    runner = Runner(Path(arguments.out).resolve(), work, deadline, lambda: facts)
    facts: dict = {"date": date.today().isoformat(), "hardware": {"device": "cpu", "name": "unknown", "threads": 1},
                   "versions": {}, "commit": None, "command": "python benchmarks/gpu_check.py"}  # fmt: skip
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        gate = next(section for section in todo if section.half == "gate")
        run_all(runner, [gate], 1)
        if (work / "facts.json").exists():  # the gate asked, so that this process holds no memory on the card
            facts |= {**json.loads((work / "facts.json").read_text()), "command": facts["command"]}
        if any(row["status"] == "fail" for row in runner.rows if row["section"] == "gate"):
            runner.note(Row("gate", "everything else", "skipped", "the gate failed, so nothing else was started"))
        else:
            middle = started + FIRST_HALF * (deadline - started)
            measuring = [section for section in todo if section.half == "measure"]
            verifying = [section for section in todo if section.half == "verify"]
            warming = [section for section in todo if section.half == "warm"]
            for section in measuring[: 2 if arguments.rehearse else None]:  # each takes a GB of memory
                runner.prepare(section)
            run_all(runner, verifying, arguments.jobs, middle if measuring else None, warming)
            run_all(runner, measuring, 1)
    finally:
        runner.end_all("stopped from outside")
        summary.write(runner.out, runner.rows)
    print(f"\n{summary.first_look(runner.rows)}\n\n{runner.out}: {time.monotonic() - started:.0f} s")
    return int(any(row["status"] == "fail" for row in runner.rows))


def run_all(
    runner: Runner, todo: list[Section], jobs: int, until: float | None = None, beside: list[Section] | None = None
) -> None:
    """Runs `todo`, at most `jobs` at once, with `beside` in the background until they end or `until` has come."""
    waiting = list(todo)
    for section in beside or []:
        runner.start(section, until)
    while True:
        runner.poll()
        ahead = [entry for entry in runner.running if entry.section.half != "warm"]
        while waiting and len(ahead) < jobs:
            runner.start(waiting.pop(0), until)
            ahead = [entry for entry in runner.running if entry.section.half != "warm"]
        if not runner.running and not waiting:
            return
        time.sleep(0.2)


def sections(work: Path, rehearse: bool) -> list[Section]:
    """All of them, in the order in which they are started."""
    flags = ["--work", str(work), *(["--rehearse"] if rehearse else [])]
    found = []
    for name, seconds in VERIFY.items():
        half = "gate" if name == "gate" else "verify"
        limit = REHEARSAL_SECONDS if rehearse else seconds
        found.append(Section(name, limit, half, (HERE, "--section", name, *flags)))
    for name in WARM:
        words = measuring(work, name, rehearse)
        found.append(
            Section(f"warm-{name}", REHEARSAL_SECONDS if rehearse else 240, "warm", (*words, "--compile_only"))
        )
    for name, (seconds, _) in CUDA_PARTS.items():
        words = measuring(work, name, rehearse)
        output = ("--output", str(work / "figures" / f"{name}.json"))
        target = f"{name.partition('-')[0]}.json"
        limit = 300 if rehearse else seconds
        found.append(Section(name, limit, "measure", (*words, *output), target, seconds / 2))
    at = next(i for i, section in enumerate(found) if section.name == "loop" and section.half == "measure")
    for variant, batch, pixels in (("b4", 64, 380), ("b0", 256, 224)):
        name = f"overhead-{variant}"
        tiny = ["--precision", "fp32", "--image_size", "32", "--batch_size", "2", "--repeats", "1"]
        real = ["--precision", "bf16", "--image_size", str(pixels), "--batch_size", str(batch), "--repeats", "9"]
        words = ("benchmarks/loop_overhead.py", "--config", "b0", "--variant", variant, *(tiny if rehearse else real))
        output = ("--output", str(work / "figures" / f"{name}.json"))
        found.insert(at, Section(name, 300 if rehearse else 70, "measure", (*words, *output), "loop.json", 30))
    return found


def measuring(work: Path, name: str, rehearse: bool) -> tuple[str, ...]:
    """The words of one of `CUDA_PARTS`; for a rehearsal with everything in them made small."""
    words = ["benchmark.py", *CUDA_PARTS[name][1].split(), "--device", "cpu" if rehearse else "cuda"]
    command = words[1]
    if command == "loop":
        words += ["--data_dir", str(work / "photographs")]
    if not rehearse:
        return tuple(words)
    small = {"--image_size": "32", "--rounds": "1", "--batch_size": "2", "--batch_sizes": "2", "--precisions": "fp32",
             "--seconds": "1", "--variants": "b0", "--burst": "1"}  # fmt: skip
    if command in ("inference", "memory"):
        small["--batch_sizes"] = "1,2" if command == "inference" else "2"
    for flag, value in small.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    words += ["--num_workers", "1"] if command == "loop" else []
    return tuple([*words, "--image_size", "32"])


def choose(known: list[Section], only: str) -> list[Section]:
    """The sections that `only` names, and the gate; what is compiled ahead comes with what measures it."""
    names = [name for name in only.split(",") if name]
    for name in names:
        if name not in [section.name for section in known]:
            raise UserError(f"--only {name}: there is no such section; --list names them.")
    if not names:
        return known
    return [section for section in known if section.name in names or section.half == "gate"]


def set_environment(work: Path, rehearse: bool) -> None:
    """What every child inherits: one set of compile caches, no network, the package's import path."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)),
        "PYTHONUNBUFFERED": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(work / "inductor"),
        "TRITON_CACHE_DIR": str(work / "triton"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(work / "datasets"),
        "MPLCONFIGDIR": str(work / "matplotlib"),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "4")  # of each compiling process; five run at once
    if rehearse:
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # compiled is eager then: the same commands, without the minutes
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"  # kernels of our own, too


if __name__ == "__main__":
    run(main)
