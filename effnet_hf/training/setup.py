"""Everything a run needs before its first step, and the few things its steps say and save."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import accelerate
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from ..cli import command_line
from ..data import Loaders, build_loaders
from ..errors import UserError
from ..files import atomic_write
from ..hub import software_versions
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..recipes import Recipe
from ..tuning import tune_for_cpu_training
from .batches import BatchPlan, plan_batches
from .checkpoint import Checkpoints, Progress
from .compilation import compile_model
from .ema import ModelEMA
from .memory import usable_memory
from .metrics import Speed
from .model import (
    build_model,
    build_processor,
    build_teacher,
    changed_preparation,
    check_checkpoint,
    has_classes,
    image_size_of,
)
from .optim import build_optimizer, peak_learning_rate
from .original_run import OriginalRun
from .precision import precision_name, refuse_unwritten_gradients, wants_channels_last
from .profiling import Profiler
from .report import Report
from .signals import Interruption


@dataclass
class Run:
    """What the parts of the loop share."""

    recipe: Recipe
    accelerator: Accelerator
    plan: BatchPlan
    loaders: Loaders
    processor: EfficientNetNVImageProcessor
    model: torch.nn.Module
    bare_model: EfficientNetNVForImageClassification  # `model` without DDP
    optimizer: torch.optim.Optimizer
    ema: ModelEMA | None
    teacher: torch.nn.Module | None
    checkpoints: Checkpoints
    report: Report
    progress: Progress
    interruption: Interruption
    profiler: Profiler
    started: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    limit_told: str = ""  # the verdict that the console has seen last

    @property
    def patience_is_over(self) -> bool:
        return 0 < self.recipe.early_stopping_patience <= self.progress.epochs_since_best

    def checkpoint_is_due(self, may_ask: bool = True) -> bool:
        """By steps or by minutes; with several processes the first one's clock decides. A collective call.

        Args:
            may_ask: False where asking the first process would make every step wait for it, and for the device.
        """
        every, minutes = self.recipe.checkpoint_every_steps, self.recipe.checkpoint_every_minutes
        if every and self.progress.total_updates % every == 0:
            return True
        if not minutes or not may_ask:
            return False
        due = [time.monotonic() - self.saved_at > 60 * minutes]
        if self.accelerator.num_processes > 1:
            accelerate.utils.broadcast_object_list(due)
        return due[0]

    @property
    def keeps_gradients(self) -> bool:
        """Whether gradients stay allocated between steps: those of a replayed CUDA graph lie in its own memory, where
        the next micro-batch would overwrite the sum."""
        return self.recipe.compile == "graphs" and self.plan.accumulation_steps > 1

    def spoilt(self) -> torch.Tensor:
        """0, or NaN where a weight, a statistic or an average of one is no finite number. Does not wait for the device.

        A forward pass that overflows in fp16 leaves batch norm's statistics infinite for good, while the scaler skips
        the step and losses of later ones, which use the statistics of their own batch, look well.
        """
        largest = torch._foreach_norm([tensor for _, tensor in self._numbers()], ord=float("inf"))
        return (torch.stack(largest).double() * 0).sum()

    def first_spoilt(self) -> str | None:
        """The name of such a number."""
        return next((name for name, tensor in self._numbers() if not tensor.isfinite().all()), None)

    def _numbers(self) -> list[tuple[str, torch.Tensor]]:
        networks = {"": self.bare_model, **({"the average of ": self.ema.model} if self.ema is not None else {})}
        return [
            (prefix + name, tensor)
            for prefix, network in networks.items()
            for name, tensor in network.state_dict().items()  # what is saved
            if tensor.is_floating_point() and tensor.numel()
        ]

    def share_statistics(self) -> None:
        """Gives all processes the first one's batch norm statistics, which are the ones that are saved."""
        if self.accelerator.num_processes > 1:
            for model in (self.bare_model, *([self.ema.model] if self.ema is not None else [])):
                accelerate.utils.broadcast(list(model.buffers()))

    def save(self) -> None:
        now = time.monotonic()
        self.progress.seconds += now - self.started
        self.started = self.saved_at = now
        self.progress.metrics_bytes = self.report.position()
        self.progress.num_processes = self.accelerator.num_processes
        self.progress.per_device = self.plan.per_device
        self.progress.precision = precision_name(self.recipe, self.accelerator)
        self.checkpoints.save(self.progress)

    def log_step(self, loss: float, rate: float, speed: dict) -> None:
        progress, report = self.progress, self.report
        values = {"train.loss": loss, "train.lr": rate, **speed}
        if self.accelerator.scaler is not None:
            values["train.grad_scale"] = self.accelerator.scaler.get_scale()
        report.log("train", progress.total_updates, values, epoch=progress.epoch, update=progress.update)
        if report.bar is not None:
            report.bar.set_postfix(loss=f"{loss:.3f}", lr=f"{rate:.3g}")
        elif not report.quiet:
            speed_text = ""
            if speed:
                share = speed["train.data_time"] / (speed["train.data_time"] + speed["train.compute_time"])
                speed_text = f"  {speed['train.total_ips']:.0f} img/s, {share:.0%} of the time waiting for data"
            report.line(
                f"epoch {progress.epoch + 1:>3}/{self.recipe.epochs}  step {progress.update:>5}/"
                f"{self.loaders.train.updates_per_epoch}  train.loss {loss:.4f}  lr {rate:.4g}{speed_text}"
            )

    def tell_limit(self, speed: Speed) -> None:
        """Says whether the loader or the device limits the run: every epoch in the log, and in the console when that
        is new."""
        if not speed.epoch_elapsed:
            return
        sentence = self.loaders.train.limit(speed.epoch_waited, speed.epoch_elapsed - speed.epoch_waited)
        values = {"limit": sentence, "train.data_share": speed.epoch_waited / speed.epoch_elapsed}
        self.report.log("limit", self.progress.total_updates, values, epoch=self.progress.epoch)
        if self.limit_told != (verdict := sentence.partition(":")[0]):
            self.report.line(sentence)
            self.limit_told = verdict

    def log_epoch(self, train_loss: float, results: dict[str, dict]) -> None:
        progress, topk = self.progress, f"top{self.recipe.topk}"
        text = f"epoch {progress.epoch + 1:>3}/{self.recipe.epochs}  train.loss {train_loss:.4f}"
        for kind, figures in results.items():
            values = {f"{kind}.{name}": value for name, value in figures.items()}
            self.report.log(kind, progress.total_updates, values, epoch=progress.epoch)
            text += f"  {kind}.top1 {figures['top1']:6.2f}  {kind}.{topk} {figures[topk]:6.2f}"
            text += f"  {kind}.loss {figures['loss']:.4f}"
        self.report.log("epoch", progress.total_updates, {"train.loss": train_loss}, epoch=progress.epoch)
        self.report.line(text + ("  best" if progress.epochs_since_best == 0 else ""))


