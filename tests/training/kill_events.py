"""Kills a command at one file-system event after another, lets its user go on, and looks at what is there.

An event is what changes names or contents on the disk: a file opened for writing, a rename, a removal, a new folder, a
hard link, a change of mode, an `fsync`, two paths that change places. The kill comes just before it happens.
"""

import os
import shutil
import signal
import sys
import traceback
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effnet_hf import files
from effnet_hf.errors import UserError
from effnet_hf.manifest import MANIFEST, problem


try:
    from .workbench import fingerprint, run, small_recipe, write_squares, write_tiny
except ImportError:  # from kill_and_resume.py, which is a script
    from workbench import fingerprint, run, small_recipe, write_squares, write_tiny  # type: ignore[no-redef]


_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_EVENTS = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}
REFUSED = 2


@dataclass
class Scenario:
    """One command that is killed.

    Attributes:
        prepare: makes what is there before, in an empty folder.
        act: the command.
        go_on: what its user runs after the kill; in most cases with `--resume auto`.
        state: what is there afterwards, in a form that can be compared.
        whole: looks at the folder before anybody goes on; raises where a reader would meet something broken.
    """

    name: str
    prepare: Callable[[Path], None]
    act: Callable[[Path], object]
    go_on: Callable[[Path], object]
    state: Callable[[Path], object]
    whole: Callable[[Path], None] = lambda folder: None

    def run(self, scratch: Path, every: int = 1, shares: tuple[float, ...] = ()) -> "Result":
        """Kills at every n-th event, or where `shares` of them have happened, each time from the same beginning."""
        template, folder = scratch / "template", scratch / "folder"
        template.mkdir(parents=True)
        in_child(lambda: self.prepare(template))
        before = self.state(template)
        _copy(template, folder)
        events = in_child(lambda: self.act(folder), root=folder, told=scratch / "events")[1]
        after, wrong, kills = self.state(folder), [], 0
        for event in [max(int(share * events), 1) for share in shares] or range(1, events + 1, every):
            _copy(template, folder)
            if in_child(lambda: self.act(folder), root=folder, kill_at=event)[0] is not None:
                continue  # it ended before: not every life writes as often
            kills += 1
            try:
                self.whole(folder)
                code = in_child(lambda: self.go_on(folder))[0]
                found, left = self.state(folder), hidden(folder)
                if found != after and not (found == before and code in (0, REFUSED)):
                    wrong.append(f"event {event}: neither what was there before nor what was asked for (exit {code})")
                elif found == after and code != 0 and before != after:
                    wrong.append(f"event {event}: exit {code}")
                elif left and code == 0:
                    wrong.append(f"event {event}: left behind {', '.join(left)}")
            except Exception as error:
                wrong.append(f"event {event}: {type(error).__name__}: {error}")
        return Result(self.name, events, kills, wrong)


@dataclass
class Result:
    name: str
    events: int
    kills: int
    wrong: list[str]


def in_child(
    function: Callable[[], object], root: Path | None = None, kill_at: int = 0, told: Path | None = None
) -> tuple[int | None, int]:
    """Runs it in a forked child, so that the libraries are imported once.

    Returns:
        Its exit code (`REFUSED` for a `UserError`, None where it was killed), and how many events it came to.
    """
    pid = os.fork()
    if pid == 0:
        code, count = 70, [0]
        try:
            sys.stdout = open(os.devnull, "w")
            if root is not None:
                _watch(root, count, kill_at)
            code = int(function() or 0)  # type: ignore[call-overload]
        except UserError:
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        finally:
            if told is not None:
                told.write_text(str(count[0]))
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code, int(told.read_text()) if told is not None else 0


