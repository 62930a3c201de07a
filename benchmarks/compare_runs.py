"""A Markdown table of several runs from their metrics.jsonl: last and best top-1 with 95 % intervals.

    python benchmarks/compare_runs.py runs/imagenette-b0 runs/imagenette-widese-b0 runs/imagenette-timm --n 1000

The interval is Wilson's for n validation pictures; it says nothing about other seeds.
"""

import math
from pathlib import Path

from effnet_hf.cli import ArgumentParser, run
from effnet_hf.training.plots import read_rows


def wilson(percent: float, n: int) -> str:
    """95 % interval of a proportion given in percent."""
    p, z = percent / 100, 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return f"{percent:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def main() -> None:
    parser = ArgumentParser(description="A Markdown table of several runs.")
    parser.add_argument("runs", nargs="+", help="output folders of train.py or timm_loop.py")
    parser.add_argument("--n", type=int, required=True, help="validation pictures")
    arguments = parser.parse_args()
    print("| run | epochs | last top-1, % | best top-1, % | moving average, last top-1, % | last train.loss |")
    print("|---|---|---|---|---|---|")
    for folder in arguments.runs:
        rows = read_rows(Path(folder))
        top1 = [row["val.top1"] for row in rows if row["type"] == "val"]
        ema = [row["val_ema.top1"] for row in rows if row["type"] == "val_ema"]
        loss = [row["train.loss"] for row in rows if row["type"] == "epoch"]
        cells = [wilson(value, arguments.n) for value in (top1[-1], max(top1))]
        cells.append(wilson(ema[-1], arguments.n) if ema else "")
        print(f"| {Path(folder).name} | {len(top1)} | {' | '.join(cells)} | {loss[-1]:.3f} |")


if __name__ == "__main__":
    run(main)
