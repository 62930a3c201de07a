"""The end of a run: the best model where `from_pretrained` finds it, plots, a summary, a model card, an upload."""

import contextlib
import json
import os
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from ..analysis import put_temperature
from ..cli import command_line, invocation
from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..files import atomic_folder, atomic_write
from ..hub import CardFacts, describe_preprocessing, push_folder, render_card, software_versions
from ..manifest import problem, read_manifest
from ..multi_label import is_multi_label, shown
from ..quiet import no_progress_bars
from ..reading import read_json
from ..recipes import data_words
from ..recipes.options import QuantizationOptions
from ..run_folder import RunFolder
from .examine import examine
from .owner import set_aside
from .plots import draw
from .run import Run
from .setup import describe_device


def finish(run: Run) -> None:
    """Publishes the run and prints where things are."""
    recipe, progress, report = run.recipe, run.progress, run.report
    folder = RunFolder(recipe.output_dir)
    with _keeping_temperature(run, folder.path):
        run.checkpoints.publish(run.bare_model)
    if not run.accelerator.is_main_process:
        examine(run)
        return
    if run.ema is not None:
        config = run.ema.model.config
        if config.thresholds == run.bare_model.config.thresholds:  # no validation of this launch has chosen its own
            config.thresholds = EfficientNetNVConfig.from_pretrained(folder.path).thresholds
        set_aside(folder.ema)
        with (
            _keeping_temperature(run, folder.ema),
            atomic_folder(folder.ema, overwrite=True, ours=True) as average,
            no_progress_bars(),
        ):
            run.ema.model.save_pretrained(average)
            run.processor.save_pretrained(average)
    seconds = progress.seconds + time.monotonic() - run.started
    summary = {
        "recipe": recipe.name,
        "epochs": progress.epoch,
        "updates": progress.total_updates,
        "seconds": round(seconds, 1),
        "best_epoch": progress.best_epoch + 1,
        "best_is_ema": progress.best_is_ema,
        "best_by": run.best_by,
        **run.best_figures(),
        "n": progress.num_validated,
        "bad_files": run.train_loader.bad_files.count + run.loaders.val.bad_files.count,
        "device": describe_device(run.accelerator.device),
        "versions": software_versions(),
        "command": command_line(),
    }
    run.checkpoints.check_place()
    report.log("summary", progress.total_updates, summary)
    with atomic_write(folder.summary) as file:
        file.write(json.dumps(summary, indent=1, allow_nan=False) + "\n")
    plots = draw({folder.path.name: folder.path}, folder.plots)
    learned = examine(run)
    _say(run, summary, plots, learned)
    tables = run.quantization.describe(summary, report) if run.quantization is not None else ()
    run.checkpoints.check_place()
    with atomic_write(folder.card) as file:
        file.write(render_card(_facts(run, summary, tables, learned)))


@contextlib.contextmanager
def _keeping_temperature(run: Run, folder: Path) -> Iterator[None]:
    """Gives a model that the body writes anew the temperature that `validate --calibrate` had put there, if its weights
    are the same; says that it is gone, if not."""
    temperature, before = None, _weights(folder)
    with contextlib.suppress(UserError, AttributeError):  # the file is damaged, and about to be replaced
        if run.accelerator.is_main_process and RunFolder(folder).config.is_file():
            temperature = read_json(RunFolder(folder).config).get("softmax_temperature")
    yield
    if temperature is None:
        return
    if before is not None and before == _weights(folder):
        put_temperature(folder, temperature)
        run.report.line(f"         the temperature {temperature:g} of {folder} is kept: its weights are the same")
    else:
        run.report.line(
            f"         the temperature that `validate --calibrate` had put into {folder} is gone:"
            " it belonged to what stood there before"
        )


def _weights(folder: Path) -> str | None:
    """The SHA-256 of a model's weights; None where they, or its configuration, are not what was written."""
    names = RunFolder(folder).config.name, RunFolder(folder).weights.name
    return None if problem(folder, only=names) else read_manifest(folder).get(names[1], {}).get("sha256")


def push(run: Run) -> None:
    """Uploads what was published."""
    recipe, folder = run.recipe, RunFolder(run.recipe.output_dir).path
    if run.accelerator.is_main_process and recipe.hub_model_id:
        url = push_folder(folder, recipe.hub_model_id, private=recipe.hub_private, revision=recipe.hub_revision)
        run.report.line(f"pushed   {url}")


