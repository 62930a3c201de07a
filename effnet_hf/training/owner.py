"""Whose an output folder is: one run at a time, which changes and removes only what runs of ours made.

The mark (`.effnet_hf.json`) is the first file that a run writes. It lists the names that runs made in the folder, and a
removal that has begun: killed in between, the next start finishes it before it does anything else.
"""

import contextlib
import errno
import json
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ..drawn import is_ours
from ..errors import UserError, printable
from ..files import atomic_write, lock_beside, make_folders, meant, recover, remove, writing
from ..lock import held
from ..manifest import MANIFEST, foreign_file, problem, read_manifest
from ..reading import read_json
from ..recipes import Recipe
from ..run_folder import RunFolder


# Besides hidden files and what a benchmark or --lr_find wrote, what may lie in a folder before its first run: its log.
_BEFORE_A_RUN = (".log", ".out", ".err")
T = TypeVar("T")
log = logging.getLogger(__name__)


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """What `function` returns on the first process, on all of them; its `UserError` too. A collective call."""
    result: list = [None, None]
    if accelerator.is_main_process:
        try:
            result[0] = function()
        except UserError as error:
            result[1] = str(error)
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


@contextlib.contextmanager
def only_run(accelerator: Accelerator, output_dir: str) -> Iterator[None]:
    """Locks the folder for one run's life, creating it; one that is still empty afterwards is removed again. A
    collective call.

    Raises:
        UserError: another process uses it, or it cannot be written.
    """
    path, stack = Path(output_dir), contextlib.ExitStack()

    def lock() -> None:
        with writing(path):
            if blocking := next(
                (place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None
            ):
                raise UserError(f"--output_dir {path}: {blocking} is a file; name a folder.")
            missing = [folder for folder in (path, *path.parents) if not folder.exists()]
            make_folders(missing)
            stack.callback(_remove_empty, missing)
            run, what = RunFolder(path), f"--output_dir {path}"
            beside = lock_beside(Path(os.path.realpath(path)))
            try:
                stack.enter_context(held(beside, what))
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):  # nobody can replace the folder there
                    raise
            stack.enter_context(held(run.lock, what))
            if run.checkpoints.is_symlink() and run.checkpoints.is_dir():  # another run may have a link to it
                stack.enter_context(held(run.checkpoints / run.lock.name, f"{run.checkpoints}"))

    with stack:
        on_main(accelerator, lock)
        yield


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


