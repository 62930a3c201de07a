"""Which of the classes that a checkpoint knows the classes of the data are: one rule for every command.

Names decide. Then whole numbers are indices, and ImageNet's wnids are looked up in ImageNet's table. Anything else is
refused, unless the user says that both stand in the same order.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from ..errors import UserError, printable


POSITION = "--classes_by_position true"
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen twenty"
).split()
_NUMBERS = {word: number for number, word in enumerate(_WORDS)}
_WNID = re.compile(r"n\d{8}")
_AGREEMENT = (
    0.9  # of a thousand words with ImageNet's table: lists of it differ in a few words, other data in nearly all
)


class UnknownClasses(UserError):
    """The data has classes that a checkpoint lacks; `shortly` says it of one that may get a new classifier."""

    def __init__(self, sentence: str, shortly: str):
        super().__init__(sentence)
        self.shortly = shortly


@dataclass(frozen=True)
class Match:
    """What [`match_classes`] found.

    Attributes:
        numbers: int64, one per class that was found: its number among the known ones, -1 if it is not used.
        note: a sentence on how they were matched; empty where both are the same list.
    """

    numbers: np.ndarray
    note: str = ""

    def is_one_to_one(self, known: Sequence[str]) -> bool:
        """Whether every known class is one of the data's."""
        return len(self.numbers) == len(known) and bool((self.numbers >= 0).all())

    def present(self) -> np.ndarray:
        """The numbers of the known classes that the data has, ascending."""
        return np.unique(self.numbers[self.numbers >= 0])


def match_classes(
    found: Sequence[str],
    known: Sequence[str],
    where: object,
    by_position: bool = False,
    used: Iterable[int] | None = None,
) -> Match:
    """For each class of the data, its number among those that a checkpoint knows.

    The first that fits decides, and all classes are matched by the same rule:

    1. names: as they are (in Unicode's NFC); else without regard to case, space, underscore and dash; else whole
       numbers, so that `01` and `1` are the same;
    2. `by_position`: as many classes, in the same order, where no name is the same;
    3. number words and whole numbers, so that `1` and `one` are the same;
    4. whole numbers are the indices of a checkpoint that knows words, or `LABEL_0`, `LABEL_1`, …;
    5. wnids are looked up in ImageNet's table, whether the data or the checkpoint has them.

    Args:
        found: in the data's order.
        known: in the checkpoint's.
        where: the data, for a sentence.
        used: the indices of `found` that occur, when not all do; the others need not be known.

    Raises:
        UserError: a class is not known, or could be two of them, or no rule fits.
    """
    found, known = list(found), list(known)
    if found == known:
        return Match(np.arange(len(found)))
    rows = list(range(len(found))) if used is None else sorted({int(row) for row in used})
    names = [found[row] for row in rows]
    matched, how = _by_names(names, known)
    if by_position and len(found) == len(known) and not any(_names_match(names, known)):
        matched, how = list(rows), f"in order, as {POSITION} says"
    elif not all(number is None for number in matched):
        _require_all(names, known, matched, where, "the checkpoint")
    elif (numbers := [_whole_number(name) for name in names]) and None not in numbers and not _any_value(known):
        matched, how = _as_indices(names, known, numbers, where), "by index"
    elif (looked_up := _by_table(names, known, where)) is not None:
        matched, how = looked_up, "by ImageNet's table of wnids"
    else:
        _require_all(names, known, matched, where, "the checkpoint", same_number=len(found) == len(known))
    return Match(_spread(matched, rows, len(found)), _note(names, known, matched, how))


def match_split(found: Sequence[str], known: Sequence[str], where: object, used: Iterable[int] | None = None) -> Match:
    """The same for two splits of one data set, by name alone: validation classes among those of training.

    Raises:
        UserError: one of them is not among those of training.
    """
    found, known = list(found), list(known)
    rows = list(range(len(found))) if used is None else sorted({int(row) for row in used})
    names = [found[row] for row in rows]
    matched, how = _by_names(names, known)
    _require_all(names, known, matched, where, "training")
    exact = how == "by name"
    return Match(_spread(matched, rows, len(found)), "" if exact else _note(names, known, matched, how, "training"))


# ---------------------------------------------------------------------------------------------------------------- names


def known_by_name(found: Sequence[str], known: Sequence[str]) -> np.ndarray:
    """The indices of the classes of the data that a checkpoint, or training, knows by name."""
    matched, _ = _by_names(list(found), list(known))
    return np.array([row for row, number in enumerate(matched) if number is not None], np.int64)


