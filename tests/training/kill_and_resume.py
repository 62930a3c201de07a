"""Kills a run with SIGKILL at random moments, resumes it every time, and compares it with an undisturbed one.

    python tests/training/kill_and_resume.py --kills 20 [--quantized] [--json FILE]
    python tests/training/kill_and_resume.py --events [--scenario NAME …] [--every N] [--json FILE]

`--quantized` does it to quantization-aware training: insertion and calibration come first in every life.

Each attempt runs in a forked child, so the libraries are imported once. A kill may fall anywhere: into a step, into
validation, into the writing of a checkpoint (every step writes one). Exit code 0 means bit-equal.

`--events` kills at every file-system event of a start, a resume, a return to an older checkpoint, an overwrite, a
publication, a conversion and an export instead, see kill_events.py. Exit code 0 means that each left what was there
before or what was asked for.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path


try:
    from .workbench import fingerprint, quantized_recipe, run, small_recipe, write_squares
except ImportError:  # as a script
    sys.path.insert(0, str(Path(__file__).parent))
    sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not a package installed from elsewhere
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from workbench import fingerprint, quantized_recipe, run, small_recipe, write_squares  # type: ignore[no-redef]


def in_child(recipe, kill_after: float | None = None) -> int | None:
    """Trains in a forked child; its exit code, or None if it was killed after `kill_after` seconds."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            sys.stdout = open(os.devnull, "w")
            code = run(recipe)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    end = None if kill_after is None else time.monotonic() + kill_after
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main(kills: int, seed: int, quantized: bool, result: Path | None) -> int:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        data = write_squares(Path(scratch, "data"))
        settings = {"checkpoint_every_steps": 1, "epochs": 3}
        whole, broken = Path(scratch, "whole"), Path(scratch, "broken")
        make_recipe = small_recipe
        if quantized:
            if in_child(small_recipe(data, Path(scratch, "float"), epochs=1)) != 0:
                raise SystemExit("the float run failed")
            make_recipe, settings["model"] = quantized_recipe, Path(scratch, "float")
        started = time.monotonic()
        if in_child(make_recipe(data, whole, **settings)) != 0:
            raise SystemExit("the undisturbed run failed")
        duration = time.monotonic() - started
        recipe = make_recipe(data, broken, resume="auto", **settings)
        done = 0
        # Late enough to get past the start, early enough that the run needs several lives; calibration is a long start.
        share = (0.3, 0.9) if quantized else (0.02, 0.5)
        while done < kills:
            if in_child(recipe, kill_after=rng.uniform(*share) * duration) is None:
                done += 1
                saved = sorted(path.name for path in (broken / "checkpoints").glob("update-*"))
                half = len(list((broken / "checkpoints").glob(".*.tmp")))
                print(f"kill {done:>2}: newest checkpoint {saved[-1] if saved else 'none'}, half-written ones {half}")
            elif fingerprint(broken) == fingerprint(whole):
                print("reached the end, bit-equal; starting over")
                os.rename(broken, tempfile.mkdtemp(prefix="done-", dir=scratch))
            else:
                print("reached the end, but NOT equal")
                return tell("random moments", done, ["not equal"], result)
        if in_child(recipe) != 0:
            raise SystemExit("the resumed run failed")
        ours, theirs = fingerprint(broken), fingerprint(whole)
        for name in theirs:
            print(f"{'equal' if ours[name] == theirs[name] else 'DIFFERENT'}  {name}")
        return tell("random moments", done, [name for name in theirs if ours[name] != theirs[name]], result)


def tell(name: str, kills: int, wrong: list[str], result: Path | None) -> int:
    if result is not None:
        result.write_text(json.dumps([{"name": name, "kills": kills, "wrong": wrong}], indent=1) + "\n")
    return int(bool(wrong))


def at_every_event(names: list[str] | None, every: int, result: Path | None) -> int:
    from kill_events import scenarios

    results = []
    with tempfile.TemporaryDirectory() as scratch:
        for scenario in scenarios(Path(scratch, "start"), names):
            found = scenario.run(Path(scratch, scenario.name.replace(" ", "_")), every)
            print(f"{found.name:<24} {found.events:>4} events, {found.kills:>4} kills, {len(found.wrong)} wrong")
            print(*(f"  {line}" for line in found.wrong), sep="\n", end="\n" if found.wrong else "", flush=True)
            results.append({"name": found.name, "events": found.events, "kills": found.kills, "wrong": found.wrong})
    kills, wrong = (sum(count(each) for each in results) for count in (lambda r: r["kills"], lambda r: len(r["wrong"])))
    print(f"{kills} kills, {kills - wrong} survived")
    if result is not None:
        result.write_text(json.dumps(results, indent=1) + "\n")
    return int(wrong > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantized", action="store_true")
    parser.add_argument("--events", action="store_true", help="kill at file-system events instead")
    parser.add_argument("--scenario", nargs="+", help="of --events: only these")
    parser.add_argument("--every", type=int, default=1, help="of --events: every n-th one")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    arguments = parser.parse_args()
    if arguments.events:
        sys.exit(at_every_event(arguments.scenario, arguments.every, arguments.json))
    sys.exit(main(arguments.kills, arguments.seed, arguments.quantized, arguments.json))
