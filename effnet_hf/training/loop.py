"""The training story: epochs, steps, validation. Read it top to bottom.

recipe -> accelerator -> build_run -> restore_run -> for every epoch: steps, checkpoint, validation -> best model + card
"""

import contextlib
import math
import time

import torch
from accelerate import Accelerator

from ..analysis import Recorder
from ..errors import OneProcessError, UserError, sentence_of
from ..multi_label import is_multi_label
from ..recipes import Recipe
from ..run_folder import RunFolder
from .batch_sheet import show_first_batch
from .launcher import refuse_restarts, with_others
from .metrics import Accuracy, LatencyMeter, LossMeter, SeveralLabels, Speed, percentiles
from .optim import distillation_loss, learning_rate, set_learning_rate, training_loss
from .owner import only_run
from .plots import LiveCurves
from .precision import leaving_as_found, start_accelerator
from .publish import finish, push
from .run import Quantizing, Run
from .saved_run import SavedRun
from .setup import build_run, introduce, restore_run
from .signals import EXIT_INTERRUPTED, Interruption, Stopped, StoppedWaiting


def train(recipe: Recipe, quantization: Quantizing | None = None) -> int:
    """Trains as the recipe says and leaves a `save_pretrained` folder in `recipe.output_dir`.

    Args:
        quantization: makes it quantization-aware training, see `effnet_hf.quantization.Quantization`.

    Returns:
        0 when the run is complete, `EXIT_INTERRUPTED` after a signal: `--resume auto` goes on from there.

    Raises:
        UserError: what the caller can mend, in one sentence.
    """
    refuse_restarts(recipe.resume)
    with with_others(), leaving_as_found():
        recipe, accelerator, chosen = start_accelerator(recipe)
        with only_run(accelerator, recipe.output_dir):
            return _train(recipe, accelerator, chosen, quantization)


def _train(recipe: Recipe, accelerator: Accelerator, chosen: str, quantization: Quantizing | None) -> int:
    run = build_run(recipe, accelerator, quantization)
    restore_run(run)
    introduce(run, chosen)
    if not run.interruption.has_handlers:
        run.report.line(
            "         not in the main thread, where alone signals can be caught: none will save and stop it"
        )
    if isinstance(run.resumed, SavedRun):
        run.saved_updates = run.progress.total_updates
    try:
        # A signal waits until all is published and closed. That takes seconds, but where a tracker uploads its files.
        with run.interruption, contextlib.closing(run.report), contextlib.closing(run.loaders):
            with run.profiler:
                if not train_epochs(run):
                    return stopped(run, "saved")
            if not run.progress.num_validated:  # what is published was looked at by nobody
                refuse_divergence(run.spoilt().item(), run)
                refuse_divergence(run.answer(), run, "the answer to a test image")
            finish(run)
        if recipe.push_to_hub:
            if run.interruption.received:
                return stopped(run, "published, not pushed")
            push(run)
        return 0
    except Exception as error:  # a bad file, a full memory: the other processes need not have met it
        sentence = sentence_of(error)
        if sentence is None:
            raise
        raise OneProcessError(sentence) from error


def train_epochs(run: Run) -> bool:
    """All epochs of this launch; False if a signal stopped it, with everything saved."""
    recipe, progress = run.recipe, run.progress
    first_epoch = progress.epoch + progress.is_trained
    last_epoch = min(recipe.epochs, first_epoch + (recipe.run_epochs or recipe.epochs))
    curves = LiveCurves(run)
    while progress.epoch < last_epoch and not run.patience_is_over:
        run.thaw_if_due()
        if not train_epoch(run) or not end_epoch(run, last_epoch):
            return False
        if recipe.report:
            curves.refresh()
    return True


def stopped(run: Run, what: str) -> int:
    run.report.line(f"{run.interruption.received or 'stopped'}: {what}; go on with --resume auto")
    return EXIT_INTERRUPTED


