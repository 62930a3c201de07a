"""What a run's folder looks like; nothing else knows.

    output_dir/
      config.json model.safetensors preprocessor_config.json README.md   the best model, opens with from_pretrained
      recipe.yaml metrics.jsonl summary.json plots/
      checkpoints/update-00001250/      the same files plus what resuming needs:
        optimizer.bin scaler.pt         optimizer and fp16 loss scale
        random_states_{rank}.pkl        RNGs of every process
        custom_checkpoint_0.pkl         moving average of the weights
        progress.json                   epoch, position in the sample order, best figure, end of metrics.jsonl
        best/                           the best model at that time, as hard links where the file system has them
      checkpoints/best/                 the best model so far

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

from ..errors import UserError, first_line
from ..files import atomic_folder, atomic_write, recover
from ..quiet import no_progress_bars
from ..recipes import Recipe


# What a run leaves besides recipe.yaml and checkpoints/; removed when another one starts in its folder.
LEFT_BY_A_RUN = (
    "metrics.jsonl", "summary.json", "plots", "logs", "profile", "bad_files.txt",
    "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "ema",
    "quantization.json", "sensitivity.json", "sensitivity.png",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands. `epoch` and `update` name the next optimizer step; a position is exact for any rank count."""

    epoch: int = 0
    update: int = 0
    total_updates: int = 0
    loss_sum: float = 0.0
    loss_count: int = 0
    logged: tuple[float, int] = (0.0, 0)  # loss_sum and loss_count of the last line of metrics
    best_top1: float = -1.0
    best_topk: float = 0.0
    best_loss: float = 0.0
    best_epoch: int = -1
    best_is_ema: bool = False
    num_validated: int = 0
    epochs_since_best: int = 0
    seconds: float = 0.0
    metrics_bytes: int = 0
    num_samples: int = 0
    num_processes: int = 1
    per_device: int = 0  # pictures; 0 in checkpoints that do not say
    precision: str = ""

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.update = epoch, 0
        self.loss_sum, self.loss_count, self.logged = 0.0, 0, (0.0, 0)


def whole_checkpoints(folder: Path) -> list[Path]:
    """Those in a run's `checkpoints/`, oldest first."""
    return sorted(path for path in folder.glob("update-*") if (path / "progress.json").is_file())


def precision_of_resumed(recipe: Recipe) -> str | None:
    """What the checkpoint that `--resume` means was trained in; None where there is none, or none that says it."""
    if not recipe.resume:
        return None
    named = Path(recipe.output_dir) if recipe.resume == "auto" else Path(recipe.resume)
    found = [named] if (named / "progress.json").is_file() else whole_checkpoints(named / "checkpoints")
    with contextlib.suppress(OSError, ValueError, AttributeError, IndexError):  # damaged, which `restore` says better
        precision = json.loads((found[-1] / "progress.json").read_text()).get("precision")
        if precision:
            return precision
        # An earlier version's checkpoint; its run's log says it.
        lines = (found[-1].resolve().parents[1] / "metrics.jsonl").read_text().splitlines()
        starts = [row for row in map(json.loads, lines) if row.get("type") == "run"]
        return starts[-1].get("precision")
    return None


class Checkpoints:
    """Writes, lists, prunes and reads the checkpoints of one run."""

    def __init__(self, accelerator: Accelerator, recipe: Recipe, processor):
        self.accelerator, self.recipe, self.processor = accelerator, recipe, processor
        self.folder = Path(recipe.output_dir, "checkpoints")
        accelerator.register_save_state_pre_hook(self._save_weights)
        accelerator.register_load_state_pre_hook(self._load_weights)

    def save(self, progress: Progress) -> Path:
        """Writes the state after the last optimizer step. A collective call."""
        target = self.folder / f"update-{progress.total_updates:08d}"
        with self._staged(target) as folder:
            self.accelerator.save_state(str(folder))
            if self.accelerator.is_main_process:
                self.processor.save_pretrained(folder)
                (folder / "recipe.yaml").write_text(self.recipe.to_yaml(), encoding="utf-8")
                (folder / "progress.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1))
                if (self.folder / "best").is_dir():
                    shutil.copytree(self.folder / "best", folder / "best", copy_function=_link)
        if self.accelerator.is_main_process:
            for path in self.all()[: -self.recipe.keep_checkpoints]:
                shutil.rmtree(path)
        return target

    def all(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return whole_checkpoints(self.folder)

    def save_best(self, model) -> None:
        """Writes `best/`, the model that validates best so far."""
        if self.accelerator.is_main_process:
            with atomic_folder(self.folder / "best", overwrite=True) as folder, no_progress_bars():
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)

    def publish(self, model) -> None:
        """Puts the best model, or `model` if nothing was validated, where `from_pretrained(output_dir)` finds it."""
        if not self.accelerator.is_main_process:
            return
        if not (self.folder / "best").is_dir():
            self.save_best(model)
        for source in sorted((self.folder / "best").iterdir()):
            with atomic_write(self.folder.parent / source.name, "wb") as file:
                file.write(source.read_bytes())

    def find(self, resume: str | None) -> Path | None:
        """The checkpoint that `--resume` names; None for `auto` in a fresh folder.

        Raises:
            UserError: there is no such checkpoint.
        """
        if resume is None:
            return None
        if resume == "auto":
            return self.all()[-1] if self.all() else None
        path = Path(resume)
        if path.is_file():
            raise UserError(
                f"--resume {resume} is a file; a checkpoint of NVIDIA's scripts goes on after"
                f" python convert.py {resume} --to DIR with --resume DIR."
            )
        if not (path / "progress.json").is_file():
            nested = whole_checkpoints(path / "checkpoints")
            if not nested:
                raise UserError(
                    f"--resume {resume}: no checkpoint there; name a folder like {self.folder}/update-00001250."
                )
            path = nested[-1]
        output_dir = self.folder.parent
        if self._is_elsewhere(path) and (output_dir / "metrics.jsonl").exists() and not self.recipe.overwrite:
            raise UserError(
                f"--output_dir {output_dir} already holds another run than --resume {resume};"
                " start afresh with --overwrite true, or name another folder."
            )
        return path

    def _is_elsewhere(self, path: Path) -> bool:
        return path.resolve().parent != self.folder.resolve()

    def adopt(self, path: Path) -> None:
        """Makes this folder what the run's was when checkpoint `path` was written: no later checkpoints, the best model
        of that time, and (from another run's folder) its log and files of figures. A collective call."""
        if self.accelerator.is_main_process:
            if self._is_elsewhere(path):
                self._remove_earlier_run()
                for name in ("metrics.jsonl", "quantization.json"):
                    source = path.resolve().parents[1] / name
                    if source.is_file():
                        with atomic_write(self.folder.parent / name, "wb") as file:
                            file.write(source.read_bytes())
            for later in reversed(self.all()):  # the newest first: killed in between, the rest is still a history
                if later.name > path.name:
                    shutil.rmtree(later)
            if (path / "best").is_dir():
                with atomic_folder(self.folder / "best", overwrite=True) as folder:
                    shutil.copytree(path / "best", folder, dirs_exist_ok=True, copy_function=_link)
            else:
                shutil.rmtree(self.folder / "best", ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def read_progress(self, path: Path, num_samples: int) -> Progress:
        """Where a checkpoint stands.

        Raises:
            UserError: it is unreadable, or its position means another sample in this run.
        """
        from ..recipes import load_recipe

        try:
            progress = Progress(**json.loads((path / "progress.json").read_text()))
            then = load_recipe(str(path / "recipe.yaml"))
        except (OSError, TypeError, ValueError) as error:
            raise UserError(f"--resume {path} is not a checkpoint of this version: {error}") from None
        fixed = ("seed", "global_batch_size", "variant", "optimizer", "topk")
        for name in (*fixed, "placement", "qat_batch_norm", "float_layers"):
            old, new = getattr(then, name), getattr(self.recipe, name)
            if old != new:
                raise UserError(
                    f"--resume {path} was trained with --{name} {old}, not {new};"
                    " resume with its value, or start from its weights with --model."
                )
        if progress.num_samples != num_samples:
            raise UserError(
                f"--resume {path} was trained on {progress.num_samples} pictures, the data now has {num_samples};"
                " start from its weights with --model instead."
            )
        return progress

    def restore(self, path: Path, progress: Progress) -> None:
        """Puts model, moving average, optimizer, loss scale and RNGs back as they were.

        Raises:
            UserError: a file of the checkpoint is missing or damaged.
        """
        scaler, has_scale = self.accelerator.scaler, (path / "scaler.pt").is_file()
        try:
            if not has_scale:  # written in another precision than fp16: the scale starts afresh
                self.accelerator.scaler = None
            self.accelerator.load_state(str(path))
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, EOFError, UnpicklingError) as error:
            raise UserError(f"--resume {path} cannot be restored: {first_line(error)}") from None
        finally:
            self.accelerator.scaler = scaler
        # Micro-batches so far, by which Accelerate tells when a step is whole: as this launch divides the batch.
        self.accelerator.step = progress.total_updates * self.accelerator.gradient_accumulation_steps

    def recover(self) -> None:
        """Undoes what a killed writer left behind. A collective call."""
        if self.accelerator.is_main_process and self.folder.is_dir():
            recover(self.folder)
        self.accelerator.wait_for_everyone()

    def clear(self) -> None:
        """Removes an earlier run from the folder, its published model too. A collective call."""
        if self.accelerator.is_main_process:
            self._remove_earlier_run()
        self.accelerator.wait_for_everyone()

    def _remove_earlier_run(self) -> None:
        if (self.folder.parent / "metrics.jsonl").exists():
            for path in map(self.folder.parent.joinpath, LEFT_BY_A_RUN):
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        if self.folder.is_dir():
            for path in self.folder.iterdir():  # not the folder itself, which may be a link to another disk
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
            name = [None]
            broadcast_object_list(name)
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


def _link(source: str, target: str) -> None:
    """A second name for a file that is never changed in place, or a copy where the file system knows one name only."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
