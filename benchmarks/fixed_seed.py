"""The same losses and the same weights, to the last bit, from two versions of this repository.

    git worktree add /tmp/before HEAD~1
    python benchmarks/fixed_seed.py /tmp/before . --work /tmp/fixed-seed

Trains on handwritten digits with each tree's own `train.py` and `qat.py`: moving average, accumulation, clipping, mixup
and AutoAugment; a WideSE network in bf16; two processes; quantization; two launches; distillation. One line a run: its
training losses and the first digits of its weights' sha256. Exit code 1 where the trees differ. Some three minutes a
tree on one core.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.errors import UserError


SHORT = "--config digits --epochs 1 --global_batch_size 32 --num_workers 0 --survival_prob 0.8"
LONG = "--config digits --epochs 2 --global_batch_size 32 --num_workers 1 --ema_decay 0.99"
AS_THE_MODEL = "--interpolation bicubic --resize_margin 0 --image_size 32"
# Name: one or several command lines, which share a folder.
RUNS = {
    "everything on": [
        f"train.py {SHORT} --ema_decay 0.99 --per_device_batch_size 16 --gradient_clip 1 --mixup 0.2"
        " --augmentation autoaugment"
    ],
    "WideSE, bf16": [f"train.py {SHORT} --variant widese-b0 --precision bf16"],
    "two processes": [
        f"-m torch.distributed.run --nproc_per_node 2 --master_port {{port}} train.py {SHORT}"
        " --ema_decay 0.9 --per_device_batch_size 8"
    ],  # fmt: skip
    "two launches": [f"train.py {LONG} --run_epochs 1", f"train.py {LONG} --resume auto"],
    "distillation": [f"train.py {SHORT} --model {{model}} --distillation_weight 0.5"],
    "quantization": [
        f"qat.py --config quant-b0 --model {{model}} --epochs 1 --global_batch_size 32 --per_device_batch_size 16"
        f" --num_workers 0 --calibration_batches 4 --learning_rate 0.001 {AS_THE_MODEL}"
    ],
}


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="+", type=path, help="roots of clones or worktrees")
    parser.add_argument("--work", type=path, default="fixed-seed", help="folder for data and runs")
    parser.add_argument("--port", type=int, default=29711, help="free port for two processes")
    arguments = parser.parse_args()
    work = Path(arguments.work).resolve()
    trees = [Path(tree).resolve() for tree in arguments.trees]
    for tree in trees:
        if not (tree / "train.py").is_file():
            raise UserError(f"{tree} holds no train.py; name the root of a clone.")
    data = work / "digits"
    if not data.is_dir():
        call(trees[-1], f"examples/write_digits.py {data}")
    found = {}
    for number, tree in enumerate(trees):
        folder = work / f"tree-{number}"
        model = folder / "two launches"  # the first to run, so that the others can start from it
        for name in sorted(RUNS, key=lambda name: name != "two launches"):
            for line in RUNS[name]:
                words = line.format(model="MODEL", port=arguments.port).split()
                words = [str(model) if word == "MODEL" else word for word in words]
                rest = [
                    "--data_dir",
                    str(data),
                    "--output_dir",
                    str(folder / name),
                    "--quiet",
                    "true",
                    "--log_every",
                    "5",
                ]
                call(tree, [*words, *rest, *([] if "auto" in words else ["--overwrite", "true"])])
            found[number, name] = what_came_out(folder / name)
            print(f"{tree.name}: {name}: {found[number, name]}", flush=True)
    different = [name for name in RUNS if len({found[number, name] for number in range(len(trees))}) > 1]
    print(f"different: {', '.join(different)}" if different else "equal to the last bit" if len(trees) > 1 else "")
    return 1 if different else 0


def call(tree: Path, words: str | list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    words = words.split() if isinstance(words, str) else words
    done = subprocess.run([sys.executable, *words], cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{tree}: {' '.join(words)} ended with {done.returncode}: {done.stderr.strip()[-300:]}")


def what_came_out(folder: Path) -> str:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    losses = [row["train.loss"] for row in rows if row["type"] == "train"]
    return f"{losses} {hashlib.sha256((folder / 'model.safetensors').read_bytes()).hexdigest()[:12]}"


if __name__ == "__main__":
    run(main)
