"""What --test_time_flip changes: python benchmarks/test_time_flip.py --model M --data_dir DIR

Validates twice and compares image by image: top-1, answers that became right and wrong, and the difference of accuracy
and of the negative log-likelihood with 95 % intervals of paired differences.
"""

import csv
import math
import tempfile
from pathlib import Path

import numpy as np

from effnet_hf.cli import ArgumentParser, path, run
from effnet_hf.training import validate_checkpoint


def answers(model: str, data_dir: str, flip: bool, folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """For each image whether the answer is right, and the negative log-likelihood of its label."""
    validate_checkpoint(model, data_dir, test_time_flip=flip, report=str(folder), tell=lambda note: None)
    with open(folder / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = np.array([row["label"] == row["prediction"] for row in rows])
    return right, np.array([-math.log(max(float(row["label_probability"]), 1e-12)) for row in rows])


def interval(differences: np.ndarray) -> str:
    return f"{differences.mean():+.3f} +- {1.96 * differences.std(ddof=1) / math.sqrt(len(differences)):.3f}"


def main() -> None:
    parser = ArgumentParser(description="Top-1 with and without test-time flips, image by image.")
    parser.add_argument("--model", type=path, required=True, help="checkpoint folder or Hub id")
    parser.add_argument("--data_dir", type=path, required=True, help="as of validate")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        (plain, loss), (flipped, other) = (
            answers(arguments.model, arguments.data_dir, flip, Path(scratch, str(flip))) for flip in (False, True)
        )
    print(f"{len(plain):,} images: top-1 {100 * plain.mean():.1f} %, with flips {100 * flipped.mean():.1f} %")
    print(f"wrong to right {int((~plain & flipped).sum())}, right to wrong {int((plain & ~flipped).sum())}")
    print(f"difference, points {interval(100 * (flipped.astype(float) - plain))}, of the loss {interval(other - loss)}")


if __name__ == "__main__":
    run(main)
