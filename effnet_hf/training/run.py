"""A run: what the parts of the loop share, what its steps say, and when it saves."""

import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import accelerate
import torch
from accelerate import Accelerator

from ..analysis import Recorder
from ..data import BatchPlan, Loader, Loaders
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import figure_names, is_multi_label
from ..recipes import Recipe
from .ema import ModelEMA
from .freezing import Freezing
from .metrics import LossMeter, Speed, deciding_figure
from .model import Start
from .original_run import OriginalRun
from .profiling import Profiler
from .progress import Progress
from .report import Report
from .resume import Checkpoints
from .saved_run import SavedRun
from .signals import Interruption


class Quantizing(Protocol):
    """What quantization-aware training adds to a run, see `effnet_hf.quantization.Quantization`."""

    def check(self, model) -> None:
        """Raises `UserError` for what cannot be done to this model; before anything is written."""

    def prepare(self, model, loaders: Loaders, accelerator: Accelerator, report: Report, resuming: bool):
        """Inserts quantizers, before the optimizer exists; calibrates them unless a checkpoint's will be restored."""

    def describe(self, summary: dict, report: Report) -> list:
        """Tables for the model card, when the first process publishes the model."""


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
    start: Start
    quantization: Quantizing | None
    checkpoints: Checkpoints
    resumed: SavedRun | OriginalRun | None
    report: Report
    progress: Progress
    interruption: Interruption
    profiler: Profiler
    freezing: Freezing
    started: float = field(default_factory=time.monotonic)
    saved_at: float = field(default_factory=time.monotonic)
    limit_told: str = ""  # the verdict that the console has seen last
    first_batch_shown: bool = False
    best_answers: Recorder | None = None  # to the validation images; None also where this launch has not found the best
    best_speed: float | None = None  # images per second then
    saved_updates: int = -1  # `progress.total_updates` of the newest checkpoint
    before_step: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)  # see `remember`

    @property
    def train_loader(self) -> Loader:
        assert self.loaders.train is not None  # a run is built with both
        return self.loaders.train

    @property
    def figure_names(self) -> tuple[str, str]:
        """Of a validation, beside its loss, the two that are shown whatever decides."""
        return figure_names(self.bare_model.config, self.recipe.top_k)

    @property
    def telling_names(self) -> list[str]:
        """These and the one that decides, but for one that is always 100 %: top-5 of five classes or fewer."""
        config, (first, second) = self.bare_model.config, self.figure_names
        names = [first, second] if is_multi_label(config) or config.num_labels > self.recipe.top_k else [first]
        return names if self.best_by in (*names, "loss") else [*names, self.best_by]

    @property
    def best_by(self) -> str:
        """The figure that decides which model is best."""
        return deciding_figure(self.recipe.select_best, is_multi_label(self.bare_model.config))

    def standing(self, figures: dict[str, float]) -> tuple[float, float]:
        """By what validations compare, the better the larger. Small validation sets often tie on a percentage; the loss
        then says which model is surer of it."""
        loss = -figures["loss"]
        return loss if self.best_by == "loss" else figures[self.best_by], loss

    def best_figures(self) -> dict[str, float]:
        """Of the best model so far, every figure but speed, by name."""
        first, second = self.figure_names
        progress = self.progress
        macro = {"macro_recall": progress.best_macro_recall, "macro_f1": progress.best_macro_f1}
        return {
            first: progress.best_top1,
            second: progress.best_topk,
            **({} if is_multi_label(self.bare_model.config) else macro),
            "loss": progress.best_loss,
        }

    def note_best(self, figures: dict[str, float], is_ema: bool) -> None:
        """Remembers this epoch's as the best."""
        progress, (first, second) = self.progress, self.figure_names
        progress.best_top1, progress.best_topk, progress.best_loss = (figures[name] for name in (first, second, "loss"))
        progress.best_macro_recall, progress.best_macro_f1 = (
            figures.get(name, 0.0) for name in ("macro_recall", "macro_f1")
        )
        progress.best_by, progress.best_epoch, progress.best_is_ema = self.best_by, progress.epoch, is_ema
        progress.num_validated, progress.epochs_since_best = int(figures["n"]), 0

    @cached_property
    def class_weights(self) -> torch.Tensor | None:
        """float32 (classes,), of the training loss."""
        weights = self.loaders.class_weights
        return None if weights is None else torch.from_numpy(weights).to(self.accelerator.device)

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

    @torch.no_grad()
    def answer(self) -> float:
        """A number, or NaN where the network or its average has finite weights and gives infinite answers."""
        size, total = self.processor.crop_size, 0.0
        images = torch.randn((2, 3, size["height"], size["width"]), generator=torch.Generator().manual_seed(0))
        for network in (self.bare_model, *([self.ema.model] if self.ema is not None else [])):
            was_training = network.training
            network.eval()
            with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                logits = network(pixel_values=images.to(self.accelerator.device)).logits
            network.train(was_training)
            total += (logits.float().abs().max() * 0).item()
        return total

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

    def thaw_if_due(self) -> None:
        """Before an epoch: what was frozen for the ones before it trains from now on."""
        if self.freezing.is_over(self.progress.epoch):
            self.model = self.freezing.thaw(self.model, self.optimizer, self.accelerator)
            self.report.line(f"thawed   everything trains from epoch {self.freezing.epochs + 1} on")

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
        self.progress.precision = self.recipe.precision or ""
        self.checkpoints.save(self.progress)
        self.saved_updates = self.progress.total_updates

    def remember(self, losses: LossMeter) -> None:
        """Keeps, before the first micro-batch of a step, what one changes: statistics of batch norm, the mean loss,
        and draws of dropout."""
        if self.before_step or self.plan.accumulation_steps == 1:
            return
        buffers = [*self.bare_model.buffers(), losses.sum]
        self.before_step = [(buffer, buffer.clone()) for buffer in buffers]
        self.draws, self.loss_count = self.checkpoints.state.random_state(), losses.count

    def forget(self) -> None:
        """The step is whole."""
        self.before_step = []

    def return_to_last_step(self, losses: LossMeter) -> None:
        """Takes back the micro-batches of a step that will not be finished."""
        if not self.before_step:
            return
        for buffer, before in self.before_step:
            buffer.copy_(before)
        losses.count = self.loss_count
        self.checkpoints.state.set_random_state(self.draws)
        self.forget()

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
                f"{self.train_loader.updates_per_epoch}  train.loss {loss:.4f}  lr {rate:.4g}{speed_text}"
            )

    def tell_limit(self, speed: Speed) -> None:
        """Says whether the loader or the device limits the run: every epoch in the log, and in the console when that
        is new."""
        if not speed.epoch_elapsed:
            return
        sentence = self.train_loader.limit(speed.epoch_waited, speed.epoch_elapsed - speed.epoch_waited)
        values = {"limit": sentence, "train.data_share": speed.epoch_waited / speed.epoch_elapsed}
        self.report.log("limit", self.progress.total_updates, values, epoch=self.progress.epoch)
        if self.limit_told != (verdict := sentence.partition(":")[0]):
            self.report.line(sentence)
            self.limit_told = verdict

    def log_epoch(self, train_loss: float, results: dict[str, dict]) -> None:
        progress = self.progress
        text = f"epoch {progress.epoch + 1:>3}/{self.recipe.epochs}  train.loss {train_loss:.4f}"
        for kind, figures in results.items():
            values = {f"{kind}.{name}": value for name, value in figures.items()}
            self.report.log(kind, progress.total_updates, values, epoch=progress.epoch)
            text += "".join(f"  {kind}.{name} {figures[name]:6.2f}" for name in self.telling_names)
            text += f"  {kind}.loss {figures['loss']:.4f}"
        values = {"train.loss": train_loss, "best_epoch": progress.best_epoch + 1, "best_is_ema": progress.best_is_ema}
        self.report.log("epoch", progress.total_updates, values, epoch=progress.epoch)
        self.report.line(text + ("  best" if progress.epochs_since_best == 0 else ""))
