"""Our own names, so that our folders and files go through the same door as everybody's."""

from collections.abc import Mapping

import torch

from ..checkpoint import read_processor_fields
from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .dialect import HEAD, OUR_BLOCK, STEM, Dialect
from .source import Source


class Ours(Dialect):
    name = "effnet_hf"
    title = "our own"
    builder = "effnet_hf"
    families = ("b", "widese", "lite")
    paddings = ("symmetric", "same")
    layers = {name: name for name in (STEM, "efficientnet.encoder.stem.bn", HEAD, "efficientnet.head.bn", "classifier")}
    block = OUR_BLOCK
    expanded = {
        name: name
        for name in (
            *("expand.conv", "expand.bn", "depthwise.conv", "depthwise.bn"),
            *("se.reduce", "se.expand", "project.conv", "project.bn"),
        )
    }
    unexpanded = {ours: theirs for ours, theirs in expanded.items() if not ours.startswith("expand.")}
    se_is_conv = False

    def respell(self, key: str) -> str:
        return f"efficientnet.{key}" if key.startswith(("encoder.", "head.")) else key  # of a model without classifier

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        raise UserError(
            f"{source.name} has our own names and no config.json of ours beside it; names and shapes do not tell "
            "padding or activation, so convert the whole folder."
        )

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        if not source.preprocessor:
            return EfficientNetNVImageProcessor.for_image_size(config.image_size)
        return read_processor_fields(source.preprocessor)

    def read_quantizers(self, amax: Mapping[str, torch.Tensor], config: EfficientNetNVConfig, where: str) -> dict:
        return {key.removesuffix("_quantizer._amax"): tensor for key, tensor in amax.items()}

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        return f'AutoModelForImageClassification.from_pretrained("{path}", trust_remote_code=True)'


OURS = Ours()
