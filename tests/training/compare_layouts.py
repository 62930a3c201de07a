"""The same global batch as one process, as accumulation, and as two processes: are the losses the same?

    python tests/training/compare_layouts.py FOLDER

Every layout sees the same micro-batches of 4 (batch norm's statistics are per micro-batch in all of them), so nothing
needs to be switched off but what draws differently per process: dropout, stochastic depth, mixup.
"""

import json
import os
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from accelerate import debug_launcher  # noqa: E402
from workbench import small_recipe, write_squares  # noqa: E402

from effnet_hf.training import train  # noqa: E402


QUIET = {"survival_prob": 1.0, "dropout_rate": 0.0, "mixup": 0.0, "ema_decay": 0.0}


def figures(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["train.loss"] for row in rows if row["type"] == "train"]


def main(scratch: Path) -> int:
    data = write_squares(scratch / "data")
    recipe = small_recipe(data, scratch / "accumulated", **QUIET)
    debug_launcher(train, args=(recipe,), num_processes=1)
    debug_launcher(train, args=(recipe.replace(output_dir=str(scratch / "two")),), num_processes=2)
    one, two = figures(scratch / "accumulated"), figures(scratch / "two")
    print("1 process x 2 accumulated:", *(f"{loss:.6f}" for loss in one))
    print("2 processes              :", *(f"{loss:.6f}" for loss in two))
    difference = max(abs(a - b) / abs(a) for a, b in zip(one, two))
    print(f"largest relative difference {difference:.2e}")
    return int(len(one) != len(two) or difference > 1e-5)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
