"""One exception for everything a user can mend; the scripts print it as one line and exit with code 2."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Says in one sentence what is wrong, which file or flag it is about, and what to do."""


def did_you_mean(word: object, known: Iterable[str]) -> str:
    """The nearest known word as a question to put behind a sentence; nothing if none is near."""
    nearest = difflib.get_close_matches(str(word), known, n=1)
    return f" Did you mean {nearest[0]!r}?" if nearest else ""


def first_line(error: BaseException) -> str:
    """What an exception of a library says, as the end of a sentence: its first line, or its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".") + "."
