"""The model and the image processor that a recipe asks for, fresh or from a checkpoint."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from safetensors import SafetensorError
from transformers import AutoConfig

from ..configuration import EfficientNetNVConfig
from ..errors import UserError, first_line
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..quiet import no_progress_bars, only_errors
from ..recipes import Recipe


FILTERS: dict[Literal["bilinear", "bicubic"], int] = {"bilinear": Image.BILINEAR, "bicubic": Image.BICUBIC}


def check_checkpoint(name_or_path: str) -> EfficientNetNVConfig:
    """The configuration of one of our checkpoints, a folder or a Hub id.

    Raises:
        UserError: it is not there, cannot be read, or belongs to another architecture.
    """
    looks_local = (
        os.path.exists(name_or_path) or name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    )
    if looks_local and not Path(name_or_path).is_dir():
        reason = "is a file; name the folder that holds it" if Path(name_or_path).is_file() else "does not exist"
        raise UserError(f"--model {name_or_path} {reason}.")
    if looks_local and not Path(name_or_path, "config.json").is_file():
        raise UserError(f"--model {name_or_path} holds no config.json, so it is not a saved model.")
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {name_or_path} cannot be opened: {first_line(error)}") from None
    except (TypeError, AttributeError):
        raise UserError(f"--model {name_or_path} cannot be opened: its config.json is no JSON object.") from None
    if not isinstance(config, EfficientNetNVConfig):
        raise UserError(
            f"--model {name_or_path} is a {config.model_type!r} model, not one of ours;"
            " if it is an EfficientNet, convert it first: python convert.py --help"
        )
    if config.quantization and importlib.util.find_spec("modelopt") is None:
        raise UserError(
            f"--model {name_or_path} is quantized and needs NVIDIA's Model Optimizer:"
            " pip install nvidia-modelopt requests"
        )
    return config


def load_processor(name_or_path: str) -> EfficientNetNVImageProcessor:
    """How a checkpoint's pictures are prepared.

    Raises:
        UserError: it does not say, or not in a way that can be read.
    """
    try:
        return EfficientNetNVImageProcessor.from_pretrained(name_or_path)
    except (OSError, ValueError, TypeError) as error:
        missing = os.path.isdir(name_or_path) and not Path(name_or_path, "preprocessor_config.json").is_file()
        reason = "holds no preprocessor_config.json" if missing else f"has an unusable one: {first_line(error)}"
        raise UserError(f"--model {name_or_path} {reason}, so it does not say how to prepare pictures.") from None


def load_model(name_or_path: str, new_classifier: bool = False, **settings) -> EfficientNetNVForImageClassification:
    """A checkpoint's network with every one of its weights.

    Args:
        new_classifier: where the shapes differ (`settings` name other classes), a freshly initialised one will do.
        settings: for `from_pretrained`.

    Raises:
        UserError: the weights are missing, damaged or of other shapes than `config.json` says.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not any(file.suffix in (".safetensors", ".bin") for file in folder.iterdir()):
        exported = any(folder.glob("*.onnx")) or any(folder.glob("*.xml")) or any(folder.glob("*.pt2"))
        hint = "; it is an export, and its README.md says how to run it" if exported else ""
        raise UserError(f"--model {name_or_path} cannot be loaded: it holds no model.safetensors{hint}.")
    try:
        with no_progress_bars(), only_errors():
            model, report = EfficientNetNVForImageClassification.from_pretrained(
                name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **settings
            )
    except SafetensorError as error:
        raise UserError(f"--model {name_or_path} cannot be loaded: its weights are damaged ({error}).") from None
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:  # the last: modelopt is missing
        raise UserError(f"--model {name_or_path} cannot be loaded: {first_line(error)}") from None
    for problem, entries in (("lacks", report["missing_keys"]), ("has another shape of", report["mismatched_keys"])):
        names = sorted(entry if isinstance(entry, str) else entry[0] for entry in entries)
        names = [name for name in names if not (new_classifier and name.startswith("classifier."))]
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(f"--model {name_or_path} cannot be loaded: its weights file {problem} {names[0]}{more}.")
    return model


