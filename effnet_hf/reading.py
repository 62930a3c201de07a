"""Reading what others wrote, JSON and tensors, as data: nothing in a file runs, and what it claims to hold is compared
with its size before memory is taken for it."""

import json
import os
import re
import reprlib
import stat
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import UserError, first_line, printable


LARGEST_JSON = 64 << 20  # bytes; the names of ImageNet's 21,841 classes, twice, are 2 MB
_SLACK = 1 << 20  # bytes of keys and padding in a file of tensors


def short(value: Any) -> str:
    """A value of others in a sentence, on one line: its beginning, not too deep, for lists can hold lists for ever."""
    brief = reprlib.Repr()
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
    if kind := _not_weights(start):
        raise UserError(f"{path} is {kind}, not a file of weights.")
    if start[8:9] == b"{":
        content, metadata = _read_safetensors(path)
    elif start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        content, metadata = _read_pickle(path, start), {}
    else:
        raise UserError(f"{path} is neither a PyTorch file nor a safetensors file; it starts with {start[:8]!r}.")
    _check_tensors(content, path)
    return content, metadata


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
        if start[:2] == b"PK":  # torch stores without compressing; a compressed file can claim any size
            with zipfile.ZipFile(path) as archive:
                claimed = sum(entry.file_size for entry in archive.infolist())
            if claimed > os.path.getsize(path) + _SLACK:
                raise UserError(f"{path} refused: it unpacks to {claimed:,} bytes, more than it has.")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except Exception as error:  # torch raises a dozen kinds, by where the damage is
        text = str(error)
        if match := re.search(r"(?:GLOBAL|global) ([\w.]+)", text):
            raise UserError(
                f"{path} refused: it holds a pickled {match[1]} besides tensors, and unpickling such objects can run "
                "any code. Where the file is trusted, save its state dict alone: torch.save(model.state_dict(), …)."
            ) from error
        if "weights_only" in text or "Weights only" in text:
            raise UserError(
                f"{path} refused: it does not open with torch.load(weights_only=True), so it holds more than tensors."
            ) from error
        raise UserError(f"{path} is damaged or cut short: {printable(first_line(error))}") from error


def _check_tensors(content: Any, path: str | os.PathLike) -> None:
    """Raises `UserError` for a tensor of another kind, or of more numbers than its file holds: `expand` makes a million
    million of one, which the first sum over it would count."""
    pending, seen, claimed = [("", content)], set(), 0
    while pending:
        key, value = pending.pop()
        if id(value) in seen:  # a list that holds a list twice that holds a list twice …
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            pending += [(str(name) if not key else f"{key}.{name}", entry) for name, entry in value.items()]
        elif isinstance(value, (list, tuple)):
            pending += [(f"{key}[{i}]", entry) for i, entry in enumerate(value)]
        elif isinstance(value, torch.Tensor):
            where = f"{path}: {printable(key)}"
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_nested
            if not plain or value.is_quantized or value.is_complex() or value.is_neg():
                raise UserError(f"{where} is not a plain tensor but {value.layout}, {value.dtype}, {value.device}.")
            size, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
            if size > held:
                raise UserError(f"{where} claims {value.numel():,} numbers of {held:,} bytes; it was expanded.")
            claimed += size
    if claimed > 4 * os.path.getsize(path) + _SLACK:  # a few views of the same numbers are usual
        raise UserError(f"{path} claims tensors of {claimed:,} bytes, many times what it holds.")