def train_epoch(run: Run) -> bool:
    """Runs the optimizer steps left in this epoch; False if a signal ended it early, with everything saved."""
    recipe, accelerator, progress, report = run.recipe, run.accelerator, run.progress, run.report
    loader = run.train_loader
    losses = LossMeter(accelerator, progress.loss_sum, progress.loss_count, progress.logged)
    speed = Speed(recipe.global_batch_size, accelerator.device)
    first, stop = progress.update, False
    run.model.train()
    report.start_bar(f"epoch {progress.epoch + 1}/{recipe.epochs}", loader.updates_per_epoch, progress.update)

    try:
        for batch in speed.watch(run.interruption.watch(loader.epoch(progress.epoch, start_update=progress.update))):
            if recipe.report and not run.first_batch_shown:
                show_first_batch(run, batch)
            rate = learning_rate(recipe, progress.epoch, progress.update, loader.updates_per_epoch)
            set_learning_rate(run.optimizer, rate)
            run.remember(losses)
            losses.add(train_step(run, batch))
            if not accelerator.sync_gradients:
                continue

            # One optimizer step is complete; everything from here on happens between two steps.
            run.forget()
            progress.update += 1
            progress.total_updates += 1
            speed.count_update()
            if run.ema is not None:
                run.ema.update(run.bare_model)
            report.advance()
            run.profiler.step()
            epoch_is_over = progress.update == loader.updates_per_epoch
            log_now = epoch_is_over or progress.update % recipe.log_every == 0
            if log_now:
                losses.spoil(run.spoilt())
                loss = losses.recent()  # the only wait for the device
                refuse_divergence(loss, run)
                run.log_step(loss, rate, speed.figures())
                if epoch_is_over or not run.limit_told and progress.update - first >= 50:
                    run.tell_limit(speed)
            # Several processes must stop and save at the same step; agreeing costs a collective and a wait for the
            # device, so they do it when they log.
            may_ask = log_now or accelerator.num_processes == 1
            stop = may_ask and not epoch_is_over and run.interruption.agreed()
            if stop or (not epoch_is_over and run.checkpoint_is_due(may_ask)):
                save(run, losses)
            if stop:
                break
    except Stopped as reason:
        refuse_to_save_alone(run, reason)
        run.return_to_last_step(losses)
        stop = True
        save(run, losses)
    report.end_bar()
    progress.loss_sum, progress.loss_count = losses.total(), losses.count
    if not stop and progress.update < loader.updates_per_epoch:
        raise UserError(
            f"epoch {progress.epoch + 1} ended after {progress.update} of {loader.updates_per_epoch} steps: the data"
            " gave no more batches with a readable image; `effnet-hf scan` names the files that are none."
        )
    return not stop


def save(run: Run, losses: LossMeter | None = None) -> None:
    """Writes a checkpoint of this position, unless there is one, after a look at whether it is worth keeping.

    Args:
        losses: of an epoch that is not over.
    """
    progress = run.progress
    if run.saved_updates == progress.total_updates:
        return
    if losses is not None:
        losses.spoil(run.spoilt())
        progress.loss_sum, progress.loss_count, progress.logged = losses.total(), losses.count, losses.seen
        refuse_divergence(progress.loss_sum, run)
    refuse_divergence(run.answer(), run, "the answer to a test image")
    run.save()


def refuse_to_save_alone(run: Run, reason: Stopped) -> None:
    """Raises `UserError` in one of several processes that waits for data and was told to stop: to save takes all."""
    if isinstance(reason, StoppedWaiting) and run.accelerator.num_processes > 1:
        raise OneProcessError(
            f"{run.interruption.received}, while this process waits for data and cannot save together with the others;"
            " go on from the newest checkpoint with --resume auto."
        )


