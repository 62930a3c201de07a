"""Writing, keeping and reading the checkpoints of one run, and going on from them.

    checkpoints/update-00001250/
      config.json model.safetensors preprocessor_config.json   opens with from_pretrained
      recipe.yaml                     how it was trained
      progress.json                   epoch, position in the sample order, best figure, end of metrics.jsonl
      optimizer.safetensors average.safetensors random_{rank}.safetensors   see training/state.py
      data.parquet                    which images it was trained on, as a hard link where the file system has them
      best/                           the best model at that time, likewise
      manifest.json                   size and SHA-256 of all of these, written last

A checkpoint is written to a hidden sibling, flushed to the disk and renamed, so a folder that can be seen is whole; and
its manifest is checked before anything of it is loaded.
"""

import contextlib
import os
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

from ..cli import invocation
from ..data.listing import DataListing
from ..errors import UserError
from ..files import atomic_folder, atomic_write, link, link_tree, recover, remove
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..lock import is_held
from ..manifest import MANIFEST, problem
from ..quiet import no_progress_bars
from ..recipes import Recipe
from ..run_folder import RunFolder, made_by_a_run
from .original_run import OriginalRun
from .owner import Owner, on_main
from .progress import Progress
from .saved_run import SavedRun
from .state import READ, TrainingState


def precision_of_resumed(recipe: Recipe) -> str | None:
    """What the checkpoint that `--resume` means was trained in; None where there is none, or none that says it."""
    if not recipe.resume:
        return None
    named = RunFolder(recipe.output_dir if recipe.resume == "auto" else recipe.resume)
    for folder in [named.path] if named.progress.is_file() else reversed(named.all_checkpoints()):
        progress = RunFolder(folder).progress
        with contextlib.suppress(UserError):  # damaged, which `find` says better
            if problem(folder, only=(progress.name,)) is None:
                return Progress.read(progress).precision or None
    return None


