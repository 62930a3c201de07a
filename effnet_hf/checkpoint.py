"""What a checkpoint is: a folder or a Hub id with a configuration, an image processor, weights, and often a recipe.

Every command opens the one that it is given once, with [`open_checkpoint`], and passes the result on.
"""

import importlib.util
import inspect
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from .cli import invocation, say
from .configuration import EfficientNetNVConfig
from .errors import UserError, first_line, printable
from .image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .manifest import MANIFEST, problem
from .modeling_efficientnet_nv import EfficientNetNVForImageClassification
from .quantization_efficientnet_nv import uncalibrated
from .quiet import no_progress_bars
from .reading import read_json, read_tensors, short, wrong_numbers
from .run_folder import RunFolder


CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"
_PICKLE = "pytorch_model.bin"  # of old ones
INDEXES = (f"{WEIGHTS}.index.json", f"{_PICKLE}.index.json")  # of large ones, in several files
_LABELS = ("num_labels", "id2label", "label2id", "problem_type")


@dataclass(frozen=True)
class Checkpoint:
    """One of our checkpoints, opened: what it says of itself. `load()` reads the weights.

    Attributes:
        name: the folder or Hub id.
        flag: the option that named it, for sentences.
        config: its architecture and classes.
    """

    name: str
    flag: str
    config: EfficientNetNVConfig

    @property
    def class_names(self) -> list[str]:
        """In label order."""
        return [self.config.id2label[i] for i in sorted(self.config.id2label)]

    @property
    def quantized(self) -> bool:
        return self.config.quantization is not None

    @cached_property
    def processor(self) -> EfficientNetNVImageProcessor:
        """How its images are prepared.

        Raises:
            UserError: it does not say, or not in a way that can be read or done.
        """
        return read_processor(self.name, f"{self.flag} {self.name}")

    @cached_property
    def has_processor(self) -> bool:
        """False for a folder of weights without a preprocessor_config.json."""
        return not os.path.isdir(self.name) or os.path.lexists(Path(self.name, PROCESSOR))

    @property
    def recipe(self) -> str | None:
        """The recipe.yaml of the run that made it, if it lies beside the weights."""
        file = RunFolder(self.name).recipe
        return file.read_text("utf-8", "replace") if file.is_file() else None

    def load(self, new_classifier: bool = False, **settings) -> EfficientNetNVForImageClassification:
        """The network with every one of its weights, float32, in evaluation mode.

        transformers' own `from_pretrained` is not asked: it follows what other files of a folder say (adapters,
        quantization methods), and takes weights for missing that are not finite.

        Args:
            new_classifier: where the shapes differ (`settings` name other classes), a freshly initialised one will do.
            settings: fields of the configuration to change.

        Raises:
            UserError: there is no classifier, or the weights are missing, damaged or of other shapes than `config.json`
                says.
        """
        if not (self.config.num_labels or new_classifier):
            raise UserError(
                f"{self.flag} {self.name} has no classifier, so it tells no classes;"
                f" train one on its features: {invocation('train')} --model {printable(self.name)}"
            )
        where = f"{self.flag} {self.name} cannot be loaded"
        try:
            config = EfficientNetNVConfig.from_dict(self.config.to_dict(), **settings)
            with torch.device("meta"):  # every tensor is replaced, so no initial values are drawn
                model = EfficientNetNVForImageClassification(config)
        except (ValueError, RuntimeError, ImportError) as error:  # the last: modelopt is missing
            raise UserError(f"{where}: {first_line(error)}") from None
        weights, own = _prefixed(read_weights(self.name, where)), model.state_dict()
        fresh = {name for name in own if new_classifier and name.startswith("classifier.")}
        fresh -= {name for name in fresh & weights.keys() if weights[name].shape == own[name].shape}
        shared = own.keys() & weights.keys() - fresh
        for fault, names in (
            ("lacks", own.keys() - weights.keys() - fresh),
            ("has no use for", {name for name in weights.keys() - own.keys() if not name.startswith("classifier.")}),
            ("has another shape of", {name for name in shared if weights[name].shape != own[name].shape}),
            ("holds other numbers than weights in", {n for n in shared if weights[n].dtype != own[n].dtype}),
        ):
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{where}: its weights file {fault} {printable(min(names))}{more}.")
        kept = {name: weights[name].clone() for name in own.keys() - fresh}
        model.load_state_dict(kept, strict=False, assign=True)
        if fresh:
            model.classifier.to_empty(device="cpu")
            model._init_weights(model.classifier)
        if missing := uncalibrated(model):
            raise UserError(f"{where}: {len(missing)} of its quantizers have no range, e.g. {missing[0]}.")
        return model.eval()


