"""What each class weighs in the training loss: `--class_weights`."""

import csv
import io
import math
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import UserError, first_line, printable
from ..reading import LARGEST_JSON, read_json, short
from .classes import match_split


BALANCED = "balanced"
_DELIMITERS = ",", ";", "\t"


def class_weights(
    choice: str, class_names: Sequence[str], counts: np.ndarray, images: int, several: bool = False, even: bool = False
) -> np.ndarray:
    """float32 (classes,). One label per image: their mean over the images of an epoch is 1, so that the learning rate
    means what it did; a class without a training image weighs 1.

    Args:
        choice: `balanced`, where all images of a class together weigh as much as those of any other; or a file of class
            names and weights, CSV or JSON.
        counts: training images per class, int64 (classes,).
        images: training images.
        several: of several labels per image the weight is that of having a label against lacking it: `balanced` is
            the number of images without it by those with it, and a file's are taken as they are.
        even: whether an epoch has every class as often.

    Raises:
        UserError: the file cannot be read, or does not give every class one weight above 0.
    """
    present = counts > 0
    if choice != BALANCED:
        weights = _read(choice, list(class_names))
    elif several:
        weights = np.ones(len(counts))
        some = present & (counts < images)
        weights[some] = (images - counts[some]) / counts[some]
    else:
        from sklearn.utils.class_weight import compute_class_weight

        weights, numbers = np.ones(len(counts)), np.flatnonzero(present)
        weights[numbers] = compute_class_weight("balanced", classes=numbers, y=np.repeat(numbers, counts[numbers]))
    if not several:
        weights = weights / np.average(weights, weights=present if even else counts)
    if choice == BALANCED and not several:
        weights[~present] = 1
    return weights.astype(np.float32)


def _read(file: str, class_names: list[str]) -> np.ndarray:
    where = f"--class_weights {file}"
    pairs = _pairs(file, where, class_names)
    names = [name for name, _ in pairs]
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise UserError(f"{where} has the class {printable(twice)} twice; keep one.")
    values = [_weight(value, name, where) for name, value in pairs]
    match = match_split(names, class_names, where)
    weights = np.full(len(class_names), np.nan)
    weights[match.numbers] = values
    missing = [printable(class_names[number]) for number in np.flatnonzero(np.isnan(weights))]
    if missing:
        more = f" and {len(missing) - 3:,} more" if len(missing) > 3 else ""
        raise UserError(f"{where} has no weight for {', '.join(missing[:3])}{more}; add a line for every class.")
    return weights


def _pairs(file: str, where: str, class_names: list[str]) -> list[tuple[str, Any]]:
    if not os.path.isfile(file):
        raise UserError(f"{where} is no file; name a CSV or JSON file of classes and weights, or say {BALANCED}.")
    if file.lower().endswith(".json"):
        return list(read_json(file).items())
    pairs = [(name, value) for name, value in _rows(file, where)]
    (name, value), *others = pairs
    is_class = _is_number(value) or name in class_names and all(name != other for other, _ in others)
    return pairs if is_class else others  # without the header


def _rows(file: str, where: str) -> list[list[str]]:
    """Two cells a line. Not as a list of images is read: the first line may be any class, `1` or `cat.jpg`."""
    try:
        if (size := os.stat(file).st_size) > LARGEST_JSON:
            raise UserError(f"{where} has {size:,} bytes, which no weights of classes need; is it something else?")
        with open(file, encoding="utf-8-sig", newline="") as opened:
            text = opened.read()
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is no text in UTF-8; save it as that.") from None
    problems: list[tuple[float, str]] = []  # the more columns, the more it is what was meant
    found: list[list[list[str]]] = []
    for delimiter in _DELIMITERS:
        rows = []
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        try:
            for row in reader:
                cells = [cell.strip() for cell in row]
                while len(cells) > 2 and not cells[-1]:  # spreadsheets leave such beside the last one
                    cells.pop()
                if any(cells):  # and such below it
                    rows.append(cells)
                if any(cells) and len(cells) != 2:
                    columns = f"{len(cells)} columns" if len(cells) > 1 else "one column"
                    problems.append((len(cells), f"has {columns} in line {reader.line_num}"))
                    break
            else:
                found.append(rows)
        except csv.Error as error:
            problems.append((1.5, f"cannot be read in line {reader.line_num}: {printable(first_line(error))}"))
    if not any(found):
        problem = "is empty" if found else max(problems, key=lambda each: each[0])[1]
        raise UserError(
            f"{where} {problem}; it needs two columns, class and weight, with a comma, a semicolon or a tab between; a"
            " class that holds one of them stands in quotes."
        )
    # "a;b,1" has two columns either way: the one is right that has numbers in the second.
    return max(found, key=lambda rows: sum(_is_number(value) for _, value in rows))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _weight(value: Any, name: str, where: str) -> float:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        weight = math.nan
    if not 1e-6 <= weight <= 1e6:
        raise UserError(f"{where}: the weight of {printable(name)} is {short(value)}; it must be between 1e-6 and 1e6.")
    return weight