class Checkpoints:
    """Writes, lists, prunes and reads the checkpoints of one run.

    Attributes:
        processor: saved beside every model; known once it is known what is resumed.
        state: what is saved and restored besides weights and progress; known once the run is built.
        listing: the images of the run, on the first process.
        notes: sentences about the folder for the console.
    """

    processor: EfficientNetNVImageProcessor
    state: TrainingState
    owner: Owner  # on the first process
    listing: DataListing | None = None

    def __init__(self, accelerator: Accelerator, recipe: Recipe):
        self.accelerator, self.recipe = accelerator, recipe
        self.run = RunFolder(recipe.output_dir)
        self.locked = False
        self.notes: list[str] = []

    def save(self, progress: Progress) -> Path:
        """Writes the state after the last optimizer step. A collective call."""
        target = self.run.checkpoint(progress.total_updates)
        processes = gather_object([self.state.random_state()])
        self.state.note(progress)

        def write() -> None:
            self.check_place()
            with atomic_folder(target, overwrite=True, ours=True) as folder, no_progress_bars():
                self.state.model.save_pretrained(folder)
                self.processor.save_pretrained(folder)
                self.state.write(folder, processes)
                RunFolder(folder).recipe.write_text(self.recipe.to_yaml(), encoding="utf-8")
                RunFolder(folder).progress.write_text(progress.to_json())
                if self.run.data.is_file():
                    link(self.run.data, folder / self.run.data.name)
                if self.run.best.is_dir():
                    link_tree(self.run.best, folder / self.run.best.name)
            for path in self.all()[: -self.recipe.keep_checkpoints]:
                remove(path)

        on_main(self.accelerator, write)
        return target

    def check_place(self) -> None:
        """Raises `UserError` where the folder is no longer the one that this run has locked: it was moved away, and
        another run's may stand in its place."""
        if self.locked and not is_held(self.run.lock):
            raise UserError(f"--output_dir {self.run.path} was moved or removed while the run was writing to it.")

    def all(self) -> list[Path]:
        """The checkpoints that there are, oldest first."""
        return self.run.all_checkpoints()

    def save_best(self, model) -> None:
        """Writes `best/`, the model that validates best so far."""
        if self.accelerator.is_main_process:
            self.check_place()
            with atomic_folder(self.run.best, overwrite=True, ours=True) as folder, no_progress_bars():
                model.save_pretrained(folder)
                self.processor.save_pretrained(folder)

    def publish(self, model) -> None:
        """Puts the best model, or `model` if nothing was validated, where `from_pretrained(output_dir)` finds it.

        Raises:
            UserError: the best model is no longer what was written.
        """
        if not self.accelerator.is_main_process:
            return
        self.check_place()
        if not self.run.best.is_dir():
            self.save_best(model)
        if damage := problem(self.run.best, read=READ):
            raise UserError(
                f"{self.run.best} is not published: {damage}. Go back to a checkpoint with --resume"
                f" {self.run.checkpoints}/update-…, each of which holds the best model of its time."
            )
        # The manifest comes last: killed in between, weights and configuration that do not belong together are noticed.
        sources = sorted(self.run.best.iterdir(), key=lambda path: (path.name == MANIFEST, path.name))
        self.owner.adds(*(path.name for path in sources), *self.run.published(self.recipe))
        for source in sources:
            with atomic_write(self.run.path / source.name, "wb") as file:
                file.write(source.read_bytes())

    def find(self) -> SavedRun | OriginalRun | None:
        """The run that `--resume` names; None for `auto` in a fresh folder, and where nothing is resumed.

        A collective call, after which nothing of a killed writer is left.

        Raises:
            UserError: there is no such run, or `output_dir` holds another one that nobody said may be removed.
        """
        original = OriginalRun.open(self.recipe)
        found = on_main(self.accelerator, lambda: self._look(original))
        return SavedRun(Path(found), self) if found is not None else original

    def _look(self, original: OriginalRun | None) -> str | None:
        """The checkpoint to go on from, after the folder was found to be ours and in order."""
        self.owner, self.locked = Owner(self.run, self.recipe), is_held(self.run.lock)
        self.owner.check()
        if self.owner.marked and self.run.checkpoints.is_dir():
            recover(self.run.checkpoints, RunFolder.is_in_checkpoints)
        self._finish_removal()
        found = None if original is not None or self.recipe.resume is None else self._find_saved(self.recipe.resume)
        if found is None:
            self._check_output_dir()
        return None if found is None else str(found)

    def _finish_removal(self) -> None:
        """Does what a killed run had begun: the folder is then as its user had asked for."""
        pending = self.owner.pending
        if pending.get("what") == "everything":
            with self.owner.during("everything"):
                self.owner.clear()
            self.notes.append("the removal of an earlier run, which was interrupted, is finished now")
        elif pending.get("what") == "later" and self.run.checkpoint_named(pending["name"]).is_dir():
            with self.owner.during("later", pending["name"]):
                self._go_back(self.run.checkpoint_named(pending["name"]))
            self.notes.append(f"the return to {pending['name']}, which was interrupted, is finished now")

    def _find_saved(self, resume: str) -> Path | None:
        importing = self.owner.pending.get("what") == "import"
        if resume == "auto" and importing:
            resume = self.owner.pending["name"]
            self.notes.append(f"going on from {resume} was interrupted, and begins again")
        elif resume == "auto":
            found = self._newest(self.run, "--resume auto")
            if found is not None and self.recipe.overwrite:
                self.notes.append("nothing is removed: --overwrite counts only where --resume auto finds no run")
            return found
        path = Path(resume)
        if path.is_file():
            raise UserError(
                f"--resume {resume} is a file; a checkpoint of NVIDIA's scripts goes on after"
                f" {invocation('convert')} {resume} --output_dir DIR with --resume DIR."
            )
        if RunFolder(path).progress.is_file():
            if damage := _damage(path):
                raise UserError(f"--resume {resume} is damaged: {damage}; name another checkpoint, or --resume auto.")
        else:
            nested = self._newest(RunFolder(path), f"--resume {resume}")
            if nested is None:
                raise UserError(
                    f"--resume {resume}: no checkpoint there; name a folder like {self.run.checkpoint(1250)}."
                )
            path = nested
        if (own := self._own(path)) is not None:
            return own
        if self.run.metrics.exists() and not self.recipe.overwrite and not importing:
            raise UserError(
                f"--output_dir {self.run.path} already holds another run than --resume {resume}; go on with it by"
                " --resume auto, start afresh with --overwrite, or name another folder."
            )
        return path.resolve()

    def _newest(self, run: RunFolder, flag: str) -> Path | None:
        """The newest whole checkpoint of a run; None where it has none at all."""
        damaged: list[str] = []
        for path in reversed(run.all_checkpoints()):
            damage = _damage(path)
            if damage is None:
                self.notes += [f"{found}; going on from {path.name}" for found in damaged]
                return path
            damaged.append(f"{path} is damaged: {damage}")
        if damaged:
            raise UserError(f"{flag}: no checkpoint is whole. {'. '.join(damaged)}.")
        return None

    def _has_trained(self) -> bool:
        """Whether a run got as far as its first step; one that its data stopped before leaves nothing to keep."""
        if self.run.all_checkpoints() or self.run.summary.exists() or not self.run.metrics.is_file():
            return True
        with open(self.run.metrics, encoding="utf-8", errors="replace") as lines:
            return any('"type": "run"' not in line for line in lines)

    def _check_output_dir(self) -> None:
        """Refuses to mix two runs in one folder, and to remove what nobody said may be removed."""
        recipe, folder = self.recipe, self.run.path
        self._keep_sources()
        if recipe.overwrite:
            return
        if recipe.resume == "auto":
            if self.run.summary.exists():
                raise UserError(
                    f"--resume auto: {folder} holds a finished run without a checkpoint to go on from;"
                    " start afresh with --overwrite, or name another folder."
                )
        elif self.run.metrics.exists() and self._has_trained():
            raise UserError(
                f"--output_dir {folder} already holds a run; continue it with --resume auto,"
                " start afresh with --overwrite, or name another folder."
            )

    def _keep_sources(self) -> None:
        """Refuses to remove what the run starts from, when it begins afresh in a folder that holds it."""
        sources = {"model": self.recipe.model, "teacher": self.recipe.teacher, "resume": self.recipe.resume}
        for flag, source in sources.items():
            if source and (flag, source) != ("resume", "auto") and self.owner.has_made(Path(source)):
                raise UserError(f"a fresh start would remove --{flag} {source}; name another --output_dir.")

    def _own(self, path: Path) -> Path | None:
        """A checkpoint of this run by its own name, whatever link to it (or it itself as a link) was named."""
        for place in (Path(os.path.abspath(path)), path.resolve()):
            if RunFolder.is_checkpoint(place.name) and place.parent.resolve() == self.run.checkpoints.resolve():
                return self.run.checkpoints / place.name
        return None

    def begin(self) -> None:
        """Marks the folder, and removes an earlier run from it. A collective call."""
        on_main(self.accelerator, self._begin)

    def _begin(self) -> None:
        self.check_place()
        self.owner.claim()
        if self.owner.made:
            with self.owner.during("everything"):
                self.owner.clear()
        self.owner.adds(*self.run.written_while_running(self.recipe))

    def note_data(self) -> None:
        """Writes down which images the run sees, so that a resumed one notices others. For the first process."""
        if self.listing is not None:
            self.run.checkpoints.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.run.data, "wb") as file:
                self.listing.write(file)

    def adopt(self, path: Path, progress: Progress) -> None:
        """Makes this folder what the run's was when checkpoint `path` was written: no later checkpoints, the best model
        of that time, and (from another run's folder) its log and files of figures. For the first process."""
        self.check_place()
        own = self._own(path)
        if own is not None:
            with self.owner.during("later", own.name):
                self._go_back(own)
            return
        self.owner.claim()
        with self.owner.during("import", str(path)):
            self.owner.adds(self.run.checkpoints.name)
            with atomic_folder(self.run.incoming, overwrite=True, ours=True) as folder:
                link_tree(path, folder)
            self.owner.clear()  # now that the other checkpoint is here
            self.owner.adds(*self.run.written_while_running(self.recipe))
            if path.parent.name == self.run.checkpoints.name and made_by_a_run(path.parents[1]):
                theirs = RunFolder(path.parents[1])
                for source, target in (
                    (theirs.metrics, self.run.metrics),
                    (theirs.quantization, self.run.quantization),
                ):
                    if source.is_file():
                        with atomic_write(target, "wb") as file:
                            file.write(source.read_bytes())
            own = self.run.checkpoint(progress.total_updates)
            os.rename(self.run.incoming, own)
            self._go_back(own)

    def _go_back(self, path: Path) -> None:
        checkpoints = self.all()
        for later in reversed(checkpoints[checkpoints.index(path) + 1 :]):
            remove(later)
        best = path / self.run.best.name
        if best.is_dir():
            with atomic_folder(self.run.best, overwrite=True, ours=True) as folder:
                link_tree(best, folder)
        else:
            remove(self.run.best)


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as the end of a sentence; None if nothing is."""
    own = RunFolder(path)
    needed = (own.config, own.weights, own.processor, own.recipe, own.progress)
    missing = (f"{file.name} is missing" for file in needed if not file.is_file())
    return problem(path, read=READ) or next(missing, None)
