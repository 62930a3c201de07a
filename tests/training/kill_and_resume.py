"""Kills a run with SIGKILL at random moments, resumes it every time, and compares it with an undisturbed one.

    python tests/training/kill_and_resume.py --kills 20 [--quantized]

`--quantized` does it to quantization-aware training: insertion and calibration come first in every life.

Each attempt runs in a forked child, so the libraries are imported once. A kill may fall anywhere: into a step, into
validation, into the writing of a checkpoint (every step writes one). Exit code 0 means bit-equal.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))  # this checkout, not a package installed from elsewhere
os.environ.setdefault("OMP_NUM_THREADS", "1")

from workbench import fingerprint, quantized_recipe, run, small_recipe, write_squares


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


def main(kills: int, seed: int, quantized: bool) -> int:
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
                return 1
        if in_child(recipe) != 0:
            raise SystemExit("the resumed run failed")
        ours, theirs = fingerprint(broken), fingerprint(whole)
        for name in theirs:
            print(f"{'equal' if ours[name] == theirs[name] else 'DIFFERENT'}  {name}")
        return int(ours != theirs)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quantized", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.kills, arguments.seed, arguments.quantized))
