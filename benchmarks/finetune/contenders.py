"""One fine-tuning run each of four projects, from the same weights, on one CPU thread: `CONTENDERS`.

A contender is called with a `Run` and returns the CPU seconds (user and system, of the whole process) that its
training took, its optimizer steps, and what it answers to the validation pictures after its last epoch, prepared as its
own users would get them. Validation during the training is not counted, nor are starting and reading weights.
"""

import contextlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from folders import FEW


@dataclass(frozen=True)
class Run:
    """`epochs` counts what the contender's own flag counts; transformers' may be a fraction."""

    folder: Path
    weights: Path  # a folder of ours; of timm's for timm and fastai
    size: int
    epochs: float
    seed: int
    scratch: Path


@dataclass(frozen=True)
class Outcome:
    laps: list[float]  # CPU seconds of each epoch; of all together, where the contender keeps no count
    steps: int
    predictions: list[int]
    labels: list[int]


class Clock:
    """CPU seconds of this process from `start` to `stop`, again and again."""

    def __init__(self):
        self.laps, self.since = [], None

    def start(self) -> None:
        self.since = time.process_time()

    def stop(self) -> None:
        self.laps.append(time.process_time() - self.since)


def effnet_hf(run: Run) -> Outcome:
    """`effnet-hf train --config finetune`: what its last epoch answers, not what its best epoch does."""
    from effnet_hf import EfficientNetNVForImageClassification
    from effnet_hf.commands import train
    from effnet_hf.training import loop

    clock, train_epoch, last = Clock(), loop.train_epoch, run.scratch / "run/checkpoints"

    def timed(*arguments):
        clock.start()
        try:
            return train_epoch(*arguments)
        finally:
            clock.stop()

    loop.train_epoch = timed
    flags = {"data_dir": run.folder / FEW, "model": run.weights, "image_size": run.size, "epochs": int(run.epochs)}
    flags |= {"seed": run.seed, "output_dir": run.scratch / "run", "num_workers": 0}
    flags |= {"checkpoint_every_epochs": 0, "quiet": "true", "resize_margin": round(run.size / 7)}  # 0.875, as at 224
    if (run.scratch / "flags.json").exists():  # of who tunes the recipe; `run.py` writes none
        flags |= json.loads((run.scratch / "flags.json").read_text())
    typed = [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
    with contextlib.redirect_stdout(sys.stderr):
        assert train.main(["--config", "finetune", *typed]) == 0
    (checkpoint,) = last.glob("update-*")
    model = EfficientNetNVForImageClassification.from_pretrained(checkpoint).eval()
    processor = _processor(run.scratch / "run")
    dataset = _image_folder(run.folder / "val", lambda image: processor(image, return_tensors="pt")["pixel_values"][0])
    steps = int(checkpoint.name.partition("-")[2])
    return Outcome(clock.laps, steps, *_answers(lambda pixels: model(pixels).logits, dataset))


def transformers(run: Run) -> Outcome:
    """What examples/pytorch/image-classification/run_image_classification.py does with `--train_dir`,
    `--validation_dir`, `--remove_unused_columns false`, `--ignore_mismatched_sizes` and an output folder: its
    transforms, its collation, and `Trainer` with the defaults of `TrainingArguments` (AdamW, 5e-5 falling linearly,
    batches of 8). The script itself asks the Hub for its metric."""
    from torchvision.transforms import (
        CenterCrop,
        Compose,
        Normalize,
        RandomHorizontalFlip,
        RandomResizedCrop,
        Resize,
        ToTensor,
    )
    from transformers import AutoModelForImageClassification, Trainer, TrainingArguments, set_seed

    import effnet_hf  # noqa: F401  # our architecture, for AutoModel

    set_seed(run.seed)
    processor = _processor(run.weights)
    normalize = Normalize(mean=processor.image_mean, std=processor.image_std)
    train = Compose([RandomResizedCrop(run.size), RandomHorizontalFlip(), ToTensor(), normalize])
    validate = Compose([Resize(run.size), CenterCrop(run.size), ToTensor(), normalize])
    datasets = _image_folder(run.folder / "train", train), _image_folder(run.folder / "val", validate)
    model = AutoModelForImageClassification.from_pretrained(
        run.weights, num_labels=len(datasets[0].classes), ignore_mismatched_sizes=True
    )

    def collate(examples):
        return {
            "pixel_values": torch.stack([pixels for pixels, _ in examples]),
            "labels": torch.tensor([label for _, label in examples]),
        }

    arguments = TrainingArguments(
        output_dir=str(run.scratch / "run"),
        num_train_epochs=run.epochs,
        seed=run.seed,
        remove_unused_columns=False,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        save_strategy="no",
    )
    trainer = Trainer(model, arguments, train_dataset=datasets[0], data_collator=collate)
    clock = Clock()
    clock.start()
    trainer.train()
    clock.stop()
    model.eval()
    return Outcome(clock.laps, trainer.state.global_step, *_answers(lambda pixels: model(pixels).logits, datasets[1]))


def timm(run: Run) -> Outcome:
    """timm's train.py (in no wheel of it, so its parts) with the fine-tuning flags of its documentation, "Training
    Examples": `--pretrained --batch-size 32 --opt adamw --lr 1e-4 --weight-decay 0.01`, where everything else is the
    script's default, but for two that suit short runs: `--sched-on-updates`, and a warm-up of the default's share of
    that example's epochs, a sixth."""
    from timm import create_model
    from timm.data import create_dataset, create_loader, create_transform, resolve_data_config
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import random_seed

    random_seed(run.seed)
    batch, epochs = 32, int(run.epochs)
    dataset = create_dataset("", root=str(run.folder), split="train")
    model = create_model(f"local-dir:{run.weights}", pretrained=True, num_classes=len(dataset.reader.class_to_idx))
    config = resolve_data_config({"input_size": (3, run.size, run.size)}, model=model)
    common = {name: config[name] for name in ("input_size", "mean", "std")}
    common |= {"batch_size": batch, "num_workers": 0, "use_prefetcher": False, "persistent_workers": False}
    loader = create_loader(
        dataset, is_training=True, color_jitter=0.4, interpolation="random", **common
    )  # the rest of the augmentation is the function's default and the script's alike
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-4, weight_decay=0.01)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs,
        warmup_epochs=round(epochs / 6),
        warmup_lr=1e-5,
        min_lr=0,
        step_on_epochs=False,
        updates_per_epoch=len(loader),
    )
    criterion = LabelSmoothingCrossEntropy(smoothing=0.1)
    clock, steps = Clock(), 0
    for _ in range(epochs):
        clock.start()
        model.train()
        for pixels, labels in loader:
            optimizer.zero_grad()
            criterion(model(pixels), labels).backward()
            optimizer.step()
            steps += 1
            schedule.step_update(steps)
        clock.stop()
    validation = create_dataset("", root=str(run.folder), split="validation")
    validation.transform = create_transform(**config, is_training=False)
    model.eval()
    return Outcome(clock.laps, steps, *_answers(model, validation))


