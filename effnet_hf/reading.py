"""Reading what others wrote, JSON and tensors, as data: nothing in a file runs, and what it claims to hold is compared
with its size before memory is taken for it."""

import io
import json
import os
import pickletools
import re
import reprlib
import stat
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch._utils import IMPORT_MAPPING, NAME_MAPPING

from . import stand_ins
from .errors import UserError, first_line, printable


LARGEST_JSON = 64 << 20  # bytes; the names of ImageNet's 21,841 classes, twice, are 2 MB
_LARGEST_PICKLE = 8 << 20  # bytes of a file of tensors that are no tensor's
_SLACK = 1 << 20  # bytes of keys and padding in a file of tensors
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8, torch.int8,
           torch.int16, torch.int32, torch.int64)  # fmt: skip
_NEVER_NEGATIVE = ("running_var", "num_batches_tracked", "_amax", "square_avg", "exp_avg_sq", "step")
# What the pickle of a checkpoint may call. torch.load allows more, some of which takes any memory or time.
_REBUILDS = tuple(f"torch._utils._rebuild_{kind}" for kind in ("tensor", "tensor_v2", "tensor_v3", "parameter"))
_CALLS = (*_REBUILDS, "collections.OrderedDict", "collections.Counter", "builtins.set", "_codecs.encode",
          "torch.Size", "torch.device", "torch.serialization._get_layout")  # fmt: skip
# What BUILD may change: the kind, the global that made it or its stand-in, and what it gets.
_BUILDS = (("REDUCE", "collections.OrderedDict", "EMPTY_DICT"), ("NEWOBJ", stand_ins.Settings, "EMPTY_DICT"),
           ("REDUCE", stand_ins.settings, "EMPTY_DICT"), ("REDUCE", stand_ins.NumberType, "TUPLE"),
           ("REDUCE", stand_ins.Array, "TUPLE"))  # fmt: skip
