"""Writing, keeping and reading the checkpoints of one run, and going on from them.

    checkpoints/update-00001250/
      config.json model.safetensors preprocessor_config.json   opens with from_pretrained
      recipe.yaml                     how it was trained
      optimizer.bin scaler.pt         optimizer and fp16 loss scale
      random_states_{rank}.pkl        RNGs of every process
      custom_checkpoint_0.pkl         moving average of the weights
      progress.json                   epoch, position in the sample order, best figure, end of metrics.jsonl
      best/                           the best model at that time, as hard links where the file system has them

A checkpoint is written to a hidden sibling, flushed to the disk and renamed, so a folder that can be seen is whole.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..cli import invocation
from ..errors import UserError, first_line
from ..files import atomic_folder, atomic_write, recover
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..quiet import no_progress_bars
from ..recipes import Recipe, load_recipe
from ..run_folder import RunFolder
from .original_run import OriginalRun
from .progress import Progress


# What a resumed run must have in common with its checkpoint.
FIXED = (
    "seed", "global_batch_size", "variant", "optimizer", "top_k", "placement", "qat_batch_norm", "float_layers",
)  # fmt: skip


def precision_of_resumed(recipe: Recipe) -> str | None:
    """What the checkpoint that `--resume` means was trained in; None where there is none, or none that says it."""
    if not recipe.resume:
        return None
    named = RunFolder(recipe.output_dir if recipe.resume == "auto" else recipe.resume)
    found = [named.path] if named.progress.is_file() else named.whole_checkpoints()
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):  # damaged, which `restore` says better
        precision = json.loads(RunFolder(found[-1]).progress.read_text()).get("precision")
        if precision:
            return precision
        # An earlier version's checkpoint; its run's log says it.
        lines = RunFolder(found[-1].resolve().parents[1]).metrics.read_text().splitlines()
        starts = [row for row in map(json.loads, lines) if row.get("type") == "run"]
        return starts[-1].get("precision")
    return None


class Checkpoints:
    """Writes, lists, prunes and reads the checkpoints of one run."""

    processor: EfficientNetNVImageProcessor  # saved beside every model; known once it is known what is resumed

    def __init__(self, accelerator: Accelerator, recipe: Recipe):
        self.accelerator, self.recipe = accelerator, recipe
        self.run = RunFolder(recipe.output_dir)
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, progress: Progress) -> Path:
        """Writes the state after the last optimizer step. A collective call."""
        target = self.run.checkpoint(progress.total_updates)
        with self._staged(target) as folder:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                self.processor.save_pretrained(folder)
                RunFolder(folder).recipe.write_text(self.recipe.to_yaml(), encoding="utf-8")
                RunFolder(folder).progress.write_text(json.dumps(dataclasses.asdict(progress), indent=1))
                if self.run.best.is_dir():
                    shutil.copytree(self.run.best, folder / self.run.best.name, copy_function=_link)
        if self.accelerator.is_main_process:
            for path in self.all()[: -self.recipe.keep_checkpoints]:
                shutil.rmtree(path)
        return target

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return self.run.whole_checkpoints()

    def save_best(self, model) -> None:
        """Writes `best/`, the model that validates best so far."""
        if self.accelerator.is_main_process:
            with atomic_folder(self.run.best, overwrite=True) as folder, no_progress_bars():
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)

    def publish(self, model) -> None:
        """Puts the best model, or `model` if nothing was validated, where `from_pretrained(output_dir)` finds it."""
        if not self.accelerator.is_main_process:
            return
        if not self.run.best.is_dir():
            self.save_best(model)
        for source in sorted(self.run.best.iterdir()):
            with atomic_write(self.run.path / source.name, "wb") as file:
                file.write(source.read_bytes())

    def find(self) -> "SavedRun | OriginalRun | None":
        """The run that `--resume` names; None for `auto` in a fresh folder, and where nothing is resumed.

        A collective call, after which nothing of a killed writer is left.

        Raises:
            UserError: there is no such run, or `output_dir` holds another one that nobody said may be removed.
        """
        found = OriginalRun.open(self.recipe) or self._find_saved()
        if not isinstance(found, SavedRun):
            self._check_output_dir()
        return found

    def _find_saved(self) -> "SavedRun | None":
        resume = self.recipe.resume
        if resume is None:
            return None
        if self.accelerator.is_main_process and self.run.checkpoints.is_dir():
            recover(self.run.checkpoints)
        self.accelerator.wait_for_everyone()
        if resume == "auto":
            return SavedRun(self.all()[-1], self) if self.all() else None
        path = Path(resume)
        if path.is_file():
            raise UserError(
                f"--resume {resume} is a file; a checkpoint of NVIDIA's scripts goes on after"
                f" {invocation('convert')} {resume} --output_dir DIR with --resume DIR."
            )
        if not RunFolder(path).progress.is_file():
            nested = RunFolder(path).whole_checkpoints()
            if not nested:
                raise UserError(
                    f"--resume {resume}: no checkpoint there; name a folder like {self.run.checkpoint(1250)}."
                )
            path = nested[-1]
        if self.is_elsewhere(path) and self.run.metrics.exists() and not self.recipe.overwrite:
            raise UserError(
                f"--output_dir {self.run.path} already holds another run than --resume {resume};"
                " start afresh with --overwrite, or name another folder."
            )
        return SavedRun(path, self)

    def _check_output_dir(self) -> None:
        """Refuses to mix two runs in one folder, and to remove what nobody said may be removed."""
        recipe, folder = self.recipe, self.run.path
        if folder.exists() and not folder.is_dir():
            raise UserError(f"--output_dir {folder} is a file; name a folder.")
        if recipe.overwrite:
            for flag, source in (("model", recipe.model), ("resume", recipe.resume)):
                if source and folder.is_dir() and Path(source).is_dir() and folder.samefile(source):
                    raise UserError(f"--overwrite would remove --{flag} {source}; name another --output_dir.")
        elif recipe.resume == "auto":
            if self.run.summary.exists():
                raise UserError(
                    f"--resume auto: {folder} holds a finished run without a checkpoint to go on from;"
                    " start afresh with --overwrite, or name another folder."
                )
        elif self.run.metrics.exists():
            raise UserError(
                f"--output_dir {folder} already holds a run; continue it with --resume auto,"
                " start afresh with --overwrite, or name another folder."
            )

    def is_elsewhere(self, path: Path) -> bool:
        return path.resolve().parent != self.run.checkpoints.resolve()

    def adopt(self, path: Path) -> None:
        """Makes this folder what the run's was when checkpoint `path` was written: no later checkpoints, the best model
        of that time, and (from another run's folder) its log and files of figures. A collective call."""
        if self.accelerator.is_main_process:
            if self.is_elsewhere(path):
                self._remove_earlier_run()
                theirs = RunFolder(path.resolve().parents[1])
                for source, target in (
                    (theirs.metrics, self.run.metrics),
                    (theirs.quantization, self.run.quantization),
                ):
                    if source.is_file():
                        with atomic_write(target, "wb") as file:
                            file.write(source.read_bytes())
            for later in reversed(self.all()):  # the newest first: killed in between, the rest is still a history
                if later.name > path.name:
                    shutil.rmtree(later)
            best = path / self.run.best.name
            if best.is_dir():
                with atomic_folder(self.run.best, overwrite=True) as folder:
                    shutil.copytree(best, folder, dirs_exist_ok=True, copy_function=_link)
            else:
                shutil.rmtree(self.run.best, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def clear(self) -> None:
        """Removes an earlier run from the folder, its published model too. A collective call."""
        if self.accelerator.is_main_process:
            self._remove_earlier_run()
        self.accelerator.wait_for_everyone()

    def _remove_earlier_run(self) -> None:
        if self.run.metrics.exists():
            for path in self.run.left_by_a_run():
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.run.checkpoints.is_dir():
            for path in self.run.checkpoints.iterdir():  # not the folder itself, which may be a link to another disk
                shutil.rmtree(path, ignore_errors=True)

    @contextmanager
    def _staged(self, target: Path):
        """`atomic_folder` for all processes: the first one creates and renames, the others write into it."""
        if self.accelerator.is_main_process:
            with atomic_folder(target, overwrite=True) as folder:
                broadcast_object_list([str(folder)])
                yield folder
                self.accelerator.wait_for_everyone()
        else:
            name: list[str | None] = [None]
            broadcast_object_list(name)
            assert name[0] is not None
            yield Path(name[0])
            self.accelerator.wait_for_everyone()
        self.accelerator.wait_for_everyone()

    # Weights go through save_pretrained, so that every checkpoint opens as a model and fits any number of processes.
    # Under FSDP Accelerate hands no gathered weights to the hook and writes its own sharded format.

    def _save_weights(self, models, weights, output_dir):
        while weights:
            weights.pop()
            if self.accelerator.is_main_process:
                with no_progress_bars():
                    self.accelerator.unwrap_model(models[0], keep_torch_compile=False).save_pretrained(output_dir)

    def _load_weights(self, models, input_dir):
        if (Path(input_dir) / "model.safetensors").is_file():
            model = self.accelerator.unwrap_model(models.pop(), keep_torch_compile=False)
            model.load_state_dict(load_file(Path(input_dir) / "model.safetensors"), strict=True)


@dataclass(frozen=True)
class SavedRun:
    """A checkpoint of ours that a run goes on from."""

    folder: Path
    checkpoints: Checkpoints

    def read_progress(self, num_samples: int) -> Progress:
        """Where it stands.

        Raises:
            UserError: it is unreadable, or its position means another sample in this run.
        """
        try:
            progress = Progress(**json.loads(RunFolder(self.folder).progress.read_text()))
            then = load_recipe(str(RunFolder(self.folder).recipe))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"--resume {self.folder} is not a checkpoint of this version: {error}") from None
        for name in FIXED:
            old, new = getattr(then, name), getattr(self.checkpoints.recipe, name)
            if old != new:
                raise UserError(
                    f"--resume {self.folder} was trained with --{name} {old}, not {new};"
                    " resume with its value, start from its weights with --model, or start afresh with --overwrite and"
                    " without --resume."
                )
        if progress.num_samples != num_samples:
            raise UserError(
                f"--resume {self.folder} was trained on {progress.num_samples} images, the data now has {num_samples};"
                " start from its weights with --model instead."
            )
        return progress

    def restore(self, run) -> Progress:
        """Puts model, moving average, optimizer, loss scale and RNGs back as they were, and then the run's folder.

        Raises:
            UserError: a file of the checkpoint is missing or damaged; until then nothing on the disk has changed.
        """
        progress, accelerator = self.read_progress(run.train_loader.num_samples), run.accelerator
        own = [
            {name: value for name, value in group.items() if name != "params"} for group in run.optimizer.param_groups
        ]
        scaler, has_scale = accelerator.scaler, (self.folder / "scaler.pt").is_file()
        try:
            if not has_scale:  # written in another precision than fp16: the scale starts afresh
                accelerator.scaler = None
            accelerator.load_state(str(self.folder))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, EOFError, UnpicklingError) as error:
            raise UserError(f"--resume {self.folder} cannot be restored: {first_line(error)}") from None
        finally:
            accelerator.scaler = scaler
        # Micro-batches so far, by which Accelerate tells when a step is whole: as this launch divides the batch.
        accelerator.step = progress.total_updates * accelerator.gradient_accumulation_steps
        for group, settings in zip(run.optimizer.param_groups, own):  # this launch's momentum and decay
            group.update(settings)
        self.checkpoints.adopt(self.folder)
        return progress


def _link(source: str, target: str) -> None:
    """A second name for a file that is never changed in place, or a copy where the file system knows one name only."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
