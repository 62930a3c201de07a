"""A Markdown table of several runs from their metrics.jsonl: last and best top-1 with 95 % intervals.

    python benchmarks/compare_runs.py runs/imagenette-b0 runs/imagenette-widese-b0 runs/imagenette-timm --n 1000

The interval is Wilson's for n validation images; it says nothing about other seeds.
"""

from pathlib import Path

from lib.report import table, with_interval

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.training.plots import read_rows


def main() -> None:
    parser = ArgumentParser(description="A Markdown table of several runs.")
    parser.add_argument("runs", nargs="+", type=path, help="output folders of train.py or timm_loop.py")
    parser.add_argument("--n", type=int, required=True, help="validation images")
    arguments = parser.parse_args()
    lines = []
    for folder in arguments.runs:
        rows = read_rows(Path(folder))
        top1 = [row["val.top1"] for row in rows if row["type"] == "val"]
        ema = [row["val_ema.top1"] for row in rows if row["type"] == "val_ema"]
        loss = [row["train.loss"] for row in rows if row["type"] == "epoch"]
        lines.append({
            "run": Path(folder).name,
            "epochs": len(top1),
            "last top-1, %": with_interval(top1[-1], arguments.n),
            "best top-1, %": with_interval(max(top1), arguments.n),
            "moving average, last top-1, %": with_interval(ema[-1], arguments.n) if ema else "",
            "last train.loss": f"{loss[-1]:.3f}",
        })  # fmt: skip
    print(table(lines))


if __name__ == "__main__":
    run(main)