def set_up(
    recipe: Recipe, accelerator: Accelerator, prepare_model: Callable | None, check_model: Callable | None = None
) -> Run:
    """Builds loaders, model, optimizer and moving average, and restores them from a checkpoint if asked to."""
    image_size = image_size_of(recipe)
    precision = precision_name(recipe, accelerator)
    plan = plan_batches(recipe, accelerator.num_processes, image_size, precision, usable_memory(accelerator))
    accelerator.gradient_accumulation_steps = plan.accumulation_steps
    processor = build_processor(recipe, image_size)
    checkpoints = Checkpoints(accelerator, recipe, processor)
    original = OriginalRun.open(recipe)
    if recipe.resume is not None and original is None:
        checkpoints.recover()
    resume_from = None if original else checkpoints.find(recipe.resume)
    _check_output_dir(recipe, resume_from)

    channels_last = wants_channels_last(recipe, accelerator)
    loaders = build_loaders(
        recipe,
        image_size=image_size,
        device=accelerator.device,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        per_device_batch_size=plan.per_device,
        steps_per_update=plan.accumulation_steps,
        mean=processor.image_mean,
        std=processor.image_std,
        resize_margin=recipe.resize_margin,
        channels_last=channels_last,
    )
    set_seed(recipe.seed)  # the same fresh weights on every process …
    model, teacher = build_model(recipe, loaders.class_names), build_teacher(recipe, loaders.class_names)
    if original is not None:
        original.load_weights(model)
    if accelerator.device.type == "cpu" and precision == "bf16":
        refuse_unwritten_gradients(model.config, image_size)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for network in filter(None, (model, teacher)):
        network.to(accelerator.device, memory_format=memory_format)
        if accelerator.device.type == "cpu":
            tune_for_cpu_training(network, image_size)
    if recipe.sync_batch_norm:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if recipe.gradient_checkpointing:
        model._set_gradient_checkpointing(True)
    progress = Progress(num_samples=loaders.train.num_samples)
    if resume_from is not None:
        progress = checkpoints.read_progress(resume_from, loaders.train.num_samples)
    elif original is not None:
        progress = original.progress(loaders.train.num_samples, loaders.train.updates_per_epoch)
    elif check_model is not None:
        check_model(model)
    if resume_from is None:
        checkpoints.clear()
    report = Report(accelerator, recipe.quiet)
    if prepare_model is not None:
        model = prepare_model(model, loaders, accelerator, report, resume_from is not None)
    ema = ModelEMA(model, recipe.ema_decay) if recipe.ema_decay else None
    if ema is not None:
        accelerator.register_for_checkpointing(ema)
    optimizer = build_optimizer(model, recipe)
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    if original is not None:
        original.restore(model, optimizer, ema, progress.total_updates)
    bare_model = model
    for network in (model, *([ema.model] if ema is not None else [])):
        compile_model(network, recipe.compile, recipe.deterministic)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(recipe.seed, device_specific=True)  # … and other dropout draws on each
    if resume_from is not None:
        checkpoints.restore(resume_from, progress)
        for group, own in zip(optimizer.param_groups, settings):  # this launch's momentum and decay, not the last one's
            group.update(own)
        checkpoints.adopt(resume_from)  # until here nothing on the disk has changed
    if accelerator.is_main_process:
        with atomic_write(Path(recipe.output_dir, "recipe.yaml")) as file:
            file.write(recipe.to_yaml())
    report.open(recipe, keep_bytes=progress.metrics_bytes)
    run = Run(
        recipe, accelerator, plan, loaders, processor, model, bare_model, optimizer, ema, teacher, checkpoints, report,
        progress, Interruption(accelerator), Profiler(recipe, accelerator),
    )  # fmt: skip
    if run.keeps_gradients:
        for parameter in filter(lambda parameter: parameter.requires_grad, bare_model.parameters()):
            parameter.grad = torch.zeros_like(parameter)
    _introduce(run, resume_from, original)
    return run


