"""Whether an option gains on top of `--config finetune`: python benchmarks/finetune/options.py WORK --weights b0-lite0

After `run.py`, whose folders in WORK it uses: 20 pictures per class, and a long tail of them, 100 of the first class to
4 of the last. Every option runs with the same seeds as the recipe without it, one thread, and is measured on the 1,000
validation pictures after its last epoch. A line per run goes to WORK/options.jsonl; what stands there is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from folders import COMPARED, FEW


EPOCHS, SEEDS = 8, (0, 1, 2)
TAIL, KEPT = "imagenette-tail", (100, 70, 50, 35, 25, 18, 12, 9, 6, 4)  # pictures per class
TRIED = {
    "imagenette-20": (
        "",
        "--random_erasing 0.25",
        "--augmentation randaugment --randaugment_magnitude 5",
        "--augmentation randaugment --randaugment_magnitude 9",
        "--layer_decay 0.75",
        "--freeze backbone --freeze_epochs 2",
    ),
    TAIL: ("", "--sampler balanced", "--class_weights balanced"),
}
LIBRARIES = ("torch", "torchvision", "transformers", "accelerate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--weights", type=Path, required=True)
    arguments = parser.parse_args()
    work, rows = arguments.work, arguments.work / "options.jsonl"
    make_tail(work)
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    for seed in SEEDS:
        for folder, options in TRIED.items():
            for option in options:
                if any((row["option"], row["folder"], row["seed"]) == (option, folder, seed) for row in done):
                    continue
                row = {"option": option, "folder": folder, "seed": seed, "epochs": EPOCHS}
                row |= one(work, arguments.weights.resolve(), folder, option, seed)
                with open(rows, "a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def make_tail(work: Path) -> None:
    """Links to the first pictures of each class; a set of pictures that is there stays."""
    source = work / "imagenette-100"
    for folder, count in zip(sorted(path for path in (source / "train").iterdir() if path.is_dir()), KEPT, strict=True):
        for file in sorted(folder.iterdir())[:count]:
            link(work / TAIL / "train" / folder.name / file.name, file)
    for name in ("val", FEW + "/val"):
        link(work / TAIL / name, source / name)
    link(work / TAIL / FEW / "train", work / TAIL / "train")


def link(path: Path, target: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_symlink():
        path.symlink_to(target.resolve())


def one(work: Path, weights: Path, folder: str, option: str, seed: int) -> dict:
    """The figures of one run, whose validation meanwhile sees one picture of each class and costs nothing."""
    size = COMPARED["imagenette-20"]
    data = (work / folder).resolve()
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        run = Path(scratch) / "run"
        command(
            "train", "--config", "finetune", "--model", weights, "--data_dir", data / FEW, "--output_dir", run,
            "--image_size", size, "--resize_margin", round(size / 7), "--epochs", EPOCHS, "--seed", seed,
            "--num_workers", 0, "--checkpoint_every_epochs", 0, "--no_report", *option.split(),
        )  # fmt: skip
        (last,) = (run / "checkpoints").glob("update-*")
        said = command("validate", "--model", last, "--data_dir", data, "--num_workers", 0, "--json")
    figures = json.loads(said.splitlines()[-1])
    kept = ("n", "top1", "macro_recall", "macro_f1")
    return {name: figures[name] for name in kept} | {"versions": {name: version(name) for name in LIBRARIES}}


def command(name: str, *arguments: object) -> str:
    """What one of our commands prints, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    typed = [sys.executable, "-m", f"effnet_hf.commands.{name}", *map(str, arguments)]
    return subprocess.run(typed, env=environment, stdout=subprocess.PIPE, check=True, text=True).stdout


if __name__ == "__main__":
    main()
