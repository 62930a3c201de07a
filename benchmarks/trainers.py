"""The same fine-tuning by our command, by Trainer, in a loop of one's own, and as transformers' script does.

    effnet-hf convert lite0 --warm_start b0 --images imagenette/train --output_dir b0-lite0
    python benchmarks/trainers.py WORK --weights b0-lite0 --imagenette imagenette --output trainer.jsonl

20 training pictures per class of the Imagenette subset (those of benchmarks/finetune) at 96 px, 8 epochs in batches of
16, one thread, a process for each run. `seconds` are CPU seconds (user and system) of the whole process; it validates
on one picture per class after each epoch. `top1` is what `effnet-hf validate` finds of the saved folder on all 1,000
validation pictures, `own` what the script's own evaluation finds of the same weights.

transformers' run_image_classification.py asks the Hub for its metric, so its transforms are run, not the file: it takes
`size["shortest_edge"]` for both training and evaluation, here 110 pixels, or 96 with a processor without a margin.
What stands in the output already is not run again.
"""

import argparse
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from effnet_hf.cli import ArgumentParser, path


SIZE, EPOCHS, SEEDS = 96, 8, (0, 1, 2)
ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples/trainer"
COMMON = ["--num_train_epochs", EPOCHS, "--use_cpu", "true", "--eval_strategy", "no", "--save_strategy", "no"]
COMMON += ["--load_best_model_at_end", "false", "--disable_tqdm", "true", "--dataloader_drop_last", "true"]  # as ours


def command(by: str, work: Path, output: Path, seed: int) -> list:
    data, model = work / "few", work / "b0"
    common = ["--model", model, "--data_dir", data, "--output_dir", output, "--seed", seed]
    if by == "effnet_hf":
        flags = ["--epochs", EPOCHS, "--num_workers", 0, "--quiet", "true", "--checkpoint_every_epochs", 0]
        return ["-m", "effnet_hf", "train", "--config", "finetune", *common, *flags]
    if by == "no_trainer":
        return [EXAMPLES / "no_trainer.py", *common, "--epochs", EPOCHS]
    if by == "trainer":
        return [EXAMPLES / "trainer.py", *common, *COMMON]
    return [__file__, "--as_the_script", by.partition("-")[2], EXAMPLES / "trainer.py", *common, *COMMON]


NAMES = ("effnet_hf", "trainer", "no_trainer", "script-margin", "script-no_margin")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("work", type=path)
    parser.add_argument("--weights", type=path, required=True)
    parser.add_argument("--imagenette", type=path, required=True)
    parser.add_argument("--output", type=path, required=True)
    arguments = argparse.Namespace(**{name: Path(value) for name, value in vars(parser.parse_args()).items()})
    from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor
    from effnet_hf.training import validate_checkpoint

    work = arguments.work.resolve()
    make_folders(work, arguments.imagenette.resolve())
    if not (work / "b0").is_dir():
        model = EfficientNetNVForImageClassification.from_pretrained(arguments.weights, image_size=SIZE)
        EfficientNetNVImageProcessor(size=round(SIZE * 8 / 7), crop_size=SIZE).save_pretrained(work / "b0")
        model.save_pretrained(work / "b0")
    done = [json.loads(line) for line in arguments.output.read_text().splitlines()] if arguments.output.exists() else []
    for seed, by in ((seed, by) for seed in SEEDS for by in NAMES):
        if any((row["by"], row["seed"]) == (by, seed) for row in done):
            continue
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            output, before = Path(scratch) / "run", _cpu_seconds()
            _run(command(by, work, output, seed))
            seconds = _cpu_seconds() - before
            last = next((output / "checkpoints").glob("update-*"), output)  # of all the last epoch, not the best
            figures = validate_checkpoint(str(last), str(arguments.imagenette), num_workers=0, tell=lambda note: None)
            assert figures is not None  # one process
            row = {"by": by, "seed": seed, "top1": figures["top1"], "seconds": round(seconds, 1)}
            if by.startswith("script"):
                row["own"] = own_evaluation(output, arguments.imagenette / "val")
        row["versions"] = {name: version(name) for name in ("torch", "torchvision", "transformers", "accelerate")}
        with open(arguments.output, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def make_folders(work: Path, imagenette: Path) -> None:
    """`few/train` and `few/val` as links, chosen as the folder imagenette-20 of benchmarks/finetune."""
    for split, count in (("train", 20), ("val", 1)):
        for source in sorted(each for each in (imagenette / split).iterdir() if each.is_dir()):
            key = (lambda path: hashlib.sha256(path.name.encode()).hexdigest()) if split == "train" else None
            for file in sorted(source.iterdir(), key=key)[:count]:
                link = work / "few" / split / source.name / file.name
                link.parent.mkdir(parents=True, exist_ok=True)
                if not link.is_symlink():
                    link.symlink_to(file)


def _run(words: list) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, *map(str, words)], env=environment, stdout=sys.stderr, check=True)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def script_transforms(processor):
    """Those of run_image_classification.py and run_image_classification_no_trainer.py in transformers 4.57 and 5."""
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )

    size = processor.size["shortest_edge"]
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    train = Compose([RandomResizedCrop(size), RandomHorizontalFlip(), ToTensor(), normalize])
    return train, Compose([Resize(size), CenterCrop(size), ToTensor(), normalize])


def as_the_script(kind: str) -> None:
    """Runs trainer.py's Trainer and flags on the script's transforms, with the script's way to a processor."""
    sys.path.insert(0, str(EXAMPLES))
    import trainer

    from effnet_hf import EfficientNetNVImageProcessor

    opened = trainer.AutoImageProcessor.from_pretrained

    def processor_of(name: str, **sides):
        processor = opened(name, **sides)
        if kind == "no_margin":
            return EfficientNetNVImageProcessor.for_image_size(processor.crop_size["height"], margin=0)
        return processor

    class Script(trainer.FineTuning):
        def __init__(self, *, train_dataset, eval_dataset, processing_class, **others):
            for dataset, transform in zip(
                (train_dataset, eval_dataset), script_transforms(processing_class), strict=True
            ):
                dataset.set_transform(
                    lambda batch, transform=transform: {
                        "pixel_values": [transform(image.convert("RGB")) for image in batch["image"]],
                        "label": batch["label"],
                    }
                )
            datasets = {"train_dataset": train_dataset, "eval_dataset": eval_dataset}
            super().__init__(processing_class=processing_class, **datasets, **others)

    vars(trainer)["FineTuning"] = Script
    setattr(trainer.AutoImageProcessor, "from_pretrained", processor_of)  # noqa: B010  a method of its class for mypy
    trainer.main()


def own_evaluation(folder: Path, images: Path) -> float:
    import torch
    from torchvision.datasets import ImageFolder

    from effnet_hf import EfficientNetNVForImageClassification, EfficientNetNVImageProcessor

    model = EfficientNetNVForImageClassification.from_pretrained(folder).eval()
    _, transform = script_transforms(EfficientNetNVImageProcessor.from_pretrained(folder))
    dataset, hits = ImageFolder(images, transform), 0
    with torch.inference_mode():
        for pixels, labels in torch.utils.data.DataLoader(dataset, batch_size=50):
            hits += int((model(pixels).logits.argmax(-1) == labels).sum())
    return 100 * hits / len(dataset)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as_the_script"]:
        kind = sys.argv[2]
        sys.argv = sys.argv[3:]
        as_the_script(kind)
    else:
        main()
