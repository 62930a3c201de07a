"""What `--reducing_gap` changes: training pixels, a network's answers about them, and top-1 of short fine-tuning runs.

    python benchmarks/reducing_gap.py --data_dir SAMPLES --image_size 64
    python benchmarks/reducing_gap.py --data_dir imagenette --image_size 48 --checkpoint runs/imagenette-b0
    python benchmarks/reducing_gap.py --data_dir imagenette --image_size 32 --model checkpoints/b0-lite0

Pixels: the same crops, with and without, in grey levels of 255; beside them what another filter changes. Training: the
same seeds, so the same crops in the same order; validation decodes in full in every run.
"""

import statistics
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from lib.environment import LOADING, environment, resolve_device
from lib.report import table, write_figures
from PIL import Image
from scipy import stats

from effnet_hf import EfficientNetNVImageProcessor, train
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import DataSource, DeviceStage, TrainTransform
from effnet_hf.data.folder import scan_tree
from effnet_hf.data.pictures import Box, Picture, read_file
from effnet_hf.data.sampler import ValidationPlan
from effnet_hf.data.worker_pool import MicroBatches
from effnet_hf.recipes import load_recipe


GAPS = (3, 2, 1)
CROP_SCALE = 0.25  # of the crops that a network is asked about: as imagenette-finetune trains
BILINEAR = "bilinear instead of bicubic, in full"


def compare_pixels(data_dir: str, image_size: int, count: int) -> list[dict]:
    """One row per gap, and one for another filter: the share of the crops by the factor they were decoded at, the mean
    difference of those that were reduced (of all, for the filter), and the largest 99th percentile of one of them."""
    train_folder = Path(data_dir, "train")
    paths = scan_tree(train_folder if train_folder.is_dir() else data_dir).paths
    full, other = (
        TrainTransform(EfficientNetNVImageProcessor.for_image_size(image_size, resample=resample))
        for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR)
    )
    ways = {f"--reducing_gap {gap}": TrainTransform(full.processor, reducing_gap=gap) for gap in GAPS}
    ways[BILINEAR] = other
    factors: dict[str, Counter] = {name: Counter() for name in ways}
    means: dict[str, list[float]] = {name: [] for name in ways}
    worst = dict.fromkeys(ways, 0.0)
    for seed in range(count):
        data = read_file(paths[seed * 7919 % len(paths)])
        for name, transform in ways.items():
            whole = _Whole(data)
            exact = (full if name == BILINEAR else transform)(whole, seed).astype(int)
            factors[name][whole.reduced] += 1
            if whole.reduced > 1 or name == BILINEAR:
                difference = np.abs(transform(Picture(data), seed) - exact)
                means[name].append(float(difference.mean()))
                worst[name] = max(worst[name], float(np.percentile(difference, 99)))
    return [
        {
            "way": name,
            **{f"at 1/{factor}, %": 100 * factors[name][factor] / count for factor in (1, 2, 4, 8)},
            "mean difference where reduced": statistics.fmean(means[name]) if means[name] else 0.0,
            "99th percentile, worst crop": worst[name],
        }
        for name in ways
    ]


class _Whole(Picture):
    """Decoded in full whatever is asked for, and cut where the reduced one is cut: at multiples of the factor."""

    reduced = 1

    def crop(self, box: Box, reduced: int = 1) -> torch.Tensor:
        self.reduced = reduced
        left, top = (reduced * round(edge / reduced) for edge in (box.left, box.top))
        right, bottom = (reduced * round(end / reduced) for end in (box.left + box.width, box.top + box.height))
        return super().crop(Box(left, top, min(right, self.width) - left, min(bottom, self.height) - top))


