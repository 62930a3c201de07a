"""What every script shares: errors in one line, exit codes, nearest-flag suggestions."""

import argparse
import contextlib
import difflib
import errno
import math
import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .errors import OneProcessError, printable, sentence_of


_SCRIPTS = {f"{name}.py" for name in ("train", "validate", "classify", "convert", "qat", "export")}  # of a clone


class OneLineErrors(argparse.ArgumentParser):
    """`argparse.ArgumentParser` with one clear line and exit code 2 instead of a usage dump.

    `old_spellings` names flags as they were once called: they are taken for the new ones, with a line that says so.
    """

    old_spellings: dict[str, str] = {}

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {printable(message)}\n" if _speaks() else None)

    def parse_args(self, args=None, namespace=None):
        words = self._as_spelled_now(sys.argv[1:] if args is None else list(args))
        for word in words[: words.index("--")] if "--" in words else words:
            # Before argparse looks: it would miss the flag that is meant sooner than find the one that is mistyped.
            if word.startswith("--") and word.split("=", 1)[0] not in self._option_string_actions:
                self._unknown(word)
        namespace, leftovers = self.parse_known_args(words, namespace)
        if leftovers:
            self._unknown(leftovers[0])
        return namespace

    def _as_spelled_now(self, words: list[str]) -> list[str]:
        spelled: list[str] = []
        for word in words:
            flag, equals, value = word.partition("=")
            new = self.old_spellings.get("--" + flag[2:].replace("-", "_")) if flag.startswith("--") else None
            if new is not None:
                say_new_spelling(flag, new, self.prog)
            spelled.append((new or flag) + equals + value)
        action = self._option_string_actions.get("--overwrite")
        return _without_words(spelled) if action is not None and action.nargs == 0 else spelled

    def _unknown(self, word: str):
        flag = word.split("=", 1)[0]
        nearest = difflib.get_close_matches(flag, list(self._option_string_actions), n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else f"; {self.prog} --help lists them all"
        self.error(f"{'unknown flag' if flag.startswith('-') else 'unexpected argument'} {flag}{hint}")


def _without_words(words: list[str]) -> list[str]:
    """`--overwrite true` as `--overwrite`, and nothing for `false`, as a recipe's flags understand both."""
    kept: list[str] = []
    for word in words:
        if word.lower() in ("--overwrite=true", "--overwrite=false"):
            kept.append("--overwrite")
            word = word.split("=")[1]
        if kept[-1:] == ["--overwrite"] and word.lower() in ("true", "false"):
            kept = kept if word.lower() == "true" else [other for other in kept if other != "--overwrite"]
        else:
            kept.append(word)
    return kept


class ArgumentParser(OneLineErrors):
    """One-line errors, defaults in `--help`, and no abbreviated flags."""

    def __init__(self, *args, **kwargs):
        kwargs.setdefault("prog", program_name())
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **kwargs)


def say_new_spelling(old: str, new: str, prog: str | None = None) -> None:
    """One line on the console about a name that still works."""
    if _speaks():
        print(f"{prog or program_name()}: {old} is now called {new}", file=sys.stderr)


def say(note: str) -> None:
    """One line on the console that is no error; of several processes from the first one."""
    if _speaks():
        print(f"{program_name()}: {printable(note)}", file=sys.stderr)


def program_name() -> str:
    """What the user calls this program, for the beginning of a line: `train.py`, or `effnet-hf train`."""
    return _typed()[0]


def _typed() -> tuple[str, list[str]]:
    """The program's name and its arguments, whichever way it was started."""
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    if script.stem in ("effnet-hf", "__main__"):
        return " ".join(["effnet-hf", *arguments[:1]]), arguments[1:]
    if script.parent.name == "commands":  # python -m effnet_hf.commands.train
        return f"effnet-hf {script.stem}", arguments
    return script.name, arguments


def above_zero(text: str) -> float:
    """The `type` of a flag that takes positive numbers."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text!r}")
    return value


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """One name a flag, short words for its values, and its default where it has one."""

    def __init__(self, prog: str, **kwargs):
        super().__init__(prog, max_help_position=32, **kwargs)

    def _format_action_invocation(self, action):
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        name = action.option_strings[0]  # the others are its spellings with dashes
        return f"{name} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_default_metavar_for_optional(self, action):
        if action.nargs == "?" or getattr(action.type, "__name__", "") == "string_to_bool":
            return "true|false"
        return {float: "X", above_zero: "X", None: "TEXT", str: "TEXT", path: "PATH"}.get(action.type, "N")

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS) or action.default == [] or "default: " in action.help:
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return f"{action.help} (default: %(default)s)"


def invocation(command: str) -> str:
    """How the user calls one of our commands: `python train.py` from a clone's root, else `effnet-hf train`."""
    script = Path(sys.argv[0])
    of_a_clone = script.name in _SCRIPTS and script.resolve().parent == Path(__file__).resolve().parents[1]
    return f"python {command}.py" if of_a_clone else f"effnet-hf {command}"


def moved(command: str) -> None:
    """Ends a module that was once run with `python -m`, with the command that took its place."""
    print(f"this is `effnet-hf {command}` now", file=sys.stderr)
    sys.exit(2)


