"""Fine-tunes the same weights on five folders with four projects, each for the same CPU seconds of one thread.

    effnet-hf convert lite0 --warm_start b0 --images imagenette/train --output_dir b0-lite0
    effnet-hf convert b0-lite0 --to timm --output_dir b0-lite0-timm
    python benchmarks/finetune/run.py WORK --weights b0-lite0 --timm_weights b0-lite0-timm --imagenette imagenette
        --digits demo/digits --fashion_mnist /usr/share/datasets/fashion-mnist

It needs `pip install timm fastai` beside this package. Every project gets the CPU seconds of one thread that ours takes
for the epochs in `OURS`, or more: whole epochs are rounded up, at the speed measured first (WORK/speed.json; the epochs
stand in WORK/plan.json). One process per run, one thread, no loader processes. A line per run goes to WORK/runs.jsonl;
what stands there is not run again, so that the same command goes on where it was stopped.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from folders import COMPARED, make_folders


OURS = {"imagenette": 2, "imagenette-100": 3, "imagenette-20": 8, "digits": 3, "fashion-mnist": 3}  # epochs
SEEDS = (0, 1, 2)
NAMES = ("effnet_hf", "transformers", "timm", "fastai")
MEASURED_ON = {96: "tune-imagenette-20", 48: "tune-fashion-mnist"}
LIBRARIES = ("torch", "torchvision", "transformers", "timm", "fastai", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    for name in ("weights", "timm_weights", "imagenette", "digits", "fashion_mnist"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=NAMES, choices=NAMES)
    arguments = parser.parse_args()
    work = arguments.work
    make_folders(work, arguments.imagenette, arguments.digits, arguments.fashion_mnist)
    speed_file, plan_file, runs = work / "speed.json", work / "plan.json", work / "runs.jsonl"
    if not plan_file.exists():
        speed = json.loads(speed_file.read_text()) if speed_file.exists() else measure(arguments)
        plan_file.write_text(json.dumps(plan(speed), indent=1) + "\n")
    epochs = json.loads(plan_file.read_text())
    done = [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []
    for seed in SEEDS:
        for folder in COMPARED:
            for name in arguments.only:
                if any((row["by"], row["folder"], row["seed"]) == (name, folder, seed) for row in done):
                    continue
                row = one(arguments, name, folder, COMPARED[folder], epochs[folder][name], seed)
                with open(runs, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def measure(arguments) -> dict:
    """CPU seconds per image of every contender at both sizes: a list of each of two epochs', and with fastai one of the
    head alone before them; transformers' is both in one."""
    speed: dict = {}
    for size, folder in MEASURED_ON.items():
        images = sum(1 for _ in (arguments.work / folder / "train").glob("*/*"))
        for name in NAMES:
            laps = one(arguments, name, folder, size, 2, 0)["laps"]
            speed.setdefault(str(size), {})[name] = [lap / images for lap in laps]
    (arguments.work / "speed.json").write_text(json.dumps(speed, indent=1) + "\n")
    return speed


def plan(speed: dict) -> dict:
    """Epochs of every contender on every folder."""
    found: dict = {}
    for folder, size in COMPARED.items():
        last = {name: laps[-1] for name, laps in speed[str(size)].items()}
        last["transformers"] /= 2  # of both epochs in one
        frozen = speed[str(size)]["fastai"][0]
        budget = OURS[folder] * last["effnet_hf"]  # seconds per training image
        found[folder] = {
            "effnet_hf": OURS[folder],
            "transformers": round(budget / last["transformers"], 2),
            "timm": math.ceil(budget / last["timm"]),
            "fastai": max(math.ceil((budget - frozen) / last["fastai"]), 1),
        }
    return found


def one(arguments, name: str, folder: str, size: int, epochs: float, seed: int) -> dict:
    """A row: the run in a process of its own, with one thread."""
    weights = arguments.timm_weights if name in ("timm", "fastai") else arguments.weights
    with tempfile.TemporaryDirectory(dir=arguments.work) as scratch:
        asked = {"folder": str((arguments.work / folder).resolve()), "weights": str(weights.resolve()), "size": size}
        asked |= {"epochs": epochs, "seed": seed, "scratch": scratch}
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, __file__, "--one", name, json.dumps(asked)]
        ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    found = json.loads(ran.stdout.splitlines()[-1])
    return {"by": name, "folder": folder, "size": size, "epochs": epochs, "seed": seed, **found}


def run_one(name: str, asked: dict) -> None:
    """Prints the row of one run, by one evaluator: top-1 of the answers to every validation picture."""
    import torch
    from contenders import CONTENDERS, Run

    torch.set_num_threads(1)
    paths = {key: Path(asked[key]) for key in ("folder", "weights", "scratch")}
    outcome = CONTENDERS[name](Run(**{**asked, **paths}))
    hits = sum(one == other for one, other in zip(outcome.predictions, outcome.labels, strict=True))
    images = sum(1 for _ in (paths["folder"] / "train").glob("*/*")), len(outcome.labels)
    found = {"top1": 100 * hits / images[1], "images": images, "steps": outcome.steps}
    found |= {"laps": [round(lap, 2) for lap in outcome.laps], "seconds": round(sum(outcome.laps), 1)}
    print(json.dumps(found | {"versions": {library: version(library) for library in LIBRARIES}}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        run_one(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
