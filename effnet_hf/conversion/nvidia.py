"""NVIDIA's original: NGC files, `checkpoint.pth.tar`, and what `checkpoint2model.py` wrote.

Names of DeepLearningExamples, PyTorch/Classification/ConvNets. Stages are `layer1.`…`layer7.` in every NGC file and in
the code until 2021, `layers.0.`…`layers.6.` in the code since (whose loader never learnt the older spelling: issues
#1245 and #1268 there). Squeeze-excite weights are 4-D in the first and 2-D in the second.

Quantized checkpoints also hold one `_amax` per quantizer of `pytorch_quantization`, the largest magnitude its 8-bit
range covers. We name a quantizer by the module it sits in front of and the argument of that module's `forward` (or the
parameter) it quantizes: `….se.scale.gate` is the `gate` of `ScaleByGate.forward(gate, x)`.
"""

import copy
import re
from collections.abc import Mapping

import torch

from ..configuration import QUANTIZATION, EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .dialect import OUR_BLOCK, Dialect, expected_shapes, named_variant
from .source import Source


# module in a block, argument of its forward: their quantizer
_BLOCK_QUANTIZERS = {
    ("se.pool", "input"): "se.pooling._input_quantizer",
    ("se.scale", "gate"): "se.mul_a_quantizer",
    ("se.scale", "x"): "se.mul_b_quantizer",
    ("add", "identity"): "residual_quantizer",
}
_QUANTIZERS = {("efficientnet.pooler", "input"): "classifier.pooling._input_quantizer"}
# Every convolution and linear layer has these two.
_LAYER_QUANTIZERS = {"input": "_input_quantizer", "weight": "_weight_quantizer"}


class Nvidia(Dialect):
    name = "nvidia"
    title = "NVIDIA's"
    builder = "NVIDIA's code"
    families = ("b", "widese")
    paddings = ("symmetric",)
    layers = {
        "efficientnet.encoder.stem.conv": "stem.conv",
        "efficientnet.encoder.stem.bn": "stem.bn",
        "efficientnet.head.conv": "features.conv",
        "efficientnet.head.bn": "features.bn",
        "classifier": "classifier.fc",
    }
    block = "layer{layer}.block{block}"
    expanded = {
        "expand.conv": "expand.conv",
        "expand.bn": "expand.bn",
        "depthwise.conv": "depsep.conv",
        "depthwise.bn": "depsep.bn",
        "se.reduce": "se.squeeze",
        "se.expand": "se.expand",
        "project.conv": "proj.conv",
        "project.bn": "proj.bn",
    }
    unexpanded = {ours: theirs for ours, theirs in expanded.items() if not ours.startswith("expand.")}

    def respell(self, key: str) -> str:
        return re.sub(r"^layers\.(\d+)\.", lambda match: f"layer{int(match[1]) + 1}.", key)

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        return {"padding": "symmetric", "hidden_act": "silu"}

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        return EfficientNetNVImageProcessor.for_image_size(config.image_size)

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        script, family = (
            ("quant_main.py", "efficientnet-quant-") if config.quantization else ("main.py", "efficientnet-")
        )
        arch = family + (named_variant(config) or config.variant or "b0")
        line = f"python {script} --arch {arch} --pretrained-from-file {path}"
        if config.num_labels != 1000:
            line += f" --num_classes {config.num_labels}"
        if config.batch_norm_eps != 1e-3:
            line += f" --bn_epsilon {config.batch_norm_eps:g}"
        return line

    # Quantizers.

    def difference(self, config: EfficientNetNVConfig) -> str | None:
        section, plain = config.quantization, copy.copy(config)
        plain.quantization = None
        if section and (section["placement"] != "nvidia" or section["float_layers"]):
            return "quantization (the original has a quantizer at every place of its own, and no other)"
        return super().difference(plain)

    def quantizer_names(self, config: EfficientNetNVConfig) -> dict[str, str]:
        """Our name of every quantizer of the original's quantized models to theirs; b0 has 222, b4 444."""
        names = {}
        for ours, theirs in self.module_names(config).items():
            if not ours.endswith(".bn"):
                names.update({f"{ours}.{port}": f"{theirs}.{other}" for port, other in _LAYER_QUANTIZERS.items()})
        for i, stage in enumerate(config.stages):
            for j in range(stage.num_blocks):
                ours = OUR_BLOCK.format(stage=i, block=j)
                theirs = self.block.format(layer=i + 1, block=j)
                residual = j > 0 or (stage.stride == 1 and stage.in_channels == stage.out_channels)
                for (module, port), other in _BLOCK_QUANTIZERS.items():
                    if residual if module == "add" else config.se_ratio:
                        names[f"{ours}.{module}.{port}"] = f"{theirs}.{other}"
        names.update({f"{module}.{port}": theirs for (module, port), theirs in _QUANTIZERS.items()})
        return names

    def read_quantizers(self, amax: Mapping[str, torch.Tensor], config: EfficientNetNVConfig, where: str) -> dict:
        """`_amax` buffers under our quantizer names: a scalar, or one value per output channel in a shape that
        broadcasts against our weight. Sets `config.quantization` if there are any.

        Raises:
            UserError: a buffer belongs to no quantizer of this variant, does not have its shape, or others are missing.
        """
        if not amax:
            return {}
        names, shapes, found = self.quantizer_names(config), expected_shapes(config), {}
        unknown = set(amax) - {f"{theirs}._amax" for theirs in names.values()}
        if unknown:
            raise UserError(f"{where}: {min(unknown)} belongs to no quantizer of a {config.variant}.")
        if len(amax) < len(names):
            missing = next(theirs for theirs in names.values() if f"{theirs}._amax" not in amax)
            raise UserError(
                f"{where} holds the ranges of {len(amax)} of {len(names)} quantizers, not that of {missing}: "
                "its calibration was not finished."
            )
        for name, theirs in names.items():
            tensor = amax[f"{theirs}._amax"]
            weight = shapes[name] if name.endswith(".weight") else ()
            shape = (weight[0], *[1] * (len(weight) - 1)) if weight else ()
            if tensor.numel() != torch.Size(shape).numel():
                raise UserError(f"{where}: {theirs}._amax is {tuple(tensor.shape)}, should be {shape}.")
            found[name] = tensor.reshape(shape)
        if config.quantization is None:
            # The library these were trained with, version 2.1.0, used -127 to 127.
            config.quantization = {**QUANTIZATION, "narrow_range": True, "float_layers": []}
        return found

    def write_quantizers(self, amax: Mapping[str, torch.Tensor], config: EfficientNetNVConfig) -> dict:
        """The inverse of [`read_quantizers`]."""
        theirs = self.quantizer_names(config)
        return {
            f"{theirs[name]}._amax": tensor.reshape(*tensor.shape, 1, 1) if _is_se_weight(name) else tensor
            for name, tensor in amax.items()
        }


def _is_se_weight(name: str) -> bool:
    return ".se." in name and name.endswith(".weight")


NVIDIA = Nvidia()
