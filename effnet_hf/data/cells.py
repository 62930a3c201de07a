"""The file of a list of images, CSV or JSON, as columns."""

import csv
import json
import os
import stat
from itertools import count

import pyarrow as pa

from ..errors import UserError, first_line, printable
from .names import is_image


_DELIMITERS = ",", ";", "\t"
_OBJECTS = 'it needs one object a line, such as {"file_name": "1.jpg", "label": "cat"}, in a .jsonl file'
_BLANK = ",; \t\r\n"
_JSON = ".jsonl", ".ndjson", ".json"
_LARGEST = 1 << 30  # bytes of a list; that of ImageNet's 1.28 million images has 70 million


def read_cells(file: str, where: str, alone: bool = False) -> tuple[pa.Table, bool, list[str]]:
    """The columns, whether they have names, and notes.

    Args:
        where: the file, for sentences.
        alone: whether a CSV file may have a single column.

    Raises:
        UserError: it cannot be read.
    """
    try:
        status = os.stat(file)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{where} is no file; name a CSV file of images and labels.")
        if status.st_size > _LARGEST:
            raise UserError(f"{where} has {status.st_size:,} bytes, more than {_LARGEST:,}.")
        if file.lower().endswith(_JSON):
            return _from_json(file), True, []
        return _from_csv(file, where, alone)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where} is no text in UTF-8; save it as that.") from None
    except (ValueError, OverflowError, pa.ArrowException, RecursionError, csv.Error) as error:
        raise UserError(f"{where} cannot be read: {printable(first_line(error))}") from None


def _from_json(file: str) -> pa.Table:
    with open(file, encoding="utf-8-sig") as opened:
        text = opened.read()
    rows = json.loads(text) if text.lstrip().startswith("[") else list(map(_row, text.split("\n"), count(1)))
    rows = [row for row in rows if row is not None]
    if not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(_OBJECTS)
    return pa.Table.from_struct_array(pa.array(rows))


def _row(line: str, number: int) -> dict | None:
    try:
        return json.loads(line) if line.strip() else None
    except json.JSONDecodeError:
        raise ValueError(f"line {number}: {_OBJECTS}") from None


def _from_csv(file: str, where: str, alone: bool) -> tuple[pa.Table, bool, list[str]]:
    with open(file, encoding="utf-8-sig", newline="") as lines:
        first = next((line for line in lines if line.strip(_BLANK)), "")
    rows = {delimiter: next(csv.reader([first], delimiter=delimiter), []) for delimiter in _DELIMITERS}
    fitting = [delimiter for delimiter, cells in rows.items() if len(cells) > 1]
    if not fitting and not (alone and first.strip()):
        raise UserError(
            f"{where} has one column, or none: {printable(first.strip()[:80])!r}; it needs images and labels, with a"
            " comma, a semicolon or a tab between."
        )
    # "1.jpg,cat;dog" has two: the one is right that leaves the image's name alone.
    delimiter, *others = (
        [each for each in fitting if any(map(is_image, filter(None, map(str.strip, rows[each]))))] or fitting or [","]
    )
    if others:
        raise UserError(
            f"{where} has both {delimiter!r} and {others[0]!r} in its first line; name the columns there, e.g."
            " path,label."
        )
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
        cells = []
        for row in reader:
            if not any(map(str.strip, row)):  # spreadsheets leave such below the last one
                continue
            if len(row) != len(rows[delimiter]):
                raise UserError(
                    f"{where} has {len(row)} cells in line {reader.line_num}, but {len(rows[delimiter])} in the first"
                    " one; a cell that holds a comma or the like stands in quotes."
                )
            cells.append(row)
    has_header = not any(is_image(cell.strip()) for cell in cells[0] if cell.strip())
    names = [cell.strip() for cell in cells.pop(0)] if has_header else [str(i) for i in range(len(cells[0]))]
    for column in reversed(
        [i for i, name in enumerate(names) if not name and not any(row[i].strip() for row in cells)]
    ):
        for row in [names, *cells]:  # and such beside the last one
            del row[column]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where} has two columns called {printable(twice)!r}; rename one.")
    notes = [f"{where} is read with {delimiter!r} between its columns."] if delimiter != "," else []
    # As text: whatever looks like a number or like "nothing" may be the name of a class.
    columns = [pa.array(column, pa.string()) for column in zip(*cells)] or [pa.array([], pa.string())] * len(names)
    return pa.table(columns, names), has_header, notes