def fastai(run: Run) -> Outcome:
    """fastai's `vision_learner(...).fine_tune(epochs)` with all its defaults (batches of 64, one epoch of the head
    alone, discriminative one-cycle rates of 2e-3), `item_tfms=Resize(size)` and `batch_tfms=aug_transforms()`. Its
    `fine_tune` counts the epochs after that of the head."""
    from fastai.vision.all import (
        Callback,
        ImageDataLoaders,
        Resize,
        aug_transforms,
        get_image_files,
        set_seed,
        vision_learner,
    )

    clock = Clock()

    class Timer(Callback):
        order, steps = -100, 0

        def before_epoch(self):
            clock.start()

        def before_validate(self):
            clock.stop()

        def after_batch(self):
            Timer.steps += self.training

    set_seed(run.seed, reproducible=True)
    loaders = ImageDataLoaders.from_folder(
        run.folder / FEW,
        train="train",
        valid="val",
        item_tfms=Resize(run.size),
        batch_tfms=aug_transforms(),
        num_workers=0,
    )
    learner = vision_learner(loaders, f"local-dir:{run.weights}", cbs=Timer(), path=run.scratch, pretrained=True)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(int(run.epochs))
        laps = list(clock.laps)
        files = get_image_files(run.folder / "val")
        logits, _ = learner.get_preds(dl=loaders.test_dl(files))
    labels = [loaders.vocab.o2i[file.parent.name] for file in files]
    return Outcome(laps, Timer.steps, logits.argmax(-1).tolist(), labels)


CONTENDERS = {"effnet_hf": effnet_hf, "transformers": transformers, "timm": timm, "fastai": fastai}


def _image_folder(folder: Path, transform):
    from torchvision.datasets import ImageFolder

    return ImageFolder(folder, transform)


def _processor(folder: Path):
    from effnet_hf import EfficientNetNVImageProcessor

    return EfficientNetNVImageProcessor.from_pretrained(folder)


@torch.inference_mode()
def _answers(model, dataset) -> tuple[list[int], list[int]]:
    """The likeliest class of every picture, and the right one."""
    predictions, labels = [], []
    for pixels, label in torch.utils.data.DataLoader(dataset, batch_size=50):
        predictions += model(pixels).argmax(-1).tolist()
        labels += label.tolist()
    return predictions, labels
