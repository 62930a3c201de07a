"""The report on the best model, at the end of a training: `report/` in its folder, and what the card says of it."""

from dataclasses import replace
from typing import Any

import accelerate
import numpy as np
import torch
from accelerate import Accelerator

from ..analysis import Answers, Recorder, write_report
from ..checkpoint import open_checkpoint
from ..cli import command_line
from ..data import Reading
from ..errors import first_line, sentence_of
from ..files import atomic_write, refuse_foreign
from ..hub import software_versions
from ..multi_label import is_multi_label, thresholds_of
from ..recipes import Recipe
from ..run_folder import RunFolder
from .owner import on_main
from .run import Run
from .setup import describe_device


def examine(run: Run) -> dict[str, Any] | None:
    """Writes the report, and copies of its pictures without images of the data beside the run's curves.

    The answers to the images were kept when the best epoch was validated; where that was before a resume, the published
    model is validated once more. A collective call, after the model is published; whatever goes wrong with a report is
    said, and costs the run nothing else.

    Returns:
        What [`write_report`] does; None where there is no report, and on all processes but the first.
    """
    if not run.recipe.report or not run.progress.num_validated:
        return None
    folder = RunFolder(run.recipe.output_dir)
    try:
        on_main(run.accelerator, lambda: refuse_foreign(folder.report, edited=True))
        answers = _answers(run)
        return None if answers is None else _write(run, answers)
    except Exception as error:
        reason = sentence_of(error) or f"{type(error).__name__}: {first_line(error)}"
        run.report.line(f"report   none was written: {reason}")
        return None
    finally:
        run.best_answers = None


def _answers(run: Run) -> Answers | None:
    """Of the published model, which is in the run's network afterwards."""
    model, folder = run.bare_model, RunFolder(run.recipe.output_dir)

    def load() -> tuple[list[float] | None, float | None]:
        best = open_checkpoint(str(folder.path)).load()
        model.load_state_dict(best.state_dict())
        return best.config.thresholds, best.config.softmax_temperature

    model.config.thresholds, temperature = on_main(run.accelerator, load)
    recorder = run.best_answers
    if recorder is None:
        from .loop import validate  # which imports this module

        if run.accelerator.num_processes > 1:
            accelerate.utils.broadcast([*model.parameters(), *model.buffers()])
        recorder = Recorder()
        validate(model, run.loaders.val, run.accelerator, run.recipe.top_k, recorder=recorder)
    several = is_multi_label(model.config)
    thresholds = thresholds_of(model.config) if several else None
    answers = recorder.answers(run.accelerator, run.loaders.class_names, thresholds)
    if answers is None or temperature is None:
        return answers
    return replace(answers, logits=answers.logits / np.float32(temperature), temperature=temperature)


def how_measured(recipe: Recipe, accelerator: Accelerator) -> dict[str, str]:
    """The last facts of a report."""
    versions = software_versions("scikit-learn", "torchmetrics")
    return {
        "device": f"{accelerator.num_processes} x {describe_device(accelerator.device)}, {recipe.precision}",
        "software": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "command": command_line(),
    }


def validation_images(recipe: Recipe) -> str:
    """What was measured on, for a report."""
    data = recipe.dataset_name or recipe.labels or recipe.data_dir or "synthetic images"
    return f"the validation images of {data}"


def _write(run: Run, answers: Answers) -> dict[str, Any]:
    recipe, folder, progress = run.recipe, RunFolder(run.recipe.output_dir), run.progress
    name = folder.path.resolve().name
    facts = {
        "model": f"{name}: EfficientNet {run.bare_model.config.variant or ''}, best of {progress.epoch} epochs"
        f" (epoch {progress.best_epoch + 1}{', moving average' if progress.best_is_ema else ''})",
        "data": validation_images(recipe),
        "speed": f"{run.best_speed:,.0f} images/s when they were validated" if run.best_speed else None,
        **how_measured(recipe, run.accelerator),
    }
    run.checkpoints.check_place()
    with torch.compiler.set_stance("force_eager"):  # compiled for batches of training, which the heat maps are not
        found = write_report(
            answers,
            run.loaders.images,
            folder.report,
            network=run.bare_model,
            processor=run.processor,
            reading=Reading.of(recipe, run.processor),
            facts=facts,
            top_k=recipe.top_k,
            title=f"{name}: what the model knows",
            ours=True,
        )
    for plot in found["plots"]:
        with atomic_write(folder.plots / plot, "wb") as file:
            file.write((folder.report / plot).read_bytes())
        run.report.picture(folder.plots / plot, progress.total_updates)
    return found
