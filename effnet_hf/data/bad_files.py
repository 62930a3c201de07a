"""Counts and names the files that gave no image; each is named once, in `bad_files.txt`."""

from pathlib import Path
from typing import NamedTuple

from ..errors import UserError


class BadFile(NamedTuple):
    name: str
    reason: str  # continues the sentence "<name> …"

    def flat(self) -> "BadFile":
        """The same without tabs and line breaks, which a file name may hold."""
        return BadFile(*(text.replace("\t", " ").replace("\n", " ").replace("\r", " ") for text in self))

    @property
    def line(self) -> str:
        """Of a list of bad files: name, tab, reason."""
        return "\t".join(self.flat()) + "\n"


class BadFiles:
    """What was unreadable in one split so far.

    Several processes may share one `path`: each appends whole lines and reads what the others wrote, so that a file is
    listed once and the limit holds for all of them together. A resumed run goes on with the same list.

    Args:
        path: where to list them; None keeps the list in memory only.
        num_samples: images in the split.
        max_share: `--max_bad_files`.
        strict: `--strict`.
    """

    def __init__(self, path: Path | None, num_samples: int, max_share: float = 0.01, strict: bool = False):
        self.path = path
        self._limit = max_share * num_samples
        self._num_samples = num_samples
        self._max_share = max_share
        self._strict = strict
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._reasons)

    @property
    def names(self) -> list[str]:
        return list(self._reasons)

    def report(self, files: list[BadFile]) -> list[BadFile]:
        """Adds files and returns those that no process has seen before.

        Raises:
            UserError: `strict`, or too many of them.
        """
        files = [file.flat() for file in files]
        new = [file for file in files if file.name not in self._reasons]
        if not new:
            return []
        if self._strict:
            raise UserError(f"{new[0].name} {new[0].reason}; mend or remove it, or run without --strict.")
        new = list({file.name: file for file in new}.values())
        self._read()
        fresh = [file for file in new if file.name not in self._reasons]
        self._reasons.update(fresh)
        if self.path is not None and fresh:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write("".join(each.line for each in fresh))
        if self.count > self._limit:
            where = f" {self.path} lists them;" if self.path else ""
            raise UserError(
                f"{self.count} of {self._num_samples} images are unreadable, more than --max_bad_files"
                f" {self._max_share:g} allows (the last: {new[-1].name} {new[-1].reason});{where} mend the data"
                " or raise --max_bad_files."
            )
        return fresh

    def _read(self):
        try:
            text = self.path.read_text(encoding="utf-8", errors="surrogateescape") if self.path else ""
        except FileNotFoundError:
            return
        for line in filter(None, text.split("\n")):
            name, _, reason = line.partition("\t")
            self._reasons.setdefault(name, reason)