def open_checkpoint(name: str, flag: str = "--model") -> Checkpoint:
    """Opens one of our checkpoints, a folder or a Hub id, without reading its weights or running its code.

    Args:
        flag: the option that names it, for sentences.

    Raises:
        UserError: it is not there, cannot be read, belongs to another architecture, or takes no RGB images.
    """
    if not name:
        raise UserError(f"{flag} is empty; name a folder or a Hub id.")
    name = os.path.expanduser(name)
    where = f"{flag} {printable(name)}"
    looks_local = os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not os.path.isdir(name):
        reason = "is a file; name the folder that holds it" if os.path.exists(name) else "does not exist"
        raise UserError(f"{where} {reason}.")
    if looks_local and not Path(name, CONFIG).exists():
        raise UserError(f"{where} holds no config.json, so it is not a saved model.")
    config = read_config(name, where)
    if config.num_channels != 3:
        raise UserError(f"{where} is for images of {config.num_channels} channels, and ours are prepared as RGB, of 3.")
    if config.problem_type == "regression":
        raise UserError(f"{where} is for regression (problem_type in its {CONFIG}), and ours tell classes.")
    if config.quantization and importlib.util.find_spec("modelopt") is None:
        raise UserError(
            f"{where} is quantized and needs NVIDIA's Model Optimizer: pip install nvidia-modelopt requests"
        )
    say_what_was_edited(name, where)
    return Checkpoint(name, flag, config)


def say_what_was_edited(name: str, where: str) -> None:
    """A line where configuration or processor are others than the folder's manifest says: people do edit by hand."""
    if os.path.isfile(Path(name, MANIFEST)) and (change := problem(Path(name), only=(CONFIG, PROCESSOR))):
        say(f"{where}: {change}; it is taken as it is now")


def require_as_written(name: str, files: Iterable[str], where: str) -> None:
    """Raises `UserError` where these files of a folder are not what its manifest says; a folder may have none."""
    if os.path.isfile(Path(name, MANIFEST)) and (damage := problem(Path(name), only=tuple(files))):
        raise UserError(f"{where}: {damage}; where you changed it yourself, remove {MANIFEST}.")


def read_config(name: str, where: str) -> EfficientNetNVConfig:
    """The configuration of one of our networks in a folder or on the Hub: its fields, and nothing else of the file.

    Args:
        where: what to call it in a sentence.

    Raises:
        UserError: there is none, it is another architecture's, or a field is wrong.
    """
    file = _find(name, CONFIG, where)
    if file is None:
        raise UserError(f"{where} holds no config.json, so it is not a saved model.")
    fields = _opened(read_json, file, where)
    kind = fields.get("model_type")
    if kind != EfficientNetNVConfig.model_type:
        named = f"is a {short(kind)} model" if kind else "names no model_type in its config.json, so it is"
        raise UserError(
            f"{where} {named}, not one of ours;"
            f" if it is an EfficientNet, convert it first: {invocation('convert')} --help"
        )
    try:
        return read_config_fields(fields)
    except Exception as error:  # ours say what is wrong; transformers' are of many kinds
        raise UserError(f"{where} cannot be opened: {file}: {printable(first_line(error))}") from None


def read_processor(name: str, where: str) -> EfficientNetNVImageProcessor:
    """How images are prepared for the network in a folder or on the Hub.

    Args:
        where: what to call it in a sentence.

    Raises:
        UserError: it does not say, or not in a way that can be read or done.
    """
    file = _find(name, PROCESSOR, where)
    if file is None:
        raise UserError(f"{where} holds no preprocessor_config.json, so it does not say how to prepare images.")
    try:
        processor = read_processor_fields(read_json(file))
    except (UserError, ValueError, TypeError) as error:
        reason = printable(first_line(error)).rstrip(".")
        reason = reason if str(file) in reason else f"{file}: {reason}"
        raise UserError(f"{where} does not say how to prepare images, its file is unusable: {reason}.") from None
    require_one_size(processor, where)
    return processor


def read_config_fields(fields: dict) -> EfficientNetNVConfig:
    """A configuration of what a config.json says: of the fields that it knows. transformers would take every other one
    as an attribute: code to run, a method.

    Raises:
        ValueError: a field is wrong; transformers raises other kinds, too.
    """
    known = {*inspect.signature(EfficientNetNVConfig).parameters, *_LABELS} - {"kwargs"}
    return EfficientNetNVConfig(**{name: value for name, value in fields.items() if name in known})


def read_processor_fields(fields: dict) -> EfficientNetNVImageProcessor:
    """The same of a preprocessor_config.json."""
    known = {*inspect.signature(EfficientNetNVImageProcessor).parameters} - {"kwargs"}
    processor = EfficientNetNVImageProcessor(**{name: value for name, value in fields.items() if name in known})
    require_finite_pixels(processor)
    return processor


def require_finite_pixels(processor: EfficientNetNVImageProcessor) -> None:
    """Raises `ValueError` for settings that are numbers each, and together make infinity of a white pixel."""
    white = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    if processor.do_normalize:
        white = max((white + abs(mean)) / std for mean, std in zip(processor.image_mean, processor.image_std))
    if white > 1e30:
        raise ValueError(f"rescale_factor, image_mean and image_std make pixels as large as {white:.0e}.")


