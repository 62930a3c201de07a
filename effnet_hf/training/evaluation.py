"""A checkpoint on a folder of labelled images, through the loaders and arithmetic of training."""

import contextlib
import copy
import io
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from ..analysis import (
    Answers,
    Figures,
    Recorder,
    measure,
    require_report_folder,
    require_storable,
    store_temperature,
    summary,
    write_report,
)
from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import say
from ..data import BatchPlan, Loaders, Reading, build_loaders
from ..errors import UserError
from ..flips import use_test_time_flip
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import is_multi_label, require_same_task, thresholds_of
from ..recipes import Recipe, load_recipe
from ..run_folder import RunFolder
from .examine import how_measured, validation_images
from .launcher import with_others
from .loop import validate
from .owner import on_main
from .precision import leaving_as_found, start_accelerator, wants_channels_last


def validate_checkpoint(
    model: str,
    data_dir: str | None = None,
    precision: Literal["fp32", "tf32", "fp16", "bf16"] | None = None,
    per_device_batch_size: int = 64,
    num_workers: int | None = None,
    loader: Literal["imagefolder", "dali-cpu", "dali-gpu"] = "imagefolder",
    top_k: int = 5,
    dataset_name: str | None = None,
    dataset_config: str | None = None,
    val_fraction: float = 0.0,
    max_bad_files: float = 0.01,
    strict: bool = False,
    restrict_classes: bool = False,
    report: str | None = None,
    calibrate: bool = False,
    overwrite: bool = False,
    test_time_flip: bool = False,
    runtime: str = "torch",
    tell: Callable[[str], None] = say,
    **data: Any,
) -> dict[str, Any] | None:
    """Top-1, top-k (or, with several labels per image, mAP and F1), loss and speed of a checkpoint on a folder or a
    `datasets` source; see [`validate`].

    `report` in them is the path of its page, and `calibration` the temperature, what it was, and what it changes.

    With one label per image also `weighted_f1` (percent) and `ece`, the expected calibration error of its probabilities
    (0 to 1), and `never_found`, the names of the classes that have images of which none was found.

    None on all processes but the first. `bad_files` of them is the number of images that could not be read, `classes`
    how many the answer was one of, beside `classes_of_the_data` and `classes_of_the_checkpoint`.

    The data's classes are matched with the checkpoint's as [`effnet_hf.data.match_classes`] says; they may be a part of
    them.

    Args:
        restrict_classes: the answer is one of the classes that the data has, instead of all that the checkpoint knows.
        report: folder to write a report into: a page, its figures as JSON and CSV, its pictures.
        calibrate: put the temperature that makes the probabilities truest on these images into the checkpoint's folder.
        overwrite: `report` may be another folder than an earlier report, if all of it was written here.
        test_time_flip: measure the mean of the probabilities of each image and its mirror image; see
            [`effnet_hf.flips.use_test_time_flip`].
        runtime: what computes, as [`effnet_hf.load_for_inference`] has it; `"auto"` is the fastest that is installed.
        tell: gets the sentences about the data that a user should read; on the console by default.
        data: any other data option of a recipe, e.g. `labels` or `classes_by_position`.

    Raises:
        UserError: no such checkpoint or folder, or the classes cannot be matched, or more than a share of
            `max_bad_files` of the images, or with `strict` one of them, cannot be read; or there is no place for a
            report or a temperature.
    """
    checkpoint = open_checkpoint(model)
    if runtime != "torch" and (report is not None or calibrate or restrict_classes):
        raise UserError(
            f"--runtime {runtime} gives logits only: leave it out with --report, --calibrate and --restrict_classes."
        )
    if calibrate:
        if test_time_flip:
            raise UserError("--calibrate is for the answers to single images: leave out --test_time_flip.")
        if restrict_classes:
            raise UserError(
                "--calibrate is for all classes that the checkpoint answers with: leave out --restrict_classes."
            )
        require_storable(checkpoint)
    recipe = Recipe(
        model=model,
        data_dir=data_dir,
        dataset_name=dataset_name,
        dataset_config=dataset_config,
        val_fraction=val_fraction,
        precision=precision,
        per_device_batch_size=per_device_batch_size,
        num_workers=num_workers,
        loader=loader,
        top_k=top_k,
        max_bad_files=max_bad_files,
        strict=strict,
        **data,
    )
    engine = None
    if runtime != "torch":
        engine = {"runtime": runtime, "precision": precision, "batch_size": per_device_batch_size}
        recipe = recipe.replace(precision="fp32")  # of what is around the engine
    with with_others(), leaving_as_found():
        recipe, accelerator, _ = start_accelerator(recipe, default="fp32")
        if report is not None:
            sources = {"--model": model, "--data_dir": data_dir, "--labels": recipe.labels}
            on_main(accelerator, lambda: require_report_folder(report, overwrite, sources))
        measured = _validate(checkpoint, recipe, accelerator, restrict_classes, test_time_flip, tell, engine)
        if measured is None:
            return None
        network, loaders, figures, answers = measured
        if report is not None or calibrate:
            known = measure(answers, top_k)
            asked = []
            if restrict_classes:
                asked.append(f"of the {figures['classes']:,} classes of the data only (--restrict_classes)")
            if test_time_flip:
                asked.append("means over each image and its mirror image (--test_time_flip)")
            if asked and known.calibration is not None:  # a temperature is for what the network itself answers
                known = replace(known, calibration=known.calibration.without_fitted(f"answers are {', '.join(asked)}"))
            if report is not None:
                facts = _facts(checkpoint, recipe, accelerator, figures) | {"answers": ", ".join(asked)}
                page = _report(report, overwrite, answers, known, loaders, network, checkpoint, recipe, facts)
                figures["report"] = str(page)
            if calibrate:
                figures["calibration"] = _calibrate(checkpoint, known)
        return figures