def refuse_divergence(figure: float, run: Run, what: str = "the training loss") -> None:
    """Raises `UserError` for a figure that is no number, or was made none by `Run.spoilt`, before anything is saved;
    every process has the same one."""
    if math.isfinite(figure):
        return
    progress, recipe = run.progress, run.recipe
    where = f"epoch {progress.epoch + 1}, step {progress.update}"
    spoilt = run.first_spoilt()
    what = f"{spoilt} is no longer finite" if spoilt else f"{what} is {figure}"
    if spoilt is None and run.accelerator.num_processes > 1:
        what += ", or a weight or statistic of another process is no longer finite,"
    remedy = f"lower --learning_rate (now {recipe.learning_rate:g}), or clip with --gradient_clip 1"
    if run.accelerator.scaler is not None:  # fp16 ends at 65,504
        what, remedy = f"{what} (fp16 ends at 65,504)", f"use --precision bf16, {remedy}"
    here = RunFolder(recipe.output_dir).checkpoint(progress.total_updates)
    saved = [path for path in run.checkpoints.all() if path != here]  # each was looked at before it was written
    kept = f" What was saved before is whole: {saved[-1]}." if saved else ""
    raise UserError(f"{what} in {where}: training has diverged; {remedy}.{kept}")


def train_step(run: Run, batch: dict) -> torch.Tensor:
    """Forward, loss and backward of one micro-batch; the last one of an optimizer step also updates the weights.

    Accelerate divides the gradient, not the returned loss, by the accumulation steps, and lets DDP reduce gradients
    only with the last micro-batch.
    """
    accelerator, recipe = run.accelerator, run.recipe
    if recipe.compile == "graphs":
        torch.compiler.cudagraph_mark_step_begin()
    with accelerator.accumulate(run.model):
        logits = _answers(run, batch)
        several = is_multi_label(run.bare_model.config)
        loss = training_loss(logits, batch["labels"], recipe.label_smoothing, several, run.class_weights)
        if run.teacher is not None:
            with torch.no_grad(), accelerator.autocast():
                taught = run.teacher(pixel_values=batch["pixel_values"]).logits
            share = recipe.distillation_weight
            distilled = distillation_loss(logits, taught, recipe.distillation_temperature, several)
            loss = (1 - share) * loss + share * distilled
        accelerator.backward(loss)
        if recipe.gradient_clip and accelerator.sync_gradients:
            accelerator.clip_grad_norm_(run.model.parameters(), recipe.gradient_clip)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=not run.keeps_gradients)
    return loss.detach()


def _answers(run: Run, batch: dict) -> torch.Tensor:
    try:
        return run.model(pixel_values=batch["pixel_values"]).logits
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            "batch norm needs more than one value per channel, and one image of this size at once leaves it one; raise"
            " --per_device_batch_size or --image_size."
        ) from error


def end_epoch(run: Run, last_epoch: int) -> bool:
    """Writes the checkpoint, validates, remembers the best model, writes the epoch's line; False if a signal stops it.

    A stop during validation thus loses no step: the resumed run begins with the validation. Whatever
    `checkpoint_every_epochs` says, a launch ends with a checkpoint.
    """
    recipe, progress = run.recipe, run.progress
    progress.is_trained = True
    run.share_statistics()
    stop, every, done = run.interruption.agreed(), recipe.checkpoint_every_epochs, progress.epoch + 1
    may_be_last = done == last_epoch or 0 < recipe.early_stopping_patience <= progress.epochs_since_best + 1
    if stop or may_be_last or (every and done % every == 0) or run.checkpoint_is_due():
        save(run)
    if stop:
        return False

    # Without DDP, whose forward pass is a collective: the processes may have different numbers of batches.
    networks = {"val": run.bare_model, **({"val_ema": run.ema.model} if run.ema is not None else {})}
    recorders = dict.fromkeys(networks) | ({kind: Recorder() for kind in networks} if recipe.report else {})
    results = {}
    try:
        for kind, network in networks.items():
            results[kind] = validate(
                network,
                run.loaders.val,
                run.accelerator,
                recipe.top_k,
                run.interruption,
                choose_thresholds=True,
                recorder=recorders[kind],
            )
    except Diverged as error:
        refuse_divergence(error.loss, run, f"{kind}.loss")
    except Stopped as reason:
        refuse_to_save_alone(run, reason)
        save(run)
        return False

    kind, figures = max(results.items(), key=lambda item: run.standing(item[1]))
    progress.epochs_since_best += 1
    if progress.best_epoch < 0 or run.standing(figures) > run.standing(run.best_figures()):
        run.note_best(figures, kind == "val_ema")
        run.best_answers, run.best_speed = recorders[kind], figures.get("total_ips")
        run.checkpoints.save_best(run.ema.model if run.ema is not None and progress.best_is_ema else run.bare_model)
    run.log_epoch(progress.loss_sum / max(progress.loss_count, 1), results)
    progress.start_epoch(progress.epoch + 1)
    return True