class Owner:
    """The mark of one run's folder. For the first process, while [`only_run`] holds."""

    def __init__(self, run: RunFolder, recipe: Recipe):
        self.run = run
        self.needed = {*run.written_while_running(recipe), *run.published(recipe)}
        self.made: set[str] = set()
        self.pending: dict[str, str] = {}
        self.marked = run.mark.is_file()
        if self.marked:
            self._read()

    def _read(self) -> None:
        try:
            content = read_json(self.run.mark)
            made, pending = content["made"], content["pending"]
            if not all(isinstance(name, str) and RunFolder.is_a_runs_name(name) for name in made):
                raise ValueError("made")
            if pending != {} and not _is_pending(**pending):
                raise ValueError("pending")
        except (UserError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.run.mark}, which says what runs made in this folder, is damaged; name another --output_dir."
            ) from None
        self.made, self.pending = set(made), pending

    def check(self) -> None:
        """Clears away what a killed run left half-written, and refuses what is not ours.

        Raises:
            UserError: the folder holds what no run made, where a run would have to write.
        """
        if not self.run.path.is_dir():
            return
        recover(self.run.path, lambda name: name == self.run.mark.name)
        if self.run.checkpoints.is_symlink() and not self.run.checkpoints.is_dir():
            raise UserError(f"{self.run.checkpoints} is a link to a folder that is not there; is its disk mounted?")
        if self.marked:
            recover(self.run.path, RunFolder.is_a_runs_name)
            for folder in (self.run.plots, self.run.report):
                recover(folder, lambda name: True)
            # A name that runs have never used here is somebody else's, if it is taken.
            foreign = sorted(name for name in self.needed - self.made if os.path.lexists(self.run.path / name))
            if foreign == [self.run.checkpoints.name] and _is_empty(self.run.checkpoints):
                foreign = []
        else:
            foreign = [path.name for path in sorted(self.run.path.iterdir()) if not _may_lie_there(self.run, path)]
        if foreign:
            more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
            raise UserError(
                f"--output_dir {self.run.path} holds {printable(foreign[0])}{more}, which no run of this version made;"
                " move that away, or name another folder (hidden files and *.log, *.out, *.err may lie there)."
            )

    def claim(self) -> None:
        """Marks the folder as a run's, before anything else is written."""
        if not self.marked:
            self.marked = True
            self._write()

    def adds(self, *names: str) -> None:
        """Notes names before they are written for the first time; what somebody else has put there meanwhile is moved
        aside."""
        for name in sorted(set(names) - self.made):
            path = self.run.path / name
            if os.path.lexists(path) and not (name == self.run.checkpoints.name and path.is_dir()):
                log.warning("%s was not written by this run; it is %s now", path, _aside(path).name)
        if not self.made.issuperset(names):
            self.made.update(names)
            self._write()

    def has_made(self, path: Path) -> bool:
        """Whether a path is, or lies in, what runs made here."""
        place, folder, checkpoints = (
            Path(os.path.realpath(each)) for each in (path, self.run.path, self.run.checkpoints)
        )
        if place.is_relative_to(checkpoints):  # perhaps a link to another disk
            return self.run.checkpoints.name in self.made
        return place.is_relative_to(folder) and (place == folder or place.relative_to(folder).parts[0] in self.made)

    @contextlib.contextmanager
    def during(self, what: str, name: str = "") -> Iterator[None]:
        """Notes a removal or an import while the body does it."""
        self.pending = {"what": what, "name": name}
        self._write()
        yield
        self.pending = {}
        self._write()

    def clear(self) -> None:
        """Removes all that runs made, the published model too, and nothing else; but for a checkpoint that is on its
        way here."""
        checkpoints = self.run.checkpoints
        kept = self.run.incoming.name if self.pending.get("what") == "import" else None
        if checkpoints.name in self.made and checkpoints.is_dir():
            for path in checkpoints.iterdir():  # not the folder itself, which may be a link to another disk
                if RunFolder.is_in_checkpoints(meant(path.name)) and path.name != kept:
                    remove(path)
        theirs = set()
        for name in sorted(self.made - {checkpoints.name}):
            path = self.run.path / name
            if path == self.run.plots:
                _remove_plots(path)
            elif path in (self.run.report, self.run.ema, self.run.profile):
                _remove_written(path)
            else:
                remove(path)
            if os.path.lexists(path):  # for what somebody put into it
                theirs.add(name)
        self.made &= {checkpoints.name, *theirs}

    def _write(self) -> None:
        content = {"effnet_hf": 1, "made": sorted(self.made), "pending": self.pending}
        with atomic_write(self.run.mark) as file:
            file.write(json.dumps(content, indent=1) + "\n")


def set_aside(folder: Path) -> None:
    """Keeps a folder of a run that is about to be replaced, where somebody has put a file into it."""
    if folder.is_dir() and not folder.is_symlink() and (theirs := foreign_file(folder)):
        aside = _aside(folder)
        log.warning("%s holds %s, which no run wrote; it is %s now", folder, printable(theirs), aside.name)


def _aside(path: Path) -> Path:
    """Renames it; where it is now."""
    aside = path.with_name(f"{path.name}.before-{secrets.token_hex(4)}")
    os.rename(path, aside)
    return aside


def _remove_plots(folder: Path) -> None:
    """Where somebody has put a file beside them, only the drawings."""
    if folder.is_dir() and not folder.is_symlink():
        for path in folder.iterdir():
            if is_ours(path):
                remove(path)
    if folder.is_symlink() or _is_empty(folder):
        remove(folder)


def _remove_written(folder: Path) -> None:
    """Where somebody has put a file beside it, or marks into it, only what is still as it was written."""
    if folder.is_symlink() or foreign_file(folder, edited=True) is None:
        remove(folder)
        return
    names: list[str] = []
    with contextlib.suppress(UserError):  # it has no manifest any more
        names = list(read_manifest(folder))
    for name in names:
        if problem(folder, only=(name,)) is None:
            remove(folder / name)
    remove(folder / MANIFEST)


def _is_pending(what: object, name: object) -> bool:
    """Whether a note is one that [`Owner.during`] writes."""
    if not isinstance(name, str) or "\0" in name:
        return False
    return what == "everything" or what == "import" and bool(name) or what == "later" and RunFolder.is_checkpoint(name)


def _may_lie_there(run: RunFolder, path: Path) -> bool:
    if path.name == run.checkpoints.name:  # perhaps a link to another disk
        return _is_empty(path)
    if path.name == "lost+found" and os.path.ismount(run.path):  # a file system's own
        return True
    own = (run.benchmark, run.rate_test, run.rate_curve)
    return path.name.startswith(".") or path.suffix in _BEFORE_A_RUN or path in own


def _is_empty(folder: Path) -> bool:
    """But for hidden files: a lock, or what a disk keeps for itself."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())