def command_line() -> str:
    """The command as it was typed, for logs and model cards, without a Hub token."""
    program, words = _typed()
    secret = re.compile("--hub[-_]token(=.*)?")
    kept = [
        word
        for before, word in zip(["", *words], words)
        if not secret.fullmatch(word) and not (secret.fullmatch(before) and "=" not in before)
    ]
    return shlex.join([*(["python"] if program.endswith(".py") else []), *program.split(), *kept])


def path(text: str) -> str:
    """The `type` of a flag that names a file, a folder or a Hub id: `~` is the home folder, and nothing is no name."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; name a file or folder")
    if "\0" in text:
        raise argparse.ArgumentTypeError(f"holds a zero byte, which no name has: {text}")
    expanded = os.path.expanduser(text)
    if expanded.startswith("~") and not os.path.lexists(expanded):
        raise argparse.ArgumentTypeError(f"{text}: there is no such user; a name that begins with ~ is ./{text}")
    return expanded


def at_least(minimum: int) -> Callable[[str], int]:
    """The `type` of a flag that takes whole numbers from `minimum` on."""

    def whole_number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {minimum}, got {text!r}")
        return value

    return whole_number


class Lasting:
    """A console that outlives its reader: what cannot be written is dropped, and so is all that comes after it.

    Python's own stream raises on every write to a closed pipe, which ended trainings for the sake of a `| head`.

    Args:
        raises: let the first error through.

    Attributes:
        lost: why something was dropped.
    """

    def __init__(self, stream, raises: bool = False):
        self.stream = getattr(stream, "stream", stream)  # not one around another
        self.raises = raises
        self.lost: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._try("write", text)
        return len(text)

    def flush(self) -> None:
        self._try("flush")

    def _try(self, do: str, *arguments) -> None:
        try:
            if self.stream is not None and not self.stream.closed:
                getattr(self.stream, do)(*arguments)
        except OSError as error:
            self.lost = error
            with contextlib.suppress(OSError):  # no file
                _send_nowhere(self.stream.fileno())
            if self.raises:
                raise


def _send_nowhere(descriptor: int) -> None:
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


def run(main: Callable[[], int | None], prog: str | None = None) -> None:
    """Runs a script's `main` and turns what a user can mend into one line and exit code 2.

    `main` may return an exit code. Ctrl-C exits with 130, quietly, and another signal that asks for an end with 128 and
    its number, after a line. Of several processes only the first one speaks, but for a `OneProcessError`.

    A command does its work to the end whether or not somebody reads what it prints; only `classify`, whose work that
    is, ends with its reader. What could not be printed for another reason (a full disk) is an error, said on stderr.

    Args:
        prog: how the user called it; the script's name by default.
    """
    prog = prog or program_name()
    _open_what_is_closed()
    out = Lasting(sys.stdout, raises=prog.removesuffix(".py").endswith("classify"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(Lasting(sys.stderr)):
        try:
            code = _run(main, prog, out)
        finally:  # what is left over for Python's own end would change the exit code there
            with contextlib.suppress(OSError):
                out.flush()
        if out.lost is not None and out.lost.errno != errno.EPIPE and code in (0, 1):  # 1: `scan` found bad files
            print(f"{prog}: error: cannot write to standard output: {out.lost.strerror}.", file=sys.stderr)
            code = 2
    sys.exit(code)


def _run(main: Callable[[], int | None], prog: str, out: Lasting) -> int:
    try:
        with _ending_by_signal():
            code = main() or 0
            out.flush()
            _leave_group()
        return code
    except KeyboardInterrupt as end:
        name = str(end) if str(end) in signal.Signals.__members__ else "SIGINT"
        if name != "SIGINT" and _speaks():
            print(f"{prog}: stopped by {name}", file=sys.stderr)
        return 128 + signal.Signals[name]
    except SystemExit as end:  # argparse's
        if isinstance(end.code, str):
            raise
        return end.code or 0
    except Exception as error:
        if error is out.lost:  # `classify.py … | head`
            return 0
        sentence = sentence_of(error)
        if sentence is None:
            raise
        if _speaks() or isinstance(error, OneProcessError):
            rank = "" if _speaks() else f"process {os.environ.get('RANK', os.environ['LOCAL_RANK'])}: "
            print(f"{prog}: error: {rank}{printable(sentence)}", file=sys.stderr)
        return 2


def _open_what_is_closed() -> None:
    """Gives closed standard streams (`>&-`) somewhere to go, before a file of ours gets their number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            _send_nowhere(descriptor)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a letter that the console lacks is no reason to end


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Lets Ctrl-C end a command that is still importing as it does later, quietly and with 130; programs of others
    that import the package are left alone."""
    module = " ".join(sys.orig_argv) if sys.argv[:1] == ["-m"] else ""
    script = Path(sys.argv[0] if sys.argv else "")
    ours = script.stem == "effnet-hf" or script.name in _SCRIPTS or " -m effnet_hf" in module
    before = signal.getsignal(signal.SIGINT)
    if not ours or before != signal.default_int_handler or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *_: os._exit(128 + signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ending_by_signal() -> Iterator[None]:
    """Lets SIGTERM, SIGUSR1 (Slurm's warning), and SIGHUP unless it is ignored (nohup), end the body as Ctrl-C does:
    what is half-written goes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    owner = os.getpid()

    def end(number, frame):
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once
        if os.getpid() != owner:  # a forked child, which its parent ends
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers if signal.getsignal(number) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _leave_group() -> None:
    """Ends the process group that a library started; NCCL complains where nobody does, and may hang at exit."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _speaks() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"