_TEXT = ("BINUNICODE", "SHORT_BINSTRING", "BINSTRING")
# Keys whose hashes nobody can choose: Python salts those of texts, and small numbers lie close together.
_KEYS = (*_TEXT, "BININT", "BININT1", "BININT2")
_LARGEST_KEY = 1 << 20
_ALLOWING = threading.Lock()  # what torch's reader takes is one list for the whole process
_TAKES = {"APPEND": 1, "BUILD": 1, "SETITEM": 2, "REDUCE": 2, "NEWOBJ": 2, "BINPERSID": 1,
          "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}  # fmt: skip


class _Brief(reprlib.Repr):
    repr_OrderedDict = repr_Counter = reprlib.Repr.repr_dict  # which would be written out to the last level


def short(value: Any) -> str:
    """A value of others in a sentence, on one line: its beginning, not too deep, for lists can hold lists for ever."""
    brief = _Brief()
    brief.maxlevel = 2
    return printable(brief.repr(value))


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file.

    Raises:
        UserError: no regular file, too large, not UTF-8, not JSON, no object, or a key stands twice.
    """
    size = _size(path)
    if size > LARGEST_JSON:
        raise UserError(f"{path} has {size:,} bytes, which no JSON file here needs; is it something else?")
    try:
        content = json.loads(Path(path).read_bytes().decode("utf-8"), object_pairs_hook=_each_key_once)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}.") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be read.") from None
    except ValueError as error:
        reason = "it is empty" if not size else printable(first_line(error)).rstrip(".")
        raise UserError(f"{path} is not JSON: {reason}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no JSON object: it should be one, {{…}}, not a {type(content).__name__}.")
    return content


def read_tensors(path: str | os.PathLike) -> tuple[Any, dict[str, str]]:
    """The content of a PyTorch or safetensors file, judged by its first bytes, and a safetensors file's metadata.

    Every tensor in it is dense, on the CPU, and no larger than what the file holds of it.

    Raises:
        UserError: it is something else, damaged, or more than data.
    """
    _size(path)
    try:
        with open(path, "rb") as handle:
            start = handle.read(512)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    kind = _not_weights(start)
    if kind and start[5:9] != b"\0\0\0{":  # safetensors' length of its header may begin with any byte
        raise UserError(f"{path} is {kind}, not a file of weights.")
    if start[8:9] == b"{":
        content, metadata = _read_safetensors(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        content, metadata = _read_pickle(path, start), {}
    else:
        raise UserError(f"{path} is neither a PyTorch file nor a safetensors file; it starts with {start[:8]!r}.")
    check_tensors(content, path)
    return content, metadata


def wrong_numbers(name: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with the numbers of a weight or of an optimizer's state, as the end of a sentence; None where
    nothing is. To be asked after a cast: float64 holds finite numbers that float32 does not."""
    # A sum is finite where all its terms are, and twenty times faster to ask.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        return "holds NaN or infinity"
    if name.endswith(_NEVER_NEGATIVE) and (tensor < 0).any():
        return "holds negative numbers"
    return None


def _size(path: str | os.PathLike) -> int:
    """In bytes, of a regular file: a pipe or a device would be waited for, or never end."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}.") from None
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{path} is {'a folder' if stat.S_ISDIR(status.st_mode) else 'no regular file'}.")
    return status.st_size


def _each_key_once(pairs: list[tuple[str, Any]]) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} stands twice")
        found[key] = value
    return found


def _not_weights(start: bytes) -> str | None:
    """What a file is, if its first bytes say it is something people often mistake for weights."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if not start:
        return "empty (0 bytes)"
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        return "a web page, probably a login or error page saved by a download"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (git lfs pull fetches the file itself)"
    if text.startswith((b"{", b"[")):
        return "a JSON text"
    if start.startswith(b"\x1f\x8b"):
        return "a gzip archive (unpack it first)"
    if start.startswith(b"\x89HDF"):
        return "an HDF5 file (Keras)"
    if start[257:262] == b"ustar":
        return "a tar archive (unpack it first; PyTorch's .pth.tar is no tar)"
    return None


def _read_safetensors(path: str | os.PathLike) -> tuple[dict, dict]:
    try:
        with safe_open(path, framework="pt") as handle:
            return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}
    except Exception as error:  # its own, Python's, and torch's for a type of number that torch lacks
        raise UserError(f"{path} is a damaged safetensors file: {printable(first_line(error))}") from error


def _read_pickle(path: str | os.PathLike, start: bytes) -> Any:
    try:
        with open(path, "rb") as file:
            if start[:2] == b"PK":  # torch stores without compressing; a compressed file can claim any size
                with zipfile.ZipFile(path) as archive:
                    claimed = sum(entry.file_size for entry in archive.infolist())
                if claimed > os.path.getsize(path) + _SLACK:
                    raise UserError(f"{path} refused: it unpacks to {claimed:,} bytes, more than it has.")
                # By torch's own reader, for zipfile may find another entry of that name.
                _check_pickle(io.BytesIO(torch._C.PyTorchFileReader(file).get_record("data.pkl")), path)
            else:
                for _ in range(5):  # a magic number, a version, the machine, the content, the keys of its tensors
                    _check_pickle(file, path)
        with _stand_ins_allowed():
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen kinds, by where the damage is
        text = str(error)
        if match := re.search(r"(?:GLOBAL|global) ([\w.]+)", text):
            raise _holds_more(path, match[1]) from error
        if "weights_only" in text or "Weights only" in text:
            raise _holds_more(path) from error
        raise UserError(f"{path} is damaged or cut short: {printable(first_line(error))}") from error


@contextmanager
def _stand_ins_allowed() -> Iterator[None]:
    """In torch's list of what may be made, in place of what the user has added under the same names."""
    ours = [(made, name) for name, made in stand_ins.ALL.items()]
    with _ALLOWING:
        before = torch.serialization.get_safe_globals()
        _allow([entry for entry in before if _global_name(entry) not in stand_ins.ALL] + ours)
        try:
            yield
        finally:
            _allow([*set(torch.serialization.get_safe_globals()) - set(ours), *before])


def _allow(entries: list) -> None:
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(entries)


def _global_name(entry: Any) -> str:
    return entry[1] if isinstance(entry, tuple) else f"{entry.__module__}.{entry.__qualname__}"


