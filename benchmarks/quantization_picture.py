"""Top-1 of float, PTQ and QAT with 95 % intervals, and the training loss of QAT, from result files of `qat.py`.

    python benchmarks/quantization_picture.py benchmarks/2026-11-25-qat-cpu --models b0 widese-b0

Reads MODEL.json (`quantization.json` of a run) and MODEL.jsonl (its `metrics.jsonl`), writes curves.png beside them.
"""

import json
from pathlib import Path

import matplotlib
from lib.report import wilson

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.quantization.report import STAGES


matplotlib.use("Agg")
import matplotlib.pyplot as plt


def main() -> None:
    parser = ArgumentParser(description="Draw what quantization costs in accuracy.")
    parser.add_argument("folder", type=path)
    parser.add_argument("--models", nargs="+", required=True)
    arguments = parser.parse_args()
    folder = Path(arguments.folder)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for i, model in enumerate(arguments.models):
        figures = json.loads((folder / f"{model}.json").read_text())
        found = [figures[stage] for stage in STAGES]
        spread: tuple[list, list] = ([], [])
        for entry in found:
            low, high = wilson(entry["top1"], entry["n"])
            spread[0].append(entry["top1"] - low)
            spread[1].append(high - entry["top1"])
        places = [x + 0.12 * i for x in range(len(found))]
        left.errorbar(places, [entry["top1"] for entry in found], spread, fmt="o", capsize=4, label=model)
        rows = map(json.loads, (folder / f"{model}.jsonl").read_text().splitlines())
        steps = [(row["update"], row["train.loss"]) for row in rows if row["type"] == "train"]
        right.plot(*zip(*steps), marker="o", markersize=3, label=model)
    left.set_xticks(range(len(STAGES)), ["float", "PTQ", "QAT"])
    left.set(title="Top-1, 95 % intervals", ylabel="%")
    right.set(title="Training loss of QAT, smoothed labels", xlabel="step")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    figure.savefig(folder / "curves.png", dpi=90)


if __name__ == "__main__":
    run(main)
