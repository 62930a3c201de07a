"""What a checkpoint is: a folder or a Hub id with a configuration, an image processor, weights, and often a recipe.

Every command opens the one that it is given once, with [`open_checkpoint`], and passes the result on.
"""

import importlib.util
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoConfig

from .cli import invocation
from .configuration import EfficientNetNVConfig
from .errors import UserError, first_line
from .image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .modeling_efficientnet_nv import EfficientNetNVForImageClassification
from .quiet import no_progress_bars, only_errors
from .run_folder import RunFolder


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
        try:
            processor = EfficientNetNVImageProcessor.from_pretrained(self.name)
        except (OSError, ValueError, TypeError) as error:
            missing = "holds no preprocessor_config.json"
            reason = f"has an unusable one: {first_line(error).rstrip('.')}" if self.has_processor else missing
            raise UserError(f"{self.flag} {self.name} {reason}, so it does not say how to prepare images.") from None
        require_one_size(processor, f"{self.flag} {self.name}")
        return processor

    @cached_property
    def has_processor(self) -> bool:
        """False for a folder of weights without a preprocessor_config.json."""
        return not os.path.isdir(self.name) or Path(self.name, "preprocessor_config.json").is_file()

    @property
    def recipe(self) -> str | None:
        """The recipe.yaml of the run that made it, if it lies beside the weights."""
        file = RunFolder(self.name).recipe
        return file.read_text("utf-8") if file.is_file() else None

    def load(self, new_classifier: bool = False, **settings) -> EfficientNetNVForImageClassification:
        """The network with every one of its weights, float32.

        Args:
            new_classifier: where the shapes differ (`settings` name other classes), a freshly initialised one will do.
            settings: fields of the configuration to change.

        Raises:
            UserError: the weights are missing, damaged or of other shapes than `config.json` says.
        """
        where, folder = f"{self.flag} {self.name} cannot be loaded", Path(self.name)
        if folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
            exported = any(folder.glob("*.onnx")) or any(folder.glob("*.xml")) or any(folder.glob("*.pt2"))
            hint = "; it is an export, and its README.md says how to run it" if exported else ""
            raise UserError(f"{where}: it holds no model.safetensors{hint}.")
        try:
            with no_progress_bars(), only_errors():
                model, report = EfficientNetNVForImageClassification.from_pretrained(
                    self.name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
                )
        except SafetensorError as error:
            raise UserError(f"{where}: its weights are damaged ({error}).") from None
        except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:  # the last: modelopt is missing
            raise UserError(f"{where}: {first_line(error)}") from None
        problems = (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"]))
        for problem, entries in problems:
            names = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
            names = [name for name in names if not (new_classifier and name.startswith("classifier."))]
            if names:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise UserError(f"{where}: its weights file {problem} {names[0]}{more}.")
        return model


def open_checkpoint(name: str, flag: str = "--model") -> Checkpoint:
    """Opens one of our checkpoints, a folder or a Hub id, without reading its weights.

    Args:
        flag: the option that names it, for sentences.

    Raises:
        UserError: it is not there, cannot be read, or belongs to another architecture.
    """
    where = f"{flag} {name}"
    looks_local = os.path.exists(name) or name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_local and not Path(name).is_dir():
        reason = "is a file; name the folder that holds it" if Path(name).is_file() else "does not exist"
        raise UserError(f"{where} {reason}.")
    if looks_local and not Path(name, "config.json").is_file():
        raise UserError(f"{where} holds no config.json, so it is not a saved model.")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        hub = "" if looks_local else "there is no such folder here, and on the Hub: "
        raise UserError(f"{where} cannot be opened: {hub}{first_line(error)}") from None
    except (TypeError, AttributeError):
        raise UserError(f"{where} cannot be opened: its config.json is no JSON object.") from None
    if not isinstance(config, EfficientNetNVConfig):
        raise UserError(
            f"{where} is a {config.model_type!r} model, not one of ours;"
            f" if it is an EfficientNet, convert it first: {invocation('convert')} --help"
        )
    if config.quantization and importlib.util.find_spec("modelopt") is None:
        raise UserError(
            f"{where} is quantized and needs NVIDIA's Model Optimizer: pip install nvidia-modelopt requests"
        )
    return Checkpoint(name, flag, config)


def require_one_size(processor: EfficientNetNVImageProcessor, where: str) -> None:
    """Raises `UserError` for a processor without a centre crop: its images have many sizes and make no batch."""
    if not processor.do_center_crop:
        raise UserError(
            f"{where}: its preprocessor_config.json says do_center_crop false, so its images have many sizes and"
            " make no batch; set do_center_crop true there, and crop_size to the size that the network was trained on."
        )
