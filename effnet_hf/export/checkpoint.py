"""An opened checkpoint folder: everything an export needs of it."""

import json
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..training import check_checkpoint, load_model, load_processor
from .options import ExportOptions


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: everything an export needs of it."""

    name: str
    model: EfficientNetNVForImageClassification
    processor: EfficientNetNVImageProcessor
    recipe: str | None = None

    @property
    def quantized(self) -> bool:
        return self.model.config.quantization is not None

    @property
    def labels(self) -> list[str]:
        config = self.model.config
        return [config.id2label[i] for i in range(config.num_labels)]

    @property
    def image_size(self) -> int:
        return self.processor.crop_size["height"]


def open_checkpoint(model: str) -> Checkpoint:
    """Raises `UserError` when it is not one of our classifiers."""
    config = check_checkpoint(model)
    if not config.num_labels:
        raise UserError(f"--model {model} has no classes; export needs a classifier.")
    network, recipe = load_model(model).float().eval(), Path(model, "recipe.yaml")
    return Checkpoint(model, network, load_processor(model), recipe.read_text("utf-8") if recipe.is_file() else None)


def properties(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, object]:
    """What somebody needs who has nothing but the file."""
    processor, config = checkpoint.processor, checkpoint.model.config
    facts = {
        "labels": checkpoint.labels,
        "variant": config.variant or "custom",
        "image_size": checkpoint.image_size,
        "resize_shortest_edge": processor.size["shortest_edge"],
        "resample": "bilinear" if processor.resample == 2 else "bicubic",
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "dtype": options.dtype,
    }
    if checkpoint.recipe:
        facts["recipe"] = checkpoint.recipe
    return facts


def describe(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and preprocessor_config.json, each with the code that opens it where this package is missing."""
    checkpoint.model.config.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    # The file replaces the weights that a model class would look for.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    automatic = {name: place for name, place in config.get("auto_map", {}).items() if name == "AutoConfig"}
    config["auto_map"] = automatic or {"AutoConfig": "configuration.EfficientNetNVConfig"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