def compare_answers(name: str, data_dir: str, image_size: int) -> list[dict]:
    """A trained network's answers about one training crop of each validation image, decoded in each way: top-1, answers
    that differ from those about the full one, and the paired difference of top-1 with its 95 % interval."""
    checkpoint = open_checkpoint(name)
    network = checkpoint.load().eval()
    split = DataSource.from_folder(data_dir, train=False, class_names=checkpoint.class_names).val
    assert split is not None
    full = EfficientNetNVImageProcessor.for_image_size(image_size)
    bilinear = EfficientNetNVImageProcessor.for_image_size(image_size, resample=Image.Resampling.BILINEAR)
    ways = {
        f"--reducing_gap {gap}": TrainTransform(full, crop_scale=CROP_SCALE, reducing_gap=gap) for gap in (0, *GAPS)
    }
    ways[BILINEAR] = TrainTransform(bilinear, crop_scale=CROP_SCALE)
    stage, answers = DeviceStage("cpu", full), {}
    for way, transform in ways.items():
        batches = MicroBatches(split, transform, 0, False)
        with torch.inference_mode():
            requests = ValidationPlan(len(split), 50).requests()
            pixels = (stage.stage(batches[request])["pixel_values"] for request in requests)
            answers[way] = torch.cat([network(pixel_values=each).logits.argmax(1) for each in pixels]).numpy()
    right = {way: answers[way] == np.asarray(split.labels) for way in ways}
    exact, rows = "--reducing_gap 0", []
    for way in ways:
        points = 100 * (right[way].astype(float) - right[exact])
        error = 1.96 * points.std(ddof=1) / len(points) ** 0.5
        rows.append(
            {
                "way": way,
                "top-1, %": 100 * float(right[way].mean()),
                "other answers, %": 100 * float((answers[way] != answers[exact]).mean()),
                "difference, points": float(points.mean()),
                "95 %": [float(points.mean() - error), float(points.mean() + error)],
            }
        )
    return rows


def compare_training(arguments) -> Iterator[dict]:
    """Top-1 of each seed with each gap, one after the other."""
    for seed in range(arguments.seeds):
        row: dict = {"seed": seed}
        for gap in (0, *arguments.gaps):
            with tempfile.TemporaryDirectory() as scratch:
                recipe = load_recipe(
                    "imagenette-finetune", model=arguments.model, data_dir=arguments.data_dir, seed=seed, quiet=True,
                    image_size=arguments.image_size, resize_margin=arguments.image_size // 7, epochs=arguments.epochs,
                    reducing_gap=gap, report=False, output_dir=str(Path(scratch, "run")), num_workers=0,
                )  # fmt: skip
                summary = train(recipe)
            assert summary is not None
            row[f"--reducing_gap {gap}"] = summary["top1"]
        yield row


def differences(rows: list[dict]) -> list[dict]:
    """For each gap the mean of its paired differences to decoding in full, and its 95 % interval by Student's t."""
    found = []
    for name in list(rows[0])[2:]:
        points = [row[name] - row["--reducing_gap 0"] for row in rows]
        error = stats.t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / len(points) ** 0.5
        low, high = statistics.fmean(points) - error, statistics.fmean(points) + error
        found.append({"way": name, "difference of top-1, points": statistics.fmean(points), "95 %": [low, high]})
    return found


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", type=path, required=True, help="folder with <class>/… or train/ and val/")
    parser.add_argument("--image_size", type=at_least(1), default=224, help="side of the training crop")
    parser.add_argument("--crops", type=at_least(1), default=500, help="crops whose pixels are compared")
    parser.add_argument("--checkpoint", type=path, help="trained checkpoint whose answers are compared")
    parser.add_argument("--model", type=path, help="checkpoint to fine-tune from, for the comparison of accuracy")
    parser.add_argument("--gaps", type=at_least(1), nargs="+", default=[2, 1], help="that are trained with, beside 0")
    parser.add_argument("--seeds", type=at_least(2), default=5, help="fine-tuning runs of each kind")
    parser.add_argument("--epochs", type=at_least(1), default=2, help="of each of them")
    parser.add_argument("--output", type=path, help="write the figures to this JSON file as well")
    arguments = parser.parse_args()
    figures: dict = {"kind": "data", **environment(resolve_device("cpu", threads=1), LOADING)}
    figures["pixels"] = compare_pixels(arguments.data_dir, arguments.image_size, arguments.crops)
    print(table(figures["pixels"]))
    if arguments.checkpoint:
        figures["answers"] = compare_answers(arguments.checkpoint, arguments.data_dir, arguments.image_size)
        print(f"\n{table(figures['answers'])}")
    if arguments.model:
        figures["training"] = []
        for row in compare_training(arguments):
            figures["training"].append(row)
            if len(figures["training"]) > 1:
                figures["differences"] = differences(figures["training"])
                print(f"\n{table(figures['training'])}\n\n{table(figures['differences'])}", flush=True)
            if arguments.output:  # as far as it has come
                write_figures(figures, arguments.output)
    elif arguments.output:
        write_figures(figures, arguments.output)


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main)