def build_processor(recipe: Recipe, image_size: int) -> EfficientNetNVImageProcessor:
    """Evaluation preprocessing: a checkpoint's own mean and standard deviation, the recipe's size and filter."""
    processor = EfficientNetNVImageProcessor()
    if recipe.model:
        try:
            processor = EfficientNetNVImageProcessor.from_pretrained(recipe.model)
        except (OSError, ValueError):  # weights without a preprocessor file: ImageNet's statistics
            pass
    return EfficientNetNVImageProcessor.for_image_size(
        image_size,
        margin=recipe.resize_margin,
        resample=FILTERS[recipe.interpolation],
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )


def changed_preparation(processor: EfficientNetNVImageProcessor, name_or_path: str) -> str | None:
    """What `processor` does to pictures that a checkpoint's own does otherwise, with the flags that would keep it."""
    try:
        own = load_processor(name_or_path)
    except UserError:  # it does not say
        return None
    names = {value: name for name, value in FILTERS.items()}
    ways = []
    for each in (processor, own):
        size = each.crop_size["height"]
        margin = each.size["shortest_edge"] - size
        ways.append({"image_size": size, "resize_margin": margin, "interpolation": names.get(each.resample)})
    changed = [name for name in ways[0] if ways[0][name] != ways[1][name] and ways[1][name] is not None]
    if not changed:
        return None
    here, there = (", ".join(f"{name} {way[name]}" for name in changed) for way in ways)
    flags = " ".join(f"--{name} {ways[1][name]}" for name in changed)
    return f"{here}, where --model was evaluated with {there}; {flags} keeps that"


def image_size_of(recipe: Recipe) -> int:
    """The recipe's size, else the checkpoint's, else the variant's."""
    if recipe.image_size:
        return recipe.image_size
    return check_checkpoint(recipe.model).image_size if recipe.model else recipe.model_config().image_size


def build_model(recipe: Recipe, class_names: list[str]) -> EfficientNetNVForImageClassification:
    """A fresh network, or a checkpoint's weights with a new classifier if its classes are not these.

    Raises:
        UserError: `num_labels` insists on another number, or the checkpoint cannot be used.
    """
    if recipe.num_labels not in (None, len(class_names)):
        raise UserError(f"--num_labels {recipe.num_labels} was asked for, but the data has {len(class_names)} classes.")
    id2label = dict(enumerate(class_names))
    labels: dict[str, Any] = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    if not recipe.model:
        return EfficientNetNVForImageClassification(recipe.model_config(**labels))
    config = check_checkpoint(recipe.model)
    quantizes = recipe.placement != "none" or config.quantization is not None
    if has_classes(config, class_names, by_position=quantizes):
        if "LABEL_0" not in config.label2id:
            labels = {}  # it keeps the names that it has
        return load_model(recipe.model, **labels, **recipe.architecture_overrides())
    if quantizes:
        raise UserError(
            f"--model {recipe.model} knows other classes than the data, and quantizing keeps the classifier;"
            " fine-tune the float model on these first, with train.py."
        )
    model = load_model(recipe.model, new_classifier=True, **labels, **recipe.architecture_overrides())
    model._init_weights(model.classifier)  # perhaps as many classes, but other ones: the old head means nothing
    return model


def has_classes(config: EfficientNetNVConfig, class_names: list[str], by_position: bool = False) -> bool:
    """Whether a checkpoint's classifier is for these classes.

    One that names none is, if their number fits; and so is one of ImageNet's thousand in words for its wnid folders.

    Args:
        by_position: take any classes for the same whose names are all others and whose number fits, as validation does.
    """
    known = [config.id2label[i] for i in sorted(config.id2label)]
    if known in (class_names, [f"LABEL_{i}" for i in range(len(class_names))]):
        return True
    imagenet = len(class_names) == 1000 and all(re.fullmatch(r"n\d{8}", name) for name in class_names)
    return (by_position or imagenet) and len(known) == len(class_names) and not set(known) & set(class_names)


def build_teacher(recipe: Recipe, class_names: list[str]) -> EfficientNetNVForImageClassification | None:
    """The model to distil from, in evaluation mode, if the recipe distils.

    Raises:
        UserError: there is none, or its classes are not the data's.
    """
    if not recipe.distillation_weight:
        return None
    name = recipe.teacher or recipe.model
    if name is None:
        raise UserError("--distillation_weight needs a --teacher, or a --model to start from.")
    config = check_checkpoint(name)
    if not has_classes(config, class_names, by_position=recipe.placement != "none"):
        raise UserError(f"--teacher {name} knows other classes than the data.")
    return load_model(name).eval().requires_grad_(False)
