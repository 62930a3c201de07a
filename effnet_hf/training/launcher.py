"""What a launcher was told about precision and restarts, and whether it and the other processes still live.

Accelerate hands every script `ACCELERATE_MIXED_PRECISION=no`, whether somebody asked for single precision or nobody
said anything. The two want different things here, so the launcher's own command line and configuration file are read.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

import psutil
import yaml

from ..errors import UserError, first_line


# A configuration file of Accelerate knows no TF32 and refuses keys of others, so ours say it in a comment.
MARKER = re.compile(r"^#\s*effnet_hf precision:\s*(\w+)\s*$", re.MULTILINE)


def launcher_precision() -> tuple[str | None, str]:
    """`fp32`, `tf32`, `fp16` or `bf16`, and who said so; None where nobody chose.

    Raises:
        UserError: fp8, which nothing here is trained in, a marker with another word, or a file that cannot be read.
    """
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "").lower()
    if not said:
        return None, ""
    if said != "no":
        if said not in ("fp16", "bf16"):
            raise UserError(f"accelerate launch asks for --mixed_precision {said}; here there are fp16, bf16 and no.")
        return said, "as `accelerate launch` says"
    words, folder = _launcher()
    if words is None:
        return "fp32", "as ACCELERATE_MIXED_PRECISION=no says"
    if _value(words, "mixed_precision") is not None:
        return "fp32", "as `accelerate launch --mixed_precision no` says"
    named = _value(words, "config_file")
    file = folder / named if named else _default_file()
    if file is None or not file.is_file():
        return None, ""
    try:
        text = file.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark
        settings = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{file} is no configuration file of Accelerate: {first_line(error)}") from None
    if marker := MARKER.search(text):
        if marker[1] not in ("fp32", "tf32", "fp16", "bf16"):
            raise UserError(f"{file}: there is no precision {marker[1]}; there are fp32, tf32, fp16 and bf16.")
        return marker[1], f"as {file.name} says"
    if isinstance(settings, dict) and settings.get("mixed_precision") is not None:
        return "fp32", f"as {file.name} says"
    return None, ""


def _launcher() -> tuple[list[str] | None, Path]:
    """The flags of the `accelerate launch` that started this process, and its working folder; None if none did."""
    try:
        for parent in psutil.Process().parents():
            words = parent.cmdline()
            start = next((i + 1 for i in range(len(words)) if _is_launcher(words[: i + 1])), None)
            if start is not None:
                flags = words[start:]
                end = next((i for i, flag in enumerate(flags) if flag.endswith(".py") or flag == "-m"), len(flags))
                return flags[:end], Path(parent.cwd())
    except psutil.Error:  # a process that ended, or belongs to somebody else
        pass
    return None, Path()


def _is_launcher(words: list[str]) -> bool:
    """Whether a command line begun like this has just named Accelerate's launcher."""
    name = os.path.basename(words[-1])
    if name == "launch":
        command = os.path.basename(words[-2]) if len(words) > 1 else ""
        return command in ("accelerate", "accelerate.commands.accelerate_cli", "accelerate_cli.py")
    return name in ("accelerate-launch", "accelerate.commands.launch") or Path(words[-1]).parts[-3:] == (
        "accelerate",
        "commands",
        "launch.py",
    )


def _value(words: list[str], name: str) -> str | None:
    """What follows `--name`, in either spelling."""
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag.lstrip("-").replace("-", "_") == name and flag.startswith("--"):
            return value or next(iter(words[i + 1 :]), None)
    return None


def _default_file() -> Path | None:
    """Where `accelerate config` writes, if it was ever run."""
    from accelerate.commands.config.config_args import default_config_file

    path = Path(default_config_file)
    return path if path.is_file() else None


# How gloo, NCCL, and the store through which processes meet say that another one is gone.
_GONE = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|remote process exited|ncclRemoteError|timed? ?out"
    r"|wait timeout|pair closure|communicator was aborted|failed to recv|monitoredBarrier|store->get\("
    r"|connectFullMesh failed|socket.* closed",
    re.I,
)


@contextlib.contextmanager
def with_others() -> Iterator[None]:
    """Around what several processes do together: says that one of them is gone.

    Raises:
        UserError: so it is, instead of the traceback of whichever library noticed.
    """
    try:
        yield
    except RuntimeError as error:  # torch's own kinds, such as `DistBackendError`, are some
        if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not _GONE.search(str(error)):
            raise
        reason = re.sub(r"^\[\S+\] ", "", first_line(error)).partition(". ")[0].rstrip(".")
        done, most = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
        next_step = "Start all of them again; a training goes on with --resume auto."
        if done < most:
            next_step = f"The launcher starts all of them again ({done + 1} of {most} restarts)."
        raise UserError(
            f"another process of this run has ended, or answers no more ({reason}); its own line, or the launcher's,"
            f" says why. {next_step}"
        ) from error


def refuse_restarts(resume: str | None) -> None:
    """Raises `UserError` for a training that its launcher will start again by a command that does not go on with it."""
    if resume == "auto":
        return
    words: list[str] = []
    with contextlib.suppress(psutil.Error):
        words = psutil.Process(LAUNCHER_PID).cmdline() if LAUNCHER_PID is not None else []
    machines = _value(words, "nnodes") or os.environ.get("PET_NNODES", "")
    why = f"--max-restarts {restarts}" if (restarts := os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) != "0" else ""
    low, _, high = machines.partition(":")
    if high and low != high:  # a machine that comes or goes restarts the others, and is no failure that counts
        why = why or f"--nnodes {machines}"
    if why:
        begins = f"goes back to --resume {resume}" if resume else "would begin anew"
        raise UserError(
            f"the launcher's {why} starts this command again when a process or a machine is lost, which then {begins};"
            " give --resume auto, which begins a run that there is not yet, too."
            + " To begin from another folder, run until the first checkpoint without restarts."
            * bool(resume)
        )


def _parent_that_launches() -> int | None:
    if not {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"} & os.environ.keys():
        return None
    try:
        parent = os.getppid()
        words = psutil.Process(parent).cmdline()
    except psutil.Error:
        return None
    names = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
    is_one = any(_is_launcher(words[: i + 1]) or os.path.basename(word) in names for i, word in enumerate(words))
    return parent if is_one else None


# The process id of the `accelerate launch` or `torchrun` that started this process; None if none did, as in a shell's
# background, where a process outlives its parent by intention. Asked at the start, while it lives.
LAUNCHER_PID = _parent_that_launches()