def _check_output_dir(recipe: Recipe, resume_from: Path | None) -> None:
    """Refuses to mix two runs in one folder, and to remove what nobody said may be removed."""
    folder = Path(recipe.output_dir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output_dir {folder} is a file; name a folder.")
    if resume_from is not None:
        return
    if recipe.overwrite:
        for flag, source in (("model", recipe.model), ("resume", recipe.resume)):
            if source and folder.is_dir() and Path(source).is_dir() and folder.samefile(source):
                raise UserError(f"--overwrite true would remove --{flag} {source}; name another --output_dir.")
    elif recipe.resume == "auto":
        if (folder / "summary.json").exists():
            raise UserError(
                f"--resume auto: {folder} holds a finished run without a checkpoint to go on from;"
                " start afresh with --overwrite true, or name another folder."
            )
    elif (folder / "metrics.jsonl").exists():
        raise UserError(
            f"--output_dir {folder} already holds a run; continue it with --resume auto,"
            " start afresh with --overwrite true, or name another folder."
        )


def _introduce(run: Run, resume_from: Path | None, original: OriginalRun | None) -> None:
    """Says in a few lines what is about to run, and writes the same to the log."""
    recipe, accelerator, report, progress = run.recipe, run.accelerator, run.report, run.progress
    train, config = run.loaders.train, run.bare_model.config
    precision = precision_name(recipe, accelerator)
    peak = peak_learning_rate(recipe)
    scaled = (
        f" ({recipe.learning_rate:g} at {recipe.lr_batch_size}, {recipe.lr_scaling})"
        if peak != recipe.learning_rate
        else ""
    )
    parameters = sum(p.numel() for p in run.bare_model.parameters())
    origin = original.folder if original is not None else recipe.model
    start = (
        f"weights of {origin}" if origin else "fresh weights" if resume_from is None else "weights of the checkpoint"
    )
    if recipe.model and original is None:
        known = check_checkpoint(recipe.model)
        if not has_classes(known, run.loaders.class_names, by_position=recipe.placement != "none"):
            start += f", a new classifier for {config.num_labels} classes"
        elif [config.id2label[i] for i in sorted(config.id2label)] != run.loaders.class_names:
            start += f", whose {config.num_labels} classes are the folders in this order"
    report.line(f"model    {config.variant or 'custom'}, {parameters:,} parameters, {config.image_size} px, {start}")
    report.line(
        f"data     {train.num_samples:,} training and {run.loaders.val.num_samples:,} validation pictures,"
        f" {len(run.loaders.class_names)} classes, {recipe.loader}"
    )
    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs != 1)}"
    report.line(f"batch    {run.plan}; {train.updates_per_epoch} steps per epoch, {epochs}")
    notes = list(run.loaders.notes)
    if train.updates_per_epoch < 10:
        notes.append(f"only {train.updates_per_epoch} steps per epoch; a smaller --global_batch_size makes more")
    if recipe.model and (changed := changed_preparation(run.processor, recipe.model)):
        notes.append(changed)
    for note in notes:
        report.line(f"         {note}")
    report.line(f"optimize {recipe.optimizer}, learning rate {peak:.4g}{scaled}, {recipe.lr_schedule}")
    report.line(f"device   {accelerator.num_processes} x {describe_device(accelerator.device)}, {precision}")
    if resume_from is not None:
        report.line(f"resume   {resume_from}: epoch {progress.epoch + 1}, step {progress.update}")
        for what, then, now in (
            ("precision", progress.precision, precision),
            ("pictures at once on a device", progress.per_device, run.plan.per_device),
        ):
            if then and then != now:
                report.line(f"         {what}: {then} until here, {now} from here on")
        if progress.num_processes != accelerator.num_processes:
            report.line(
                f"         written by {progress.num_processes} processes: the sample order goes on exactly,"
                " draws of dropout and stochastic depth differ"
            )
    if original is not None:
        resume_from = original.folder
        report.line(f"resume   {resume_from}: epoch {progress.epoch + 1}, {original}")
    values = {
        "recipe": recipe.name,
        "variant": config.variant,
        "parameters": parameters,
        "device": describe_device(accelerator.device),
        "processes": accelerator.num_processes,
        "precision": precision,
        "resumed_from": str(resume_from) if resume_from else None,
        "versions": software_versions(),
        "command": command_line(recipe),
    }
    report.log("run", progress.total_updates, values)


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU ({platform.machine()}, {threads} thread{'s' if threads > 1 else ''})"