def _holds_more(path: str | os.PathLike, name: str = "") -> UserError:
    if not name:
        return UserError(
            f"{path} refused: it does not open with torch.load(weights_only=True), so it holds more than tensors."
        )
    return UserError(
        f"{path} refused: it holds a pickled {printable(name)} besides plain tensors, and such objects are not read "
        "here: unpickling them can run any code. Save the state dict alone: torch.save(model.state_dict(), …)."
    )


@dataclass(slots=True)
class _Item:
    """Something that a pickle puts on its stack.

    Attributes:
        kind: the opcode that put it there; `name`: the global that it is, or whose call gave it, or a short text.
        weight: what a walk through it takes, twice as much at every level of tuples.
        made: a call or the file's storages gave it, or something in it.
        parts: what is in it, of a list as far as `_are_items` asks; `count`: how many it has.
        odd: how many in it, of a dictionary how many keys, have hashes that a file can choose.
    """

    kind: str
    name: str = ""
    weight: int = 1
    made: bool = False
    parts: list["_Item"] = field(default_factory=list)
    count: int = 0
    odd: int = 0


def _are_items(arguments: _Item) -> bool:
    """Whether a call's arguments are a list of lists, each a text and a value, as Python 2 wrote an OrderedDict."""
    pairs = arguments.parts[0] if len(arguments.parts) == 1 else arguments
    return pairs.kind == "EMPTY_LIST" and pairs.count == len(pairs.parts) and all(map(_is_item, pairs.parts))


def _is_item(pair: _Item) -> bool:
    return pair.kind == "EMPTY_LIST" and pair.count == 2 and pair.parts[0].kind in _TEXT


def _odd(keys: list[_Item]) -> int:
    return sum([key.kind not in _KEYS for key in keys])