def _by_names(names: list[str], known: list[str]) -> tuple[list[int | None], str]:
    """Their numbers, None where there is none or more than one, and in words what was compared."""
    matched: list[int | None] = [None] * len(names)
    how = "by name"
    for key, means in (
        (_composed, "by name"),
        (_loose, "by name, without regard to case, space, underscore and dash"),
        (_value, "by the numbers that they name"),
    ):
        ours, theirs = _index(names, key), _index(known, key)
        taken = set(matched)
        for i, name in enumerate(names):
            one = key(name)
            if matched[i] is None and one is not None and len(ours[one]) == len(theirs.get(one, ())) == 1:
                if theirs[one][0] not in taken:
                    matched[i], how = theirs[one][0], means
    return matched, how


def _names_match(names: list[str], known: list[str]) -> Iterable[bool]:
    """For each kind of name whether one is the same, words for numbers aside."""
    return (bool(_index(names, key).keys() & _index(known, key).keys()) for key in (_composed, _loose, _whole_number))


def _index(names: Iterable[str], key: Callable[[str], Hashable]) -> dict[Hashable, list[int]]:
    """key(name) -> the positions of those that have it, without those for which there is no key."""
    found: dict[Hashable, list[int]] = defaultdict(list)
    for i, name in enumerate(names):
        if (value := key(name)) is not None:
            found[value].append(i)
    return found


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _loose(name: str) -> str | None:
    """What is left without case, space, underscore, and a dash within a word; `HER2-`, `-1` and `1-2` keep theirs, and
    so do digits what separates them."""
    key = re.sub(r"(?<=\d)[\s_-]+(?=\d)", "|", _composed(name).casefold())
    return re.sub(r"(?<=\w)-+(?=\w)|[\s_]+", "", key) or None


def _whole_number(name: str) -> int | None:
    found = re.fullmatch(r"\+?([0-9]{1,18})(\.0+)?", name.strip())  # as a list's `1.0` is read
    return int(found[1]) if found else None


def _value(name: str) -> int | None:
    number = _whole_number(name)
    return _NUMBERS.get(name.strip().casefold()) if number is None else number


def _any_value(names: list[str]) -> bool:
    return any(_value(name) is not None for name in names)


def _require_all(
    names: list[str], known: list[str], matched: list[int | None], where: object, who: str, same_number: bool = False
) -> None:
    """Raises `UserError` unless every class is matched."""
    unknown = [name for name, number in zip(names, matched) if number is None]
    if not unknown:
        return
    in_order = f" If they are the same classes in the same order, say {POSITION}." if same_number else ""
    mend = in_order
    if not same_number and who == "the checkpoint" and len(unknown) < len(names):
        mend = " Name them as it does, or leave them out."
    raise UnknownClasses(
        f"{where} has classes that {who} does not know: {_listed(unknown)}; it knows {len(known):,}, e.g."
        f" {_listed(known, more=False)}.{mend}",
        f"the checkpoint does not know {len(unknown):,} of the data's {len(names):,} classes:"
        f" {_listed(unknown)}.{in_order}",
    )


def _listed(names: list[str], more: bool = True) -> str:
    """The first three; in quotes where one has a comma in it."""
    quote = "'" if any("," in name for name in names[:3]) else ""
    rest = f" and {len(names) - 3:,} more" if more and len(names) > 3 else ""
    return ", ".join(f"{quote}{printable(name)}{quote}" for name in names[:3]) + rest


# -------------------------------------------------------------------------------------------------------------- numbers


def _as_indices(names: list[str], known: list[str], numbers: list[int | None], where: object) -> list[int | None]:
    if len(set(numbers)) < len(numbers):
        raise UserError(f"{where} has two classes of the same number, e.g. {_twice(names)}; rename one of them.")
    if (highest := max(number for number in numbers if number is not None)) >= len(known):
        raise UserError(
            f"{where} has the class {highest}, but the checkpoint's {len(known):,} classes are numbered 0 to"
            f" {len(known) - 1}. If they are as many in the same order, say {POSITION}."
        )
    return numbers


def _twice(names: list[str]) -> str:
    rows = next(rows for rows in _index(names, _whole_number).values() if len(rows) > 1)
    return " and ".join(printable(names[row]) for row in rows)


def in_words(names: Sequence[str]) -> list[str]:
    """Class names for a reader: beside a wnid of ImageNet's thousand what it means, as `n03888257 parachute`."""
    if not any(map(_WNID.fullmatch, names)):
        return list(names)
    return [f"{name} {_table().word(name)}" if name in _table().place else name for name in names]


def is_nameless(known: Sequence[str]) -> bool:
    """Whether a checkpoint's class names are the ones that transformers gives to classes without a name."""
    return list(known) == [f"LABEL_{i}" for i in range(len(known))]


# ------------------------------------------------------------------------------------------------------ wnids


