"""The checkpoint of ours that a run goes on from: whether it fits, and putting its state back."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.listing import DataListing
from ..errors import UserError
from ..recipes import load_recipe
from ..run_folder import RunFolder
from .owner import on_main
from .progress import Progress


if TYPE_CHECKING:
    from .resume import Checkpoints
    from .run import Run


# What a resumed run must have in common with its checkpoint.
FIXED = (
    "seed", "global_batch_size", "sampler", "folds", "fold", "variant", "optimizer", "top_k", "placement",
    "qat_batch_norm", "float_layers", "freeze", "freeze_epochs",
)  # fmt: skip


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of ours that a run goes on from."""

    folder: Path
    checkpoints: "Checkpoints"

    def _check_recipe(self) -> None:
        """Raises `UserError` for a recipe that a resumed run cannot change to."""
        recipe, then = self.checkpoints.recipe, load_recipe(str(RunFolder(self.folder).recipe))
        now: dict[str, object] = {option: getattr(recipe, option) for option in FIXED}
        before: dict[str, object] = {option: getattr(then, option) for option in FIXED}
        # The decay may change; an average that begins in the middle would be another thing under the same name.
        for options, source in ((now, recipe), (before, then)):
            options["ema_decay"] = source.ema_decay if not recipe.ema_decay or not then.ema_decay else "as it is"
        for option, old in before.items():
            if old != now[option]:
                raise UserError(
                    f"--resume {self.folder} was trained with --{option} {old}, not {now[option]};"
                    " resume with its value, start from its weights with --model, or start afresh with --overwrite and"
                    " without --resume."
                )

    def read_progress(self, num_samples: int, updates_per_epoch: int) -> Progress:
        """Where it stands.

        Raises:
            UserError: it is unreadable, or its position means another sample in this run.
        """
        recipe, name = self.checkpoints.recipe, f"--resume {self.folder}"
        progress = Progress.read(RunFolder(self.folder).progress)
        if progress.num_samples != num_samples and not recipe.accept_changed_data:
            raise UserError(
                f"{name} was trained on {progress.num_samples} images, the data now has {num_samples};"
                " go on all the same with --accept_changed_data true, or start from its weights with --model."
            )
        if (
            RunFolder.is_checkpoint(self.folder.name)
            and self.folder.name != RunFolder("").checkpoint(progress.total_updates).name
        ):
            raise UserError(f"{name} is a renamed copy: it was written after {progress.total_updates} steps.")
        if progress.num_samples == num_samples and (
            progress.update > updates_per_epoch or progress.is_trained and progress.update < updates_per_epoch
        ):
            raise UserError(f"{name} stands at step {progress.update} of an epoch that has {updates_per_epoch}.")
        if (done := progress.epoch + progress.is_trained) > recipe.epochs:
            raise UserError(
                f"{name} has trained {done} epochs, more than --epochs {recipe.epochs}; give at least as many, or go"
                " back to an older checkpoint by its name."
            )
        return progress

    def _check_data(self) -> list[str]:
        """Compares the images of the run with those of the checkpoint; sentences for the console. For the first
        process.

        Raises:
            UserError: its classes are others; or its images, and nobody said that they may be.
        """
        now, file = self.checkpoints.listing, self.folder / RunFolder(self.folder).data.name
        if now is None or not file.is_file():
            return []
        before, name = DataListing.read(file), f"--resume {self.folder}"
        if difference := before.class_difference(now):
            raise UserError(
                f"{name} was trained on other classes: {difference}; start from its weights with --model instead."
            )
        difference = before.difference(now)
        if difference is None:
            return []
        if not self.checkpoints.recipe.accept_changed_data:
            raise UserError(
                f"{name} was trained on other images: {difference}; go on all the same with --accept_changed_data"
                " true, or start from its weights with --model."
            )
        return [f"the images have changed: {difference}"]

    def restore(self, run: "Run") -> Progress:
        """Puts model, moving average, optimizer, loss scale and RNGs back as they were, and then the run's folder. A
        collective call.

        Raises:
            UserError: the checkpoint does not fit this run; until then nothing on the disk has changed.
        """
        train, accelerator, checkpoints = run.train_loader, run.accelerator, self.checkpoints
        self._check_recipe()  # first: another fold has other images, too
        checkpoints.notes += on_main(accelerator, self._check_data)  # names what differs, before numbers are compared
        progress = self.read_progress(train.num_samples, train.updates_per_epoch)
        if progress.best_epoch >= 0 and progress.best_by != run.best_by:
            raise UserError(
                f"--resume {self.folder} has chosen its best model by {progress.best_by}, not {run.best_by}; resume"
                f" with --select_best {progress.best_by}."
            )
        checkpoints.state.read(self.folder, progress)
        if progress.num_samples != train.num_samples:  # the position within the epoch means other images now
            progress.start_epoch(progress.epoch + progress.is_trained)
            checkpoints.notes.append(f"epoch {progress.epoch + 1} begins with {train.num_samples:,} images")
            progress.num_samples = train.num_samples
        # Micro-batches so far, by which Accelerate tells when a step is whole: as this launch divides the batch.
        accelerator.step = progress.total_updates * accelerator.gradient_accumulation_steps
        on_main(accelerator, lambda: checkpoints.adopt(self.folder, progress))
        return progress
