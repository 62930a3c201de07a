"""The end of a run: the best model where `from_pretrained` finds it, plots, a summary, a model card, an upload."""

import json
import shlex
import time
from pathlib import Path

from ..cli import command_line, invocation
from ..configuration import EfficientNetNVConfig
from ..files import atomic_folder, atomic_write
from ..hub import CardFacts, describe_preprocessing, push_folder, render_card, software_versions
from ..multi_label import is_multi_label, shown
from ..quiet import no_progress_bars
from ..recipes import data_words
from ..recipes.options import QuantizationOptions
from ..run_folder import RunFolder
from .plots import draw
from .run import Run
from .setup import describe_device


def finish(run: Run) -> None:
    """Publishes the run and prints where things are."""
    recipe, progress, report = run.recipe, run.progress, run.report
    run.checkpoints.publish(run.bare_model)
    if not run.accelerator.is_main_process:
        return
    folder = RunFolder(recipe.output_dir)
    if run.ema is not None:
        config = run.ema.model.config
        if config.thresholds == run.bare_model.config.thresholds:  # no validation of this launch has chosen its own
            config.thresholds = EfficientNetNVConfig.from_pretrained(folder.path).thresholds
        with atomic_folder(folder.ema, overwrite=True, ours=True) as average, no_progress_bars():
            run.ema.model.save_pretrained(average)
            run.processor.save_pretrained(average)
    first, second = run.figure_names
    seconds = progress.seconds + time.monotonic() - run.started
    summary = {
        "recipe": recipe.name,
        "epochs": progress.epoch,
        "updates": progress.total_updates,
        "seconds": round(seconds, 1),
        "best_epoch": progress.best_epoch + 1,
        "best_is_ema": progress.best_is_ema,
        first: progress.best_top1,
        second: progress.best_topk,
        "loss": progress.best_loss,
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
    _say(run, summary, plots)
    tables = run.quantization.describe(summary, report) if run.quantization is not None else ()
    run.checkpoints.check_place()
    with atomic_write(folder.card) as file:
        file.write(render_card(_facts(run, summary, tables)))


def push(run: Run) -> None:
    """Uploads what was published."""
    recipe, folder = run.recipe, RunFolder(run.recipe.output_dir).path
    if run.accelerator.is_main_process and recipe.hub_model_id:
        url = push_folder(folder, recipe.hub_model_id, private=recipe.hub_private, revision=recipe.hub_revision)
        run.report.line(f"pushed   {url}")


def _telling(run: Run) -> tuple[str, ...]:
    """The names of the figures but for one that is always 100 %: top-5 where there are five classes or fewer."""
    config, names = run.bare_model.config, run.figure_names
    return names if is_multi_label(config) or config.num_labels > run.recipe.top_k else names[:1]


def _facts(run: Run, summary: dict, tables) -> CardFacts:
    recipe, config = run.recipe, run.bare_model.config
    local = recipe.labels or recipe.data_dir
    source = recipe.dataset_name or (Path(local).resolve().name if local else "synthetic images")
    names = _telling(run)
    measured = {name: summary[name] for name in (*names, "loss")} if summary["n"] else {}
    notes = []
    if measured:
        which = ", the moving average of the weights" if summary["best_is_ema"] else ""
        first = "top-1" if names[0] == "top1" else shown(names[0])
        best = (
            f"Best of {summary['epochs']} epochs by {first}" if summary["epochs"] > 1 else "After one epoch, measured"
        )
        notes.append(f"{best} on the images reported below{which}.")
    unsaid = {"data_dir", "labels", "output_dir", "resume"}  # where things were
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
        tables=tables,
        tags=["int8"] if config.quantization else [],
        plots=["plots/curves.png"],
    )


def _say(run: Run, summary: dict, plots: list[Path]) -> None:
    report, folder = run.report, RunFolder(run.recipe.output_dir)
    minutes = summary["seconds"] / 60
    report.line()
    if summary["n"]:
        which = " (moving average)" if summary["best_is_ema"] else ""
        figures = ", ".join(f"{shown(name)} {summary[name]:.2f} %" for name in _telling(run))
        report.line(
            f"best     epoch {summary['best_epoch']}{which}: {figures}, loss {summary['loss']:.4f} on"
            f" {summary['n']:,} images"
        )
        if is_multi_label(run.bare_model.config):
            report.line("         F1 at one threshold per class, the best on these images: `thresholds` in config.json")
    report.line(f"time     {minutes:.1f} minutes, {summary['updates']:,} optimizer steps")
    if summary["bad_files"]:
        report.line(f"bad      {summary['bad_files']} unreadable images were replaced or left out: {folder.bad_files}")
    report.line(f"model    {folder.path}")
    report.line(f"metrics  {folder.metrics}")
    for path in plots:
        report.line(f"plot     {path}")
    if run.recipe.profile:
        report.line(f"profile  {folder.profile}/trace.json, top_operators.txt")
    model = shlex.quote(str(folder.path))
    report.line(f"next     {invocation('classify')} --model {model} IMAGE")
    images = shlex.join(data_words(run.recipe)) or "--data_dir DIR"  # of synthetic ones there are none to measure
    report.line(f"         {invocation('validate')} --model {model} {images}")