def _facts(run: Run, summary: dict, tables, learned: dict | None) -> CardFacts:
    recipe, config = run.recipe, run.bare_model.config
    folder = recipe.dataset_name if os.path.isdir(recipe.dataset_name or "") else None
    local = folder or recipe.labels or recipe.data_dir
    source = Path(local).resolve().name if local else recipe.dataset_name or "synthetic images"
    measured = {name: summary[name] for name in (*run.telling_names, "loss")} if summary["n"] else {}
    notes = []
    if measured:
        which = ", the moving average of the weights" if summary["best_is_ema"] else ""
        first = "top-1" if run.best_by == "top1" else shown(run.best_by)
        best = (
            f"Best of {summary['epochs']} epochs by {first}" if summary["epochs"] > 1 else "After one epoch, measured"
        )
        notes.append(f"{best} on the images reported below{which}.")
    unsaid = {"data_dir", "labels", "output_dir", "resume"} | (
        {"dataset_name"} if folder else set()
    )  # where things were
    if recipe.placement == "none":
        unsaid |= QuantizationOptions.__dataclass_fields__.keys()
    settings = {
        name: value for name, value in vars(recipe).items() if value not in (None, [], False) and name not in unsaid
    }
    return CardFacts(
        name=f"EfficientNet {config.variant or ''} on {source}".replace("  ", " "),
        model_id=recipe.hub_model_id,
        variant=config.variant or "custom",
        num_labels=config.num_labels,
        image_size=(run.processor.crop_size["height"], run.processor.crop_size["width"]),
        preprocessing=describe_preprocessing(run.processor),
        multi_label=is_multi_label(config),
        bit_depth=run.processor.bit_depth,
        dataset=source,
        dataset_id=recipe.dataset_name,
        n_eval=summary["n"] or None,
        metrics=measured,
        recipe=settings,
        command=summary["command"],
        hardware=f"{run.accelerator.num_processes} x {summary['device']}",
        versions=software_versions(),
        base_model=recipe.model,
        notes=notes,
        tables=[*tables, *(_per_class(learned) if learned else [])],
        tags=["int8"] if config.quantization else [],
        plots=[f"plots/{name}" for name in ("curves.png", *(learned["plots"] if learned else ()))],
    )


def _per_class(learned: dict) -> list:
    """Tables for the card: the classes with the lowest recall, and the means of all."""
    worst, classes = learned["worst"], learned["classes"]
    title = "Classes" if classes == len(worst) else f"The {len(worst)} of {classes:,} classes with the lowest recall"
    header = ["class", "images", "precision, %", "recall, %", "F1, %"]
    return [(title, header, [*worst, *learned["averages"]])]


def _say(run: Run, summary: dict, plots: list[Path], learned: dict | None) -> None:
    report, folder = run.report, RunFolder(run.recipe.output_dir)
    minutes = summary["seconds"] / 60
    report.line()
    if summary["n"]:
        which = " (moving average)" if summary["best_is_ema"] else ""
        figures = ", ".join(f"{shown(name)} {summary[name]:.2f} %" for name in run.telling_names)
        report.line(
            f"best     epoch {summary['best_epoch']} by {run.best_by}{which}: {figures}, loss {summary['loss']:.4f} on"
            f" {summary['n']:,} images"
        )
        if is_multi_label(run.bare_model.config):
            report.line("         F1 at one threshold per class, the best on these images: `thresholds` in config.json")
    report.line(f"time     {minutes:.1f} minutes, {summary['updates']:,} optimizer steps")
    if summary["bad_files"]:
        were = "image was" if summary["bad_files"] == 1 else "images were"
        report.line(f"bad      {summary['bad_files']} unreadable {were} replaced or left out: {folder.bad_files}")
    report.line(f"model    {folder.path}")
    report.line(f"metrics  {folder.metrics}")
    for path in plots:
        report.line(f"plot     {path}")
    if learned is not None:
        report.line(f"report   {learned['page']}: figures of every class, mistakes, likely label errors")
    if run.recipe.profile:
        report.line(f"profile  {folder.profile}/trace.json, top_operators.txt")
    model = shlex.quote(str(folder.path))
    report.line(f"next     {invocation('classify')} --model {model} IMAGE")
    images = shlex.join(data_words(run.recipe)) or "--data_dir DIR"  # of synthetic ones there are none to measure
    report.line(f"         {invocation('validate')} --model {model} {images}")
    if run.bare_model.config.quantization:
        target = shlex.quote(f"{folder.path}-openvino")
        report.line(f"         {invocation('export')} --model {model} --int8 openvino {images} --output_dir {target}")
