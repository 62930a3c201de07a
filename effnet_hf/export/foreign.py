"""What an ONNX file of others may not hold, found in its bytes: in milliseconds, and without the onnx package."""

import mmap
from pathlib import Path

from ..errors import UserError


# Messages of onnx.proto that are looked into, and of these the fields that are refused, by their numbers.
_INSIDE = {("model", 7): "graph", ("graph", 1): "node", ("node", 5): "attribute"}
_REFUSED = {
    ("attribute", 6): "operators with graphs inside (Loop, Scan, If)",  # a loop of 2^62 steps fits in a hundred bytes
    ("attribute", 11): "operators with graphs inside",
    ("model", 25): "functions",  # ten that call each other ten times each are ten thousand million operators
}
_WIDTH = {1: 8, 5: 4}  # bytes of the kinds of fields that do not say it
_MOST = 1_000_000  # fields; B7's graph has 12,000, an INT8 graph some times its float one's


def require_plain_graph(path: Path, name: str) -> None:
    """Refuses an ONNX file that can compute without end: one whose operators are not all run once, as in every
    EfficientNet.

    Args:
        name: what to call the folder in a sentence.

    Raises:
        UserError: it does more, or is no ONNX file.
    """
    if not path.stat().st_size:
        raise UserError(f"{name} cannot be opened: its {path.name} is empty.")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            fault = _fault(data)
        except (ValueError, LookupError):
            raise UserError(
                f"{name} cannot be opened: its {path.name} is damaged, cut short, or no ONNX file."
            ) from None
    if fault:
        raise UserError(f"{name} cannot be opened: its {path.name} has {fault}, which no EfficientNet needs.")


def _fault(data: mmap.mmap) -> str | None:
    """Raises `ValueError` or `LookupError` where the bytes are no protocol buffer."""
    pending = [("model", 0, len(data))]  # messages, from where to where
    for _ in range(_MOST):
        if not pending:
            return None
        message, place, end = pending.pop()
        tag, place = _number(data, place)
        field, kind = (message, tag >> 3), tag & 7
        if field in _REFUSED:
            return _REFUSED[field]
        begin = place
        if kind == 0:
            _, place = _number(data, place)
        elif kind == 2:
            size, begin = _number(data, place)
            place = begin + size
        else:
            place += _WIDTH[kind]
        if place > end or not 8 <= tag < 2**32:
            raise ValueError
        if place < end:
            pending.append((message, place, end))
        if kind == 2 and field in _INSIDE and begin < place:
            pending.append((_INSIDE[field], begin, place))
    return f"more than {_MOST:,} parts"


def _number(data: mmap.mmap, place: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError
