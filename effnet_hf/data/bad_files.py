"""Counts and names the files that gave no image; each is named once, in `bad_files.txt`."""

import json
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError, printable
from ..files import writing


class BadFile(NamedTuple):
    name: str
    reason: str  # continues the sentence "<name> …"

    def __str__(self) -> str:
        return printable(f"{self.name} {self.reason}")

    def line(self, split: str = "") -> str:
        """Of a list of bad files: name, reason and, of a run's two splits, which one, with tabs in between.

        A name of letters, digits, signs and spaces stands there as it is, any other as a JSON string.
        """
        plain = printable(self.name) == self.name and not self.name.startswith('"')
        columns = [self.name if plain else json.dumps(self.name), printable(self.reason), *([split] if split else [])]
        return "\t".join(columns) + "\n"


class BadFiles:
    """What was unreadable in one split so far.

    Several processes may share one `path`: each appends whole lines and reads what the others wrote, so that a file is
    listed once and the limit holds for all of them together. A resumed run goes on with the same list.

    Args:
        path: where to list them; None keeps the list in memory only.
        num_samples: images in the split.
        max_share: `--max_bad_files`; one file is always allowed, but for 0.
        strict: `--strict`.
        split: the name of the split in the list, which others share.
        has_flags: whether the command has these two flags.
    """

    def __init__(
        self,
        path: Path | None,
        num_samples: int,
        max_share: float = 0.01,
        strict: bool = False,
        split: str = "",
        has_flags: bool = True,
    ):
        self.path = path
        self._limit = max(1.0, max_share * num_samples) if max_share else 0.0
        self._num_samples = num_samples
        self._max_share = max_share
        self._strict = strict
        self._split = split
        self._has_flags = has_flags
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        return len(self._reasons)

    @property
    def files(self) -> list[BadFile]:
        return [BadFile(*each) for each in self._reasons.items()]

    @property
    def names(self) -> list[str]:
        return list(self._reasons)

    def report(self, files: list[BadFile]) -> list[BadFile]:
        """Adds files and returns those that no process has seen before.

        Raises:
            UserError: `strict`, too many of them, or they cannot be listed.
        """
        new = [file for file in files if file.name not in self._reasons]
        if not new:
            return []
        if self._strict:
            raise UserError(f"{new[0]}; mend or remove it, or run without --strict.")
        new = list({file.name: file for file in new}.values())
        self._read()
        fresh = [file for file in new if file.name not in self._reasons]
        self._reasons.update(fresh)
        if self.path is not None and fresh:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(each.line(self._split) for each in fresh))
        if self.count > self._limit:
            where = f" {self.path} lists them;" if self.path else ""
            allowed = f"--max_bad_files {self._max_share:g} allows" if self._has_flags else "one in a hundred"
            raise UserError(
                f"{self.count} of {self._num_samples} images are unreadable, more than {allowed} (the last: {new[-1]});"
                f"{where} mend the data{' or raise --max_bad_files' if self._has_flags else ''}."
            )
        return fresh

    def _read(self):
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path else ""
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}.") from None
        for line in filter(None, text.split("\n")):
            name, _, rest = line.partition("\t")
            reason, _, split = rest.partition("\t")
            if split == self._split:
                self._reasons.setdefault(_unquoted(name), reason)


def _unquoted(name: str) -> str:
    try:
        return json.loads(name) if name.startswith('"') else name
    except ValueError:  # edited by hand
        return name
