"""Everything a run needs before its first step: built, restored, introduced."""

import platform

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..cli import command_line
from ..data import build_loaders
from ..files import atomic_write
from ..hub import software_versions
from ..multi_label import is_multi_label
from ..recipes import Recipe
from ..run_folder import RunFolder
from .batches import plan_for
from .compilation import compile_model
from .ema import ModelEMA
from .freezing import Freezing, check_fine_tuning
from .metrics import deciding_figure
from .model import Head, build_networks, open_start, preparation
from .optim import build_optimizer, layer_rates, peak_learning_rate
from .original_run import OriginalRun
from .precision import wants_channels_last
from .profiling import Profiler
from .progress import Progress
from .report import Report
from .resume import Checkpoints
from .run import Quantizing, Run
from .saved_run import SavedRun
from .signals import Interruption
from .state import TrainingState


# Options that make a run another one than plain training; those with a line of their own are not among them.
_WAYS = (
    "augmentation", "randaugment_operations", "randaugment_magnitude", "random_erasing", "mixup", "cutmix", "sampler",
    "class_weights", "label_smoothing", "gradient_clip", "distillation_weight", "ema_decay", "folds", "fold",
    "select_best", "early_stopping_patience",
)  # fmt: skip


def build_run(recipe: Recipe, accelerator: Accelerator, quantization: Quantizing | None = None) -> Run:
    """Loaders, model, optimizer and moving average of a run that has not begun; [`restore_run`] comes next.

    An earlier run in `output_dir` that is not gone on with is removed, once it is known that this one can be built.

    Raises:
        UserError: the recipe, its data, its checkpoints or this machine do not allow it.
    """
    if recipe.precision is None:
        recipe = recipe.replace(precision=accelerator.mixed_precision.replace("no", "fp32"))
    check_fine_tuning(recipe)
    checkpoints = Checkpoints(accelerator, recipe)
    resumed = checkpoints.find()
    resuming = isinstance(resumed, SavedRun)
    start = open_start(recipe, resumed.folder if isinstance(resumed, SavedRun) else None)
    checkpoints.processor = start.processor
    plan = plan_for(recipe, start, accelerator)

    channels_last = wants_channels_last(recipe, accelerator)
    loaders = build_loaders(recipe, start.processor, plan, accelerator.device, channels_last=channels_last)
    assert loaders.train is not None
    set_seed(recipe.seed)  # the same fresh weights on every process …
    several = loaders.label_sets is not None
    deciding_figure(recipe.select_best, several)  # refused before anything is written
    model, teacher = build_networks(recipe, start, loaders.class_names, accelerator.device, channels_last, several)
    if not resuming:
        if quantization is not None:
            quantization.check(model)
        checkpoints.begin()
    report = Report(accelerator, recipe.quiet)
    if quantization is not None:
        model = quantization.prepare(model, loaders, accelerator, report, resuming)
    ema = ModelEMA(model, recipe.ema_decay) if recipe.ema_decay else None
    optimizer = build_optimizer(model, recipe)
    freezing = Freezing(model, recipe)
    for network in (model, *([ema.model] if ema is not None else [])):
        compile_model(network, recipe.compile, recipe.deterministic)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    checkpoints.state = TrainingState(accelerator, model, optimizer, ema)
    return Run(
        recipe, accelerator, plan, loaders, start.processor, wrapped, model, optimizer, ema, teacher, start,
        quantization, checkpoints, resumed, report, Progress(num_samples=loaders.train.num_samples),
        Interruption(accelerator), Profiler(recipe, accelerator), freezing,
    )  # fmt: skip


def restore_run(run: Run) -> None:
    """Puts the state of the run that is gone on with, if any, into a built one, and opens its log.

    Raises:
        UserError: that state cannot be read, or is another run's; until then nothing of it has changed on the disk.
    """
    recipe = run.recipe
    set_seed(recipe.seed, device_specific=True)  # … and other dropout draws on each
    if run.accelerator.is_main_process:
        run.checkpoints.listing = run.loaders.listing()
        run.loaders.notes += run.loaders.notes_on_copies(run.checkpoints.listing)
    if run.resumed is not None:
        run.progress = run.resumed.restore(run)
    if run.accelerator.is_main_process:
        run.checkpoints.note_data()
        with atomic_write(RunFolder(recipe.output_dir).recipe) as file:
            file.write(recipe.to_yaml())
    run.report.open(recipe, run.progress)
    if run.keeps_gradients:
        for parameter in filter(lambda parameter: parameter.requires_grad, run.bare_model.parameters()):
            parameter.grad = torch.zeros_like(parameter)