def _by_table(names: list[str], known: list[str], where: object) -> list[int | None] | None:
    """Numbers by way of ImageNet's table where one side has its wnids; None where neither has."""
    ours, theirs = (all(map(_WNID.fullmatch, each)) for each in (names, known))
    if ours == theirs or not names:  # two lists of wnids were compared by name
        return None
    table = _table()
    number_of: dict[int, list[int]] = defaultdict(list)  # index in the table -> numbers of known classes
    if theirs:
        meant = table.meanings(names)
        for number, wnid in enumerate(known):
            number_of[table.place.get(wnid, -1)].append(number)
    else:
        meant = [{table.place[name]} if name in table.place else set() for name in names]
        if len(known) == len(table.wnids) and (is_nameless(known) or table.agrees(known)):
            matched = [table.place.get(name) for name in names]
            _require_all(names, known, matched, where, "the checkpoint")
            return matched
        for number, meanings in enumerate(table.meanings(known)):
            for i in meanings:
                if len(meanings) > 1 and {i} in meant:
                    raise UserError(
                        f"the checkpoint's class {printable(known[number])} may be {table.named(meanings)}, and {where}"
                        " has one of them; name that class as the checkpoint does."
                    )
                number_of[i].append(number)
    for name, meanings in zip(names, meant):
        if len(meanings) > 1:
            raise UserError(
                f"{where} has the class {printable(name)}, which may be {table.named(meanings)}; name it so."
            )
    candidates = [number_of.get(min(meanings), []) if meanings else [] for meanings in meant]
    matched = [numbers[0] if len(numbers) == 1 else None for numbers in candidates]
    if len(set(matched)) < len(matched) and None not in matched:
        raise UserError(f"{where} has two names of one class of ImageNet; merge them.")
    _require_all(names, known, matched, where, "the checkpoint", same_number=len(names) == len(known))
    return matched


@cache
def _table() -> "_Table":
    return _Table()


class _Table:
    """ImageNet's thousand classes in their order: wnids and what they mean in words."""

    def __init__(self) -> None:
        from timm.data import ImageNetInfo  # takes seconds, and few runs need it

        info = ImageNetInfo("imagenet-1k")
        self.wnids: list[str] = info.label_names()
        self.place = {wnid: i for i, wnid in enumerate(self.wnids)}
        self._described = [info.index_to_description(i) for i in range(len(self.wnids))]
        detailed = [info.index_to_description(i, detailed=True) for i in range(len(self.wnids))]
        words = [[_loose(word) for word in each.split(",")] for each in self._described]
        self._full = _index(self._described, _loose)
        self._detailed = _index(detailed, _loose)
        self._first, self._any = defaultdict(set), defaultdict(set)
        for i, each in enumerate(words):
            self._first[each[0]].add(i)
            for word in each:
                self._any[word].add(i)

    def named(self, indices: set[int]) -> str:
        return " or ".join(self.wnids[i] for i in sorted(indices))

    def word(self, wnid: str) -> str:
        return self._described[self.place[wnid]].split(",")[0]

    def agrees(self, known: list[str]) -> bool:
        """Whether a thousand words are these classes in this order."""
        same = sum(i in self._may_be(name) for i, name in enumerate(known))
        return same >= _AGREEMENT * len(self.wnids)

    def meanings(self, names: list[str]) -> list[set[int]]:
        """The indices that each of these words may mean; a meaning that another name has for itself is not shared."""
        found = [self._may_be(name) for name in names]
        certain = {min(each) for each in found if len(each) == 1}
        return [each if len(each) < 2 else each - certain or each for each in found]

    def _may_be(self, name: str) -> set[int]:
        """`tench`, `tench, Tinca tinca` and `tench, Tinca tinca: a fish` are one class; `crane` is two."""
        key, first = _loose(name), _loose(name.split(",")[0])
        if key in self._detailed:
            return set(self._detailed[key])
        if "," in name and len(self._full.get(key, ())) == 1:
            return set(self._full[key])
        numbered = re.fullmatch(r"(.+) \((\d+)\)", name)  # what `convert` makes of two cranes
        if numbered and int(numbered[2]) in self._first.get(_loose(numbered[1]), ()):
            return {int(numbered[2])}
        return set(self._first.get(first) or self._any.get(first) or ())


# ---------------------------------------------------------------------------------------------------------------- notes


def _spread(matched: list[int | None], rows: list[int], length: int) -> np.ndarray:
    numbers = np.full(length, -1, np.int64)
    numbers[rows] = np.array(matched, np.int64)
    return numbers


def _note(names: list[str], known: list[str], matched: list[int | None], how: str, who: str = "the checkpoint") -> str:
    """How they were matched, with the first example that shows it."""
    pairs = [(name, known[number]) for name, number in zip(names, matched) if number is not None]
    shown = next(((name, other) for name, other in pairs if name != other), None)
    example = "" if shown is None else ", e.g. {} is {}".format(*(printable(each) for each in shown))
    order = ""
    if how.startswith("by n") and matched != sorted(matched):  # type: ignore[type-var]
        order = f"; {who} has them in another order"
    part = f"; the data has {len(names):,} of its {len(known):,}" if len(names) < len(known) else ""
    return f"classes are matched with {who}'s {how}{example}{order}{part}"