class Diverged(UserError):
    """A validation whose loss is no number."""

    def __init__(self, loss: float, images: int):
        super().__init__(f"the loss on {images:,} validation images is {loss}: the model has diverged, or is damaged.")
        self.loss = loss


@torch.inference_mode()
def validate(
    model,
    loader,
    accelerator,
    top_k: int = 5,
    interruption: Interruption | None = None,
    choose_thresholds: bool = False,
    recorder: Recorder | None = None,
) -> dict[str, float]:
    """Top-1, top-k (percent) and cross entropy over every image exactly once, on any number of processes.

    Of a network for several labels per image: `map` and `f1` at `config.thresholds` (percent, see
    [`effnet_hf.multi_label`]) and binary cross entropy.

    Also `total_ips` and `compute_ips` (images per second of all processes together, with and without waiting for
    data), `data_time` (seconds per batch) and `compute_latency_*` (milliseconds per batch on this process); the first
    batches count in no speed.

    Args:
        interruption: ends it between two batches.
        choose_thresholds: put the best thresholds for these images into `config.thresholds` first.
        recorder: gets every answer of this process.

    Raises:
        Stopped: it did, on all processes.
        UserError: there is no image, or none with a label, or the loss is no number.
    """
    was_training = model.training
    model.eval()
    config, device = getattr(model, "config", None), accelerator.device  # any module will do for one label per image
    answers: SeveralLabels | Accuracy = Accuracy(top_k, device)
    if config is not None and is_multi_label(config):
        answers = SeveralLabels(config, device)
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, images, stopped
    meter, sizes, started = LatencyMeter(accelerator.device), [], []
    batches = loader.epoch(0)
    for batch in batches if interruption is None else interruption.watch(batches):
        if interruption is not None and interruption.pending():
            sums[2] = 1
            break
        started.append(time.perf_counter())
        with meter, accelerator.autocast():
            logits = model(pixel_values=batch["pixel_values"]).logits.float()
        labels = batch["labels"]
        sums[0] += answers.add(logits, labels)
        if recorder is not None:
            recorder.add(logits, labels, batch["index"])
        sums[1] += len(labels)
        sizes.append(len(labels))
    sums = accelerator.reduce(sums, reduction="sum").tolist()
    model.train(was_training)
    if sums[2]:
        raise Stopped
    if not sums[1]:
        if loader.num_samples:
            raise UserError("no validation image can be read; `effnet-hf scan` names what is wrong with them.")
        raise UserError("there is no image to validate on: give a val/ folder or --val_fraction.")
    if not math.isfinite(sums[0]):
        raise Diverged(sums[0] / sums[1], int(sums[1]))
    figures = answers.figures(accelerator, choose_thresholds) | {"loss": sums[0] / sums[1], "n": int(sums[1])}
    warmup = min(3, len(sizes) // 3)
    latencies = meter.milliseconds(warmup)
    timed = sum(sizes[warmup:]) * accelerator.num_processes
    if len(latencies):
        elapsed = time.perf_counter() - started[warmup]
        figures |= {"total_ips": timed / elapsed, "compute_ips": timed / (latencies.sum() / 1e3)}
        figures["data_time"] = max(elapsed - latencies.sum() / 1e3, 0.0) / len(latencies)
        figures |= {f"compute_latency_{name}": value for name, value in percentiles(latencies).items()}
    return figures