def _validate(
    checkpoint: Checkpoint,
    recipe: Recipe,
    accelerator: Accelerator,
    restrict_classes: bool,
    test_time_flip: bool,
    tell: Callable[[str], None],
    engine: dict[str, Any] | None,
) -> tuple[EfficientNetNVForImageClassification, Loaders, dict[str, Any], Answers] | None:
    """The network, its loaders (closed), its figures, and the answers to all images; None but on the first process."""
    assert recipe.per_device_batch_size is not None
    loaders = build_loaders(
        recipe,
        checkpoint.processor,
        BatchPlan(recipe.per_device_batch_size, accelerator.num_processes, rank=accelerator.process_index),
        accelerator.device,
        train=False,
        class_names=checkpoint.class_names,
        channels_last=wants_channels_last(recipe, accelerator),
    )
    try:
        require_same_task(checkpoint.config, loaders.label_sets is not None, f"--model {checkpoint.name}")
        if accelerator.is_main_process:
            for note in filter(None, [*loaders.notes, _note_on_training(checkpoint, recipe)]):
                tell(note)
        known = len(checkpoint.class_names)
        network = checkpoint.load() if engine is None else _with_engine(checkpoint, engine, accelerator, tell)
        present = np.arange(known) if loaders.present is None else loaders.present
        if restrict_classes:
            rule_out_classes(network, present)
        network.to(accelerator.device)
        recorder = Recorder()
        # A copy that shares all but `forward`: a report looks at what the network itself sees.
        asked = use_test_time_flip(copy.copy(network)) if test_time_flip else network
        figures: dict[str, Any] = validate(asked, loaders.val, accelerator, recipe.top_k, recorder=recorder)
        figures |= {"classes": len(present) if restrict_classes else known}
        figures |= {"classes_of_the_data": len(present), "classes_of_the_checkpoint": known}
        bad = torch.tensor(loaders.val.bad_files.count, device=accelerator.device)
        figures["bad_files"] = int(accelerator.reduce(bad, reduction="sum"))
        config = checkpoint.config
        thresholds = thresholds_of(config) if is_multi_label(config) else None
        answers = recorder.answers(accelerator, checkpoint.class_names, thresholds, config.softmax_temperature)
    finally:
        loaders.close()
    return None if answers is None else (network, loaders, figures | summary(answers), answers)


