"""One exception for everything a user can mend; the scripts print it as one line and exit with code 2."""

import difflib
import errno
import os
import re
import unicodedata
from collections.abc import Iterable


class UserError(ValueError):
    """Says in one sentence what is wrong, which file or flag it is about, and what to do."""


class OneProcessError(UserError):
    """Met by a single process of several, which therefore says it itself."""


def sentence_of(error: BaseException) -> str | None:
    """What a user can do about an exception, in one line; None for a bug, which deserves its traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return _out_of_memory("the machine's")
    if isinstance(error, (OSError, RuntimeError)) and re.search(
        "out of memory|can't allocate memory", str(error), re.I
    ):
        return _out_of_memory(first_line(error).rstrip("."))
    if isinstance(error, OSError) and error.errno is not None:
        name = os.fsdecode(error.filename) if isinstance(error.filename, (str, bytes)) else ""
        if error.errno in _OF_WRITING:
            return f"cannot write{f' {name}' if name else ''}: {error.strerror}."
        if name or error.errno in _OF_THE_MACHINE:
            return f"{name or 'the system says'}: {error.strerror}."
    elif not isinstance(error, OSError) and (reason := why_not_written(error)):
        return f"cannot write: {reason}."
    return None


def why_not_written(error: BaseException) -> str | None:
    """What kept Python, safetensors or torch from writing a file; None for an exception about something else."""
    if isinstance(error, OSError):
        return error.strerror or first_line(error).rstrip(".")
    if type(error).__name__ == "SafetensorError":
        found = re.search(r"I/O error: (.+?) \(os error \d+\)", str(error))
        return found[1] if found else None
    if isinstance(error, RuntimeError):
        if re.search(r"PytorchStreamWriter failed|unexpected pos \d+ vs \d+|iostream error", str(error)):
            return "the disk is full or refuses it"  # torch keeps the system's own words to itself
        if re.fullmatch(r"Parent directory .+ does not exist\.", str(error)):
            return "its folder is gone"
    return None


_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
_OF_THE_MACHINE = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG)


def _out_of_memory(whose: str) -> str:
    return f"out of memory ({whose}); lower the batch per device (--help has its flag) or --image_size."


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The nearest known word as a question to put behind a sentence; nothing if none is near."""
    nearest = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as the end of a sentence: its first line, or its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".") + "."


def printable(text: object) -> str:
    """Text of others (a file's name, a label, a library's message) for a terminal, a list or a card: what is no
    letter, sign or space is written as an escape, so that nobody's file name moves a cursor or hides a line."""
    return "".join(
        character
        if character in " \u200c\u200d" or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
        else character.encode("unicode_escape", "surrogatepass").decode("ascii")
        for character in str(text)
    )