def read_weights(name: str, where: str) -> dict[str, torch.Tensor]:
    """The tensors of a folder or Hub id by name, from safetensors, in one file or several, or an old PyTorch file:
    finite, and float32 where they are floating-point numbers.

    Args:
        where: how a sentence begins.

    Raises:
        UserError: there are none, or they are damaged, not those of the folder's manifest, or more than data.
    """
    if file := _find(name, WEIGHTS, where):
        files: dict[Path, set[str]] = {file: set()}
    elif file := _find(name, INDEXES[0], where) or _find(name, INDEXES[1], where):
        files = _shards(name, file, where)
    elif file := _find(name, _PICKLE, where):
        files = {file: set()}
    else:
        folder = Path(name)
        exported = folder.is_dir() and any(any(folder.glob(kind)) for kind in ("*.onnx", "*.xml", "*.pt2"))
        hint = "; it is an export, and its README.md says how to run it" if exported else ""
        raise UserError(f"{where}: it holds no {WEIGHTS}{hint}.")
    require_as_written(name, {WEIGHTS, file.name, *(each.name for each in files)}, where)
    weights = _read_files(files, file, where)
    for key, tensor in weights.items():
        weights[key] = tensor = tensor.detach().float() if tensor.is_floating_point() else tensor.detach()
        # A quantizer without a range has NaN, which `load` has a sentence for.
        if fault := wrong_numbers(key, tensor.nan_to_num() if key.endswith("._amax") else tensor):
            raise UserError(f"{where}: its weights file {fault} in {printable(key)}.")
    return weights


def read_shards(index: Path, where: str) -> dict[str, torch.Tensor]:
    """The tensors of the files beside an index, `model.safetensors.index.json` for one, as they stand there.

    Raises:
        UserError: it names other files, or one that is missing, damaged, or holds other tensors.
    """
    files = _shards(str(index.parent), index, where)
    require_as_written(str(index.parent), {index.name, *(each.name for each in files)}, where)
    return _read_files(files, index, where)


def _shards(name: str, index: Path, where: str) -> dict[Path, set[str]]:
    """The files that an index of a folder or Hub id names, and the names of the tensors in each."""
    parts, ending = _parts(_opened(read_json, index, where).get("weight_map")), index.name.split(".")[-3]
    if not parts or any(Path(part).name != part or not part.endswith(f".{ending}") for part in parts):
        raise UserError(f"{where}: {index} should name .{ending} files beside it, and no others.")
    files = {}
    for part in sorted(parts):
        if (found := _find(name, part, where)) is None:
            raise UserError(f"{where}: there is no {printable(part)}, which {index} names.")
        files[found] = parts[part]
    return files


def _read_files(files: dict[Path, set[str]], index: Path, where: str) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = {}
    for each, names in files.items():
        tensors = _opened(read_tensors, each, where)[0]
        if not isinstance(tensors, dict) or not all(
            isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in tensors.items()
        ):
            raise UserError(f"{where}: {each} is not a dictionary of tensors by name.")
        if names and (others := tensors.keys() ^ names):
            raise UserError(f"{where}: {index} does not say in which file {printable(min(others))} is.")
        weights |= tensors
    return weights


def require_one_size(processor: EfficientNetNVImageProcessor, where: str) -> None:
    """Raises `UserError` for a processor without a centre crop: its images have many sizes and make no batch."""
    if not processor.do_center_crop:
        raise UserError(
            f"{where}: its preprocessor_config.json says do_center_crop false, so its images have many sizes and"
            " make no batch; set do_center_crop true there, and crop_size to the size that the network was trained on."
        )


def _find(name: str, file: str, where: str) -> Path | None:
    """A file of a folder, or of a Hub id, downloaded; None where there is none."""
    if os.path.isdir(name):
        return Path(name, file) if os.path.lexists(Path(name, file)) else None
    try:
        with no_progress_bars():
            found = cached_file(name, file, _raise_exceptions_for_missing_entries=file == CONFIG)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{where} cannot be opened: there is no such folder here, and on the Hub: {first_line(error)}"
        ) from None
    return None if found is None else Path(found)


def _opened(read, file: Path, where: str):
    try:
        return read(file)
    except UserError as error:
        raise UserError(f"{where}{'' if 'cannot' in where else ' cannot be opened'}: {error}") from None


def _prefixed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Under the classifier's names also where the network was saved without one."""
    bare = not any(name.startswith("efficientnet.") for name in weights)
    return {f"efficientnet.{name}": tensor for name, tensor in weights.items()} if bare else weights


def _parts(weight_map: Any) -> dict[str, set[str]]:
    """The names of the tensors by the file that holds them; nothing where a map of names to files is none."""
    parts: dict[str, set[str]] = {}
    for tensor, file in weight_map.items() if isinstance(weight_map, dict) else ():
        if not isinstance(file, str):
            return {}
        parts.setdefault(file, set()).add(tensor)
    return parts