def _with_engine(
    checkpoint: Checkpoint, engine: dict[str, Any], accelerator: Accelerator, tell: Callable[[str], None]
) -> EfficientNetNVForImageClassification:
    from ..export import load_for_inference

    network = load_for_inference(checkpoint, device=accelerator.device, **engine)
    if accelerator.is_main_process:
        tell(f"runtime: {network.choice}")
    return network


def _calibrate(checkpoint: Checkpoint, known: Figures) -> dict[str, Any]:
    """Stores the best temperature; what it was and what it changes."""
    found = known.calibration
    assert found is not None
    if found.fitted is None or found.after is None:
        raise UserError(f"--calibrate found no temperature: {found.none_as}.")
    return {
        "temperature": found.fitted,
        "temperature_before": found.temperature,
        "ece": found.after.ece,
        "ece_before": found.now.ece,
        "ece_held_out": found.ece_held_out,
        "nll": found.after.nll,
        "nll_before": found.now.nll,
        "written": store_temperature(checkpoint, found.fitted),
    }


def _report(
    folder: str,
    overwrite: bool,
    answers: Answers,
    known: Figures,
    loaders: Loaders,
    network: EfficientNetNVForImageClassification,
    checkpoint: Checkpoint,
    recipe: Recipe,
    facts: dict[str, Any],
) -> Path:
    found = write_report(
        answers,
        loaders.images,
        folder,
        network=network,
        processor=checkpoint.processor,
        reading=Reading.of(recipe, checkpoint.processor),
        facts=facts,
        figures=known,
        title=f"{os.path.basename(os.path.abspath(checkpoint.name))}: what the model knows",
        overwrite=overwrite,
    )
    return found["page"]


def _facts(
    checkpoint: Checkpoint, recipe: Recipe, accelerator: Accelerator, figures: dict[str, Any]
) -> dict[str, str | None]:
    bad = figures["bad_files"]
    return {
        "model": f"{checkpoint.name}: EfficientNet {checkpoint.config.variant or ''}",
        "data": validation_images(recipe) + (f"; {bad:,} more cannot be read" if bad else ""),
        "speed": f"{figures['total_ips']:,.1f} images/s" if "total_ips" in figures else None,
        **how_measured(recipe, accelerator),
    }


def _note_on_training(checkpoint: Checkpoint, recipe: Recipe) -> str:
    """A sentence where the checkpoint was trained on most of what is measured; "" where it was not, or nobody knows."""
    written = RunFolder(checkpoint.name).recipe
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # old spellings in it are no concern of this command
            trained = load_recipe(str(written)) if written.is_file() else None
    except UserError:  # of another version
        return ""
    then = "" if trained is None else _held_out(trained)
    if trained is None or not then or recipe.val_fraction or recipe.val_split or _held_out(recipe) == then:
        return ""
    sources = [
        {os.path.realpath(place) for place in (each.data_dir, each.dataset_name, each.labels) if place}
        for each in (trained, recipe)
    ]
    if not sources[0] & sources[1]:
        return ""
    return (
        f"{checkpoint.name} was trained on a part of these images: {then}, as then, measures on those that were held"
        " out."
    )


def _held_out(recipe: Recipe) -> str:
    """The flags that hold out a part of the training images; "" where none does."""
    if recipe.folds:
        return f"--folds {recipe.folds} --fold {recipe.fold}"
    return f"--val_fraction {recipe.val_fraction:g}" if recipe.val_fraction else ""


@torch.no_grad()
def rule_out_classes(network: EfficientNetNVForImageClassification, present: np.ndarray) -> None:
    """Takes from a network, in place, every answer but the classes of these numbers.

    Raises:
        UserError: it has a sigmoid per class, so that no class keeps another from being the answer.
    """
    if is_multi_label(network.config):
        raise UserError("--restrict_classes is for one label per image; of several each is decided by itself.")
    others = torch.ones(network.config.num_labels, dtype=torch.bool)
    others[torch.as_tensor(present)] = False
    network.classifier.bias[others] = -torch.inf  # no logit is less, and softmax makes it 0
