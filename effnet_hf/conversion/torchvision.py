"""torchvision's `efficientnet_b0` to `efficientnet_b7`.

The same function as NVIDIA's plain variants: symmetric padding, squeeze widths from the block's input. Batch norm's
epsilon is 1e-5 for b0 to b4 and 1e-3 for b5 to b7 (torchvision/models/efficientnet.py). There is no WideSE.
"""

from collections.abc import Mapping

from PIL import Image

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..reading import short
from .dialect import Dialect, named_variant
from .source import Source, is_side


_FILTERS = {filter_.name.lower(): filter_ for filter_ in Image.Resampling}
_BIG = ("b5", "b6", "b7")  # built with TensorFlow's batch norm settings


class Torchvision(Dialect):
    name = "torchvision"
    title = "torchvision's"
    builder = "torchvision"
    families = ("b",)
    paddings = ("symmetric",)
    layers = {
        "efficientnet.encoder.stem.conv": "features.0.0",
        "efficientnet.encoder.stem.bn": "features.0.1",
        "efficientnet.head.conv": "features.8.0",
        "efficientnet.head.bn": "features.8.1",
        "classifier": "classifier.1",
    }
    block = "features.{layer}.{block}.block"
    expanded = {
        "expand.conv": "0.0",
        "expand.bn": "0.1",
        "depthwise.conv": "1.0",
        "depthwise.bn": "1.1",
        "se.reduce": "2.fc1",
        "se.expand": "2.fc2",
        "project.conv": "3.0",
        "project.bn": "3.1",
    }
    unexpanded = {
        "depthwise.conv": "0.0",
        "depthwise.bn": "0.1",
        "se.reduce": "1.fc1",
        "se.expand": "1.fc2",
        "project.conv": "2.0",
        "project.bn": "2.1",
    }

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        eps, momentum = (1e-3, 0.01) if variant in _BIG else (1e-5, 0.1)
        return {
            "padding": "symmetric",
            "hidden_act": "silu",
            "batch_norm_eps": eps,
            "batch_norm_momentum": momentum,
            "image_size": _evaluation(variant, source)["crop_size"],
            "stochastic_depth_mode": "row",
        }

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        transforms, settings = _transforms(str(config.variant)), _evaluation(str(config.variant), source)
        return EfficientNetNVImageProcessor(
            size=config.image_size + settings["size"] - settings["crop_size"],
            crop_size=config.image_size,
            resample=_FILTERS[settings["interpolation"]],
            image_mean=transforms.mean,
            image_std=transforms.std,
        )

    def notes(self, config: EfficientNetNVConfig, source: Source) -> list[str]:
        return ["Images are prepared as the trainer's args in the file say."] if _trained(source) else []

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        variant = named_variant(config)
        arguments = "" if config.num_labels == 1000 else f", num_classes={config.num_labels}"
        if config.batch_norm_eps != (1e-3 if variant in _BIG else 1e-5):
            arguments += f", norm_layer=functools.partial(torch.nn.BatchNorm2d, eps={config.batch_norm_eps:g})"
        load = "safetensors.torch.load_file" if path.endswith(".safetensors") else "torch.load"
        model = f'torchvision.models.get_model("efficientnet_{variant}"{arguments})'
        return f'model = {model}; model.load_state_dict({load}("{path}"))'


def _trained(source: Source) -> dict:
    """How torchvision's train.py evaluated images, from the `args` that it wrote; nothing where it did not."""
    args = source.trainer.get("args")
    names = {"size": "val_resize_size", "crop_size": "val_crop_size", "interpolation": "interpolation"}
    if not isinstance(args, Mapping) or not all(args.get(name) for name in names.values()):
        return {}
    for name in ("val_resize_size", "val_crop_size"):
        if not is_side(args[name]):
            raise UserError(f"{source.name}: args: {name} must be a number of pixels, got {short(args[name])}.")
    if args["interpolation"] not in [*_FILTERS]:
        filters = ", ".join(_FILTERS)
        raise UserError(
            f"{source.name}: args: interpolation must be one of {filters}; got {short(args['interpolation'])}."
        )
    return {field: args[name] for field, name in names.items()}


def _evaluation(variant: str, source: Source) -> dict:
    transforms = _transforms(variant)
    sides = {"size": transforms.resize_size[0], "crop_size": transforms.crop_size[0]}
    return _trained(source) or {**sides, "interpolation": transforms.interpolation.value}


def _transforms(variant: str):
    from torchvision.models import get_model_weights

    if not variant.startswith("b"):
        raise UserError(f"torchvision has no {variant}: its names hold B0 to B7.")
    return next(iter(get_model_weights(f"efficientnet_{variant}"))).transforms()


TORCHVISION = Torchvision()