def _watch(root: Path, count: list[int], kill_at: int) -> None:
    """Counts the events of this process below `root` from here on, and kills it before one of them."""
    inside, within = os.path.realpath(root) + os.sep, os.getpid()

    def concerns(path: object) -> bool:
        if isinstance(path, int):
            path = os.readlink(f"/proc/self/fd/{path}")
        return isinstance(path, (str, os.PathLike)) and os.path.abspath(path).startswith(inside)

    def happens(path: object) -> None:
        if os.getpid() == within and concerns(path):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(within, signal.SIGKILL)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            path, mode, flags = arguments
            if (flags or 0) & _WRITING or isinstance(mode, str) and set(mode) & set("wax+"):
                happens(path)
        elif event in _EVENTS:
            happens(arguments[0])

    fsync, exchange = os.fsync, files.exchange
    os.fsync = lambda descriptor: (happens(descriptor), fsync(descriptor))[1]  # type: ignore[assignment]
    files.exchange = lambda one, other: (happens(one), exchange(one, other), happens(one))[1]  # type: ignore
    sys.addaudithook(hook)


def hidden(folder: Path) -> list[str]:
    """What writers left under hidden names."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob(".*")
        if path.suffix in (".tmp", ".old", ".gone", ".lock") or path.name == ".lock"
    )


def _copy(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def scenarios(scratch: Path, names: list[str] | None = None) -> list[Scenario]:
    """All of them, or those that are named; what they start from is written to `scratch`."""
    from effnet_hf.conversion import load_foreign, write_folder
    from effnet_hf.export import export_model

    data, tiny = write_squares(scratch / "data", per_class=4, validation=2), write_tiny(scratch / "tiny")
    new = write_tiny(scratch / "new", seed=1)
    settings = {
        "model": str(tiny), "image_size": None, "resize_margin": None, "epochs": 2, "global_batch_size": 12,
        "per_device_batch_size": 6, "checkpoint_every_steps": 1, "warmup_epochs": 0,
    }  # fmt: skip
    quantize = {"placement": "nvidia", "calibration_batches": 1, "mixup": 0.0}

    def train(**changes) -> Callable[[Path], int]:
        return lambda folder: run(small_recipe(data, folder / "run", **{**settings, **changes}))

    def go_back(folder: Path) -> int:
        return train(resume=str(folder / "run/checkpoints/update-00000001"), **several, **other)(folder)

    def elsewhere(folder: Path) -> None:
        run(small_recipe(data, folder / "other", **settings, run_epochs=1))

    def import_it(folder: Path) -> int:
        return train(resume=str(folder / "other/checkpoints/update-00000001"))(folder)

    def import_again(folder: Path) -> int:
        """What the refusal says: once the other checkpoint is here, the run is gone on with as any other."""
        try:
            return import_it(folder)
        except UserError as error:
            if "go on with it by --resume auto" not in str(error):
                raise
        return train(resume="auto")(folder)

    def trained(folder: Path) -> object:
        return fingerprint(folder / "run") if (folder / "run/checkpoints").is_dir() else None

    def convert(source: Path) -> Callable[[Path], None]:
        return lambda folder: write_folder(load_foreign(source), folder / "out", overwrite=True)

    def export(source: Path) -> Callable[[Path], None]:
        def act(folder: Path) -> None:
            export_model(source, folder / "out", overwrite=True, num_images=2)

        return act

    def written(folder: Path) -> dict[str, int]:
        files = sorted(path for path in (folder / "out").iterdir() if path.name not in ("README.md", MANIFEST))
        return {path.name: zlib.crc32(path.read_bytes()) for path in files}

    def whole(folder: Path) -> None:
        if damage := problem(folder / "out"):
            raise AssertionError(f"{folder / 'out'}: {damage}")

    other, several = {"learning_rate": 0.01}, {"keep_checkpoints": 9}
    found = [
        Scenario("train", lambda folder: None, train(), train(resume="auto"), trained),
        Scenario("train --resume auto", train(run_epochs=1), train(resume="auto"), train(resume="auto"), trained),
        Scenario("train --resume OLDER", train(**several), go_back, train(resume="auto", **several, **other), trained),
        Scenario("train --resume ELSEWHERE", elsewhere, import_it, import_again, trained),
        Scenario("train --overwrite", train(), train(overwrite=True, **other), train(resume="auto", **other), trained),
        Scenario("qat", lambda folder: None, train(**quantize), train(resume="auto", **quantize), trained),
        Scenario("convert --overwrite", convert(tiny), convert(new), convert(new), written, whole),
        Scenario("export --overwrite", export(tiny), export(new), export(new), written, whole),
    ]
    return [scenario for scenario in found if names is None or scenario.name in names]
