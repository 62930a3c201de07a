"""How many planted label errors stand among a report's first suspects.

    python benchmarks/label_errors.py --model runs/b0 --data_dir imagenette

Looks at every validation image once, then gives `--swap` of them another class, chosen at random, and counts how many
of these are among the first `--first` suspects; for each of `--seeds` draws. A label is no input of the network: its
answers stay what they are.
"""

from dataclasses import replace

import numpy as np
import torch
from accelerate import Accelerator

from effnet_hf.analysis import Answers, Recorder, measure
from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import ArgumentParser, at_least, path, run
from effnet_hf.data import BatchPlan, build_loaders
from effnet_hf.recipes import Recipe
from effnet_hf.training.evaluation import rule_out_classes
from effnet_hf.training.loop import validate


def answers_of(model: str, data_dir: str, workers: int | None) -> tuple[Answers, float]:
    """The answers to all validation images, among the classes that the data has, and the top-1, percent."""
    checkpoint, accelerator = open_checkpoint(model), Accelerator(cpu=not torch.cuda.is_available())
    recipe = Recipe(model=model, data_dir=data_dir, per_device_batch_size=32, num_workers=workers)
    names = checkpoint.class_names
    with build_loaders(
        recipe, checkpoint.processor, BatchPlan(32), accelerator.device, train=False, class_names=names
    ) as loaders:
        network, recorder = checkpoint.load(), Recorder()
        if loaders.present is not None:
            rule_out_classes(network, loaders.present)
        figures = validate(network.to(accelerator.device), loaders.val, accelerator, recorder=recorder)
    found = recorder.answers(accelerator, names)
    assert found is not None
    return found, figures["top1"]


def found_among(answers: Answers, swap: int, first: int, seed: int) -> tuple[int, int]:
    """Swapped labels among the first suspects, and how many suspects there are in all."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(answers), swap, replace=False)
    classes, labels = np.unique(answers.labels), answers.labels.copy()
    for row in rows:
        labels[row] = rng.choice(classes[classes != labels[row]])
    figures = measure(replace(answers, labels=labels))
    suspects = {case.position for case in figures.suspects[:first]}
    return len(suspects & set(rows.tolist())), figures.num_suspects


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(description="Plants label errors and counts how many a report finds.")
    parser.add_argument("--model", type=path, required=True)
    parser.add_argument("--data_dir", type=path, required=True)
    parser.add_argument("--swap", type=at_least(1), default=20)
    parser.add_argument("--first", type=at_least(1), default=40)
    parser.add_argument("--seeds", type=at_least(1), default=10)
    parser.add_argument("--num_workers", type=int, default=None)
    args = parser.parse_args(argv)
    answers, top1 = answers_of(args.model, args.data_dir, args.num_workers)
    print(f"{len(answers):,} images, top-1 {top1:.2f} %, {args.swap} labels swapped, {args.seeds} draws")
    counts = []
    for seed in range(args.seeds):
        count, suspects = found_among(answers, args.swap, args.first, seed)
        counts.append(count)
        print(f"seed {seed}: {count} of {args.swap} among the first {min(args.first, suspects)} of {suspects} suspects")
    print(f"mean {np.mean(counts):.1f}, least {min(counts)} of {args.swap}")


if __name__ == "__main__":
    run(main)