def introduce(run: Run, chosen: str = "") -> None:
    """Says in a few lines what is about to run, `chosen` being the sentence on precision, and writes it to the log."""
    recipe, accelerator, report, progress = run.recipe, run.accelerator, run.report, run.progress
    train, config = run.train_loader, run.bare_model.config
    peak = peak_learning_rate(recipe)
    scaled = (
        f" ({recipe.learning_rate:g} at {recipe.lr_batch_size}, {recipe.lr_scaling})"
        if peak != recipe.learning_rate
        else ""
    )
    parameters = sum(p.numel() for p in run.bare_model.parameters())
    height, width = run.processor.crop_size["height"], run.processor.crop_size["width"]
    side = f"{height} px" if height == width else f"{height} x {width} px"
    report.line(f"model    {config.variant or 'custom'}, {parameters:,} parameters, {side}, {_start(run)}")
    report.line(
        f"data     {train.num_samples:,} training and {run.loaders.val.num_samples:,} validation images,"
        f" {len(run.loaders.class_names)} classes{', several per image' * is_multi_label(config)}, {recipe.loader}"
    )
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs != 1)}"
    report.line(f"batch    {run.plan}; {train.updates_per_epoch} steps per epoch, {epochs}")
    notes = [*run.start.notes, *run.loaders.notes]
    if train.updates_per_epoch < 10:
        steps = f"{train.updates_per_epoch} step{'s' * (train.updates_per_epoch != 1)}"
        flags = "--global_batch_size" + " and --per_device_batch_size" * (recipe.per_device_batch_size is not None)
        notes.append(f"only {steps} per epoch; lower {flags} for more")
    by_position, names = recipe.classes_by_position, run.loaders.class_names
    if run.start.checkpoint is not None and not isinstance(run.resumed, SavedRun):
        notes.append(preparation(run.processor, run.start.checkpoint))
        head = Head.of(run.start.checkpoint, names, by_position)
        notes.append(head.note if head.rows is not None else f"the classifier is new: {head.note}")
    if run.start.teacher is not None:
        if run.start.teacher is not run.start.checkpoint:
            notes.append(preparation(run.processor, run.start.teacher))
        if taught := Head.of(run.start.teacher, names, by_position, some=True).note:
            notes.append(f"teacher: {taught}")
    for note in filter(None, notes):
        report.line(f"         {note}")
    report.line(f"optimize {recipe.optimizer}, learning rate {peak:.4g}{scaled}, {recipe.lr_schedule}")
    if ways := [f"{name} {value}" for name in _WAYS if (value := getattr(recipe, name)) != getattr(Recipe, name)]:
        report.line(f"         {', '.join(ways)}")
    if recipe.layer_decay != 1:
        report.line(f"         {layer_rates(run.optimizer, peak)}")
    if frozen := run.freezing.describe(recipe.epochs):
        report.line(f"freeze   {frozen}")
    report.line(f"device   {accelerator.num_processes} x {describe_device(accelerator.device)}, {recipe.precision}")
    if isinstance(run.resumed, SavedRun):
        where = f"epoch {progress.epoch + 1}, step {progress.update}"
        if progress.is_trained:
            where = f"epoch {progress.epoch + 1} of {recipe.epochs} is trained, its validation comes next"
        elif progress.epoch >= recipe.epochs:
            where = f"all {recipe.epochs} epochs are done, nothing is left to train"
        report.line(f"resume   {run.resumed.folder}: {where}")
        for what, then, now in (
            ("precision", progress.precision, recipe.precision),
            ("images at once on a device", progress.per_device, run.plan.per_device),
        ):
            if then and then != now:
                report.line(f"         {what}: {then} until here, {now} from here on")
        if progress.num_processes != accelerator.num_processes:
            report.line(
                f"         written by {progress.num_processes} processes: the sample order goes on exactly,"
                " draws of dropout and stochastic depth differ"
            )
    elif run.resumed is not None:
        report.line(f"resume   {run.resumed.folder}: epoch {progress.epoch + 1}, {run.resumed}")
    for note in run.checkpoints.notes:
        report.line(f"         {note}")
    values = {
        "recipe": recipe.name,
        "variant": config.variant,
        "parameters": parameters,
        "device": describe_device(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": recipe.precision,
        "resumed_from": str(run.resumed.folder) if run.resumed else None,
        "versions": software_versions(),
        "command": command_line(),
    }
    report.log("run", progress.total_updates, values)
    if chosen:
        report.line(f"         {chosen}")


def _start(run: Run) -> str:
    """Where the weights come from, in words."""
    if isinstance(run.resumed, OriginalRun):
        return f"weights of {run.resumed.folder}"
    checkpoint = run.start.checkpoint
    if checkpoint is None:
        return "fresh weights" if run.resumed is None else "weights of the checkpoint"
    config, names = run.bare_model.config, run.loaders.class_names
    start = f"weights of {checkpoint.name}"
    if Head.of(checkpoint, names, run.recipe.classes_by_position).rows is None:
        return f"{start}, a new classifier for {config.num_labels} classes"
    if is_multi_label(config) != is_multi_label(checkpoint.config):
        start += f", its classifier to learn {'several labels' if is_multi_label(config) else 'one label'} per image"
    return start


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