def _full_name(argument: str) -> str:
    """Of a global, `module name`, as torch's reader has it: Python 3's."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _check_pickle(file: BinaryIO, path: str | os.PathLike) -> None:
    """Follows a pickle without making what it describes. torch.load runs no foreign code, but hashes keys (a tuple that
    holds a tuple twice that holds a tuple twice …), and calls functions on a tensor that claims a million million
    numbers: it would not come back, and a key a hundred thousand tuples deep ends the process.

    Raises:
        UserError: it calls what no checkpoint needs, or walking it would take long.
    """
    stack: list[_Item] = []
    outer: list[list[_Item]] = []
    memo: dict[Any, _Item] = {}
    work = copied = 0
    for opcode, argument, position in pickletools.genops(file):
        kind = opcode.name
        taken: list[_Item] = []
        if kind in ("TUPLE", "APPENDS", "SETITEMS"):
            taken, stack = stack, outer.pop()
        elif count := _TAKES.get(kind):
            taken = stack[-count:]
            del stack[-count:]
        weight, made = sum([item.weight for item in taken]), any([item.made for item in taken])
        pushed = None
        if kind == "PROTO" and (argument or 0) > 3:
            raise UserError(
                f"{path} refused: it was saved with pickle protocol {argument}, which torch.load does not read without"
                " running code; save it again with the default of torch.save."
            )
        if kind == "MARK":
            outer.append(stack)
            stack = []
        elif kind.startswith(("APPEND", "SETITEM")):
            whole = stack[-1]
            whole.count += len(taken)
            of_map = kind.startswith("SETITEM")
            odd = _odd(taken[:: 1 + of_map])
            work += of_map * odd * (2 * whole.odd + odd) // 2  # each may be compared with all before it
            whole.odd += odd
            if whole.count <= 2 or all(part.kind == "EMPTY_LIST" for part in taken):
                whole.parts += taken
            whole.weight += weight
            whole.made |= made
        elif kind in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif kind in ("BINGET", "LONG_BINGET"):
            pushed = memo[argument]
        elif kind == "BUILD":  # attributes of the dictionary of `state_dict()`, or one of our stand-ins
            name = stack[-1].name
            if (stack[-1].kind, stand_ins.ALL.get(name, name), taken[0].kind) not in _BUILDS:
                raise _holds_more(path)
            copied += taken[0].count
            stack[-1].weight += weight
        elif kind in ("REDUCE", "NEWOBJ"):
            function, arguments = taken
            new, called = function.name in stand_ins.NEW, function.name in stand_ins.CALLED
            callable_ = new and not arguments.parts if kind == "NEWOBJ" else called or function.name in _CALLS
            if function.kind != "GLOBAL" or not callable_:
                raise _holds_more(path, function.name)
            ordered = function.name == "collections.OrderedDict"
            if ordered and arguments.parts and not _are_items(arguments):
                raise _holds_more(path)
            safe = called or ordered or function.name in _REBUILDS
            if arguments.kind != "TUPLE" or made and not safe:
                raise _holds_more(path)
            if function.name == "_codecs.encode" and arguments.parts[1].name != "latin1":
                raise _holds_more(path)  # some other codecs take the square of a text's length
            if function.name not in _REBUILDS:
                copied += sum([part.count or part.weight // 8 for part in arguments.parts])
            if function.name in ("builtins.set", "collections.Counter"):
                work += sum([part.odd**2 for part in arguments.parts]) // 2
            pushed = _Item(kind, function.name, weight, True)
        elif kind == "BINPERSID":
            if made:
                raise _holds_more(path)
            pushed = _Item(kind, made=True)
        elif kind == "EMPTY_TUPLE" or kind.startswith("TUPLE"):
            pushed = _Item("TUPLE", "", 2 * (1 + weight), made, taken, len(taken), _odd(taken))
        elif opcode.stack_before and kind != "STOP":
            raise _holds_more(path)  # nor does torch.load take these
        elif opcode.stack_after:
            text = argument if isinstance(argument, (str, bytes)) else ""
            name = _full_name(str(argument)) if kind == "GLOBAL" else str(text) if len(text) < 9 else ""
            if isinstance(argument, int) and not 0 <= argument < _LARGEST_KEY:
                kind = "LONG1"
            pushed = _Item(kind, name, 1 + len(text))
        if pushed:
            stack.append(pushed)
            work += pushed.weight
        read = position or 0
        if work > _SLACK + 100 * read or copied > read or file.tell() > _LARGEST_PICKLE:
            raise UserError(
                f"{path} refused: what it holds besides tensors is too deep, multiplies, or is more than 8 MiB;"
                " save the state dict alone: torch.save(model.state_dict(), …)."
            )


def check_tensors(content: Any, path: str | os.PathLike) -> None:
    """Raises `UserError` for a tensor of another kind, or of more numbers than its file holds: `expand` makes a million
    million of one, which the first sum over it would count; and for a dictionary whose methods were replaced."""
    pending, seen, claimed = [("", content)], set(), 0
    while pending:
        key, value = pending.pop()
        if id(value) in seen:  # a list that holds a list twice that holds a list twice …
            continue
        seen.add(id(value))
        key = key[:200]  # a list in a list in a list …
        if isinstance(value, Mapping):
            if strange := getattr(value, "__dict__", {}).keys() - {"_metadata"}:
                raise UserError(f"{path}: {printable(key) or 'it'} has the attribute {short(min(map(str, strange)))}.")
            pending += [(str(name) if not key else f"{key}.{name}", entry) for name, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{key}[{i}]", entry) for i, entry in enumerate(value)]
        elif isinstance(value, torch.Tensor):
            where = f"{path}: {printable(key) or 'it'}"
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
            if not plain or value.dtype not in _DTYPES or value.is_neg():
                kind = f"{value.layout}, {value.dtype}, {value.device}"
                raise UserError(f"{where} is not a plain tensor but {kind}; save it as float32 on the CPU.")
            size, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if size > held:
                raise UserError(f"{where} claims {value.numel():,} numbers of {held:,} bytes; it was expanded.")
            claimed += size
    if claimed > 4 * os.path.getsize(path) + _SLACK:  # a few views of the same numbers are usual
        raise UserError(f"{path} claims tensors of {claimed:,} bytes, many times what it holds.")
