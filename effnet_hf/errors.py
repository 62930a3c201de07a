"""One exception for everything a user can mend; the scripts print it as one line and exit with code 2."""

import difflib
import errno
from collections.abc import Iterable


class UserError(ValueError):
    """Says in one sentence what is wrong, which file or flag it is about, and what to do."""


class OneProcessError(UserError):
    """Met by a single process of several, which therefore says it itself."""


def sentence_of(error: BaseException) -> str | None:
    """What a user can do about an exception, in one line; None for a bug, which deserves its traceback."""
    if isinstance(error, UserError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return f"cannot write{f' {error.filename}' if error.filename else ''}: {error.strerror}."
    if isinstance(error, (OSError, RuntimeError)):
        if "out of memory" in str(error).lower() or "can't allocate memory" in str(error):
            first = str(error).strip().splitlines()[0].rstrip(".")
            return f"out of memory ({first}); lower the batch per device (--help has its flag) or --image_size."
    return None


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The nearest known word as a question to put behind a sentence; nothing if none is near."""
    nearest = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as the end of a sentence: its first line, or its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".") + "."
