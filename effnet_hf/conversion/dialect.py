"""What a foreign dialect is: one table of names, read in both directions, and a few facts about the foreign model.

Our names are the keys of `EfficientNetNVForImageClassification.state_dict()`. A dialect maps *modules*, not keys: the
tensors of a convolution, a batch norm or a linear layer have the same last name (`weight`, `running_mean`, …) wherever
PyTorch is spoken.
"""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import ClassVar

import torch

from ..configuration import VARIANTS, EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from .source import Source


OUR_BLOCK = "efficientnet.encoder.stages.{stage}.blocks.{block}"
STEM, HEAD, _HEAD_NORM = "efficientnet.encoder.stem.conv", "efficientnet.head.conv", "efficientnet.head.bn"
_NAMES_IN_A_MESSAGE = 8
_FAMILIES = {"b": "B0 to B7", "widese": "WideSE", "lite": "Lite"}
_PADDINGS = {"symmetric": "symmetric", "same": "TensorFlow's SAME"}


class Dialect:
    """One foreign spelling of EfficientNet. Subclasses fill the tables; nothing else in the package knows their names.

    Attributes:
        name: how the command line calls it.
        title: how a sentence calls it; `builder`: who builds its models.
        families, paddings: which of ours its models can be.
        layers: our module name to theirs, for everything outside the blocks.
        block: their prefix of a block, a format string of `stage` and `layer` (counted from 0 and from 1), `block`
            (within its stage) and `flat` (over all stages).
        expanded, unexpanded: our module name to theirs within a block, for expansion ratios above 1 and of 1.
        se_is_conv: their squeeze-excite layers are 1x1 convolutions, with 4-D weights; ours are linear.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    builder: ClassVar[str]
    families: ClassVar[tuple[str, ...]]
    paddings: ClassVar[tuple[str, ...]]
    layers: ClassVar[Mapping[str, str]]
    block: ClassVar[str]
    expanded: ClassVar[Mapping[str, str]]
    unexpanded: ClassVar[Mapping[str, str]]
    se_is_conv: ClassVar[bool] = True

    # What the foreign model computes.

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        """Configuration fields that make our model the same function as theirs, on top of the variant's.

        Raises:
            UserError: names and shapes leave more than one answer; the message lists the candidates.
        """
        raise NotImplementedError

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        """The evaluation preprocessing that belongs to the weights."""
        raise NotImplementedError

    def read_difference(self, config: EfficientNetNVConfig, source: Source) -> str | None:
        """How the foreign model of `source` differs from ours under `config`; `None` when it is the same function."""
        return None

    def notes(self, config: EfficientNetNVConfig, source: Source) -> list[str]:
        """What a reader of the converted model must know, one sentence each."""
        return []

    def difference(self, config: EfficientNetNVConfig) -> str | None:
        """How every model of theirs differs from ours under `config`; `None` when one is the same function."""
        variant = named_variant(config)
        family = re.sub(r"(-b)?\d$", "", variant) if variant else None
        if family not in self.families:
            known = " and ".join(_FAMILIES[name] for name in self.families)
            return f"architecture ({self.builder} has {known}; this is {variant or 'of another shape'})"
        if config.padding not in self.paddings:
            return f"padding ({_PADDINGS[config.padding]} here, {_PADDINGS[self.paddings[0]]} there)"
        if config.quantization:
            return f"quantization ({self.builder} has no quantizers)"
        activation = "relu6" if family == "lite" else "silu"
        if config.hidden_act.replace("swish", "silu") != activation:
            return f"activation ({config.hidden_act} here, {activation} there)"
        return None

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        """The line of Python or shell that opens a written file at their side."""
        raise NotImplementedError

    def as_trained(self, source: Source, arch: str | None) -> tuple[Source, str | None, list[str]]:
        """`source` and the architecture with what the dialect's own trainer wrote of its settings beside the weights,
        and notes on it."""
        return source, arch, []

    # Names.

    def respell(self, key: str) -> str:
        """A key in the spelling of the tables, from any other spelling their releases have used."""
        return key

    def module_names(self, config: EfficientNetNVConfig) -> dict[str, str]:
        """Our name of every module that owns tensors, in our order, to theirs."""
        inside, flat = {}, 0
        for i, stage in enumerate(config.stages):
            table = self.unexpanded if stage.expand_ratio == 1 else self.expanded
            for j in range(stage.num_blocks):
                ours = OUR_BLOCK.format(stage=i, block=j)
                theirs = self.block.format(stage=i, layer=i + 1, block=j, flat=flat)
                for name, other in table.items():
                    if config.se_ratio or not name.startswith("se."):
                        inside[f"{ours}.{name}"] = f"{theirs}.{other}"
                flat += 1
        layers = dict(self.layers)
        stem = {name: layers.pop(name) for name in list(layers) if name.startswith("efficientnet.encoder.stem")}
        return {**stem, **inside, **layers}

    def has_classifier(self, keys: Iterable[str]) -> bool:
        return any(key.startswith(f"{self.layers['classifier']}.") for key in keys)

    def is_backbone(self, keys: Iterable[str]) -> bool:
        """Whether there are neither a classifier nor the convolution before it: a backbone of feature maps."""
        last = tuple(f"{self.layers[name]}." for name in (HEAD, _HEAD_NORM, "classifier"))
        return not any(key.startswith(last) for key in keys)

    # Tensors.

    def read(self, tensors: Mapping[str, torch.Tensor], config: EfficientNetNVConfig, where: str) -> dict:
        """Our state dict from theirs, bit for bit; a missing `num_batches_tracked` is 0.

        Args:
            tensors: keys as [`respell`] returns them.
            where: what to call the file in an error.

        Raises:
            UserError: names every key that is missing, left over, or of the wrong shape.
        """
        names, expected = self.key_names(config), expected_shapes(config)
        if self.is_backbone(tensors):
            names = {ours: theirs for ours, theirs in names.items() if not ours.startswith("efficientnet.head.")}
        optional = {theirs for theirs in names.values() if theirs.endswith(".num_batches_tracked")}
        shapes = {theirs: self._their_shape(ours, expected[ours]) for ours, theirs in names.items()}
        # Squeeze-excite layers are accepted in both forms, whatever the dialect's own.
        wrong = [
            f"{key} is {tuple(tensors[key].shape)}, should be {shape}"
            for key, shape in shapes.items()
            if key in tensors and _squeezed(tensors[key].shape) != _squeezed(shape)
        ]
        problems = (
            _listed("missing", [key for key in shapes if key not in tensors and key not in optional]),
            _listed("unexpected", [key for key in tensors if key not in shapes]),
            _listed("wrong shape:", wrong),
        )
        if any(problems):
            variant = config.variant or "custom"
            found = "; ".join(filter(None, problems))
            raise UserError(f"{where} is not a whole {variant} in {self.title} names: {found}.")
        return {
            ours: tensors[theirs].reshape(expected[ours]) if theirs in tensors else torch.zeros((), dtype=torch.int64)
            for ours, theirs in names.items()
        }

    def write(self, state: Mapping[str, torch.Tensor], config: EfficientNetNVConfig) -> dict:
        """Their state dict from ours, bit for bit."""
        names = self.key_names(config)
        return {names[ours]: tensor.reshape(self._their_shape(ours, tensor.shape)) for ours, tensor in state.items()}

    def read_quantizers(self, amax: Mapping[str, torch.Tensor], config: EfficientNetNVConfig, where: str) -> dict:
        """The ranges of a quantized checkpoint under our quantizer names; most dialects have none."""
        return {}

    def key_names(self, config: EfficientNetNVConfig) -> dict[str, str]:
        modules = self.module_names(config)
        keys = {}
        for key in expected_shapes(config):
            module, leaf = key.rsplit(".", 1)
            keys[key] = f"{modules[module]}.{leaf}"
        return keys

    def _their_shape(self, key: str, shape: tuple) -> tuple:
        return (*shape, 1, 1) if self.se_is_conv and ".se." in key and len(shape) == 2 else tuple(shape)


def expected_shapes(config: EfficientNetNVConfig) -> Mapping[str, tuple]:
    """The keys of our state dict, without quantizers, and their shapes; nothing is allocated."""
    fields = {
        key: value for key, value in config.to_dict().items() if key not in ("id2label", "label2id", "quantization")
    }
    return _expected_shapes(json.dumps({**fields, "num_labels": config.num_labels}, sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _expected_shapes(fields: str) -> Mapping[str, tuple]:
    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_dict(json.loads(fields)))
    return {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


def weight_shapes(config: EfficientNetNVConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    """Our name and (outputs, inputs per group) of every convolution and linear layer but the classifier."""
    yield STEM, (config.stem_width, config.num_channels)
    for i, stage in enumerate(config.stages):
        for j in range(stage.num_blocks):
            name = OUR_BLOCK.format(stage=i, block=j)
            width = stage.out_channels if j else stage.in_channels
            hidden = width * stage.expand_ratio
            if stage.expand_ratio != 1:
                yield f"{name}.expand.conv", (hidden, width)
            yield f"{name}.depthwise.conv", (hidden, 1)
            squeeze = config.squeeze_width(width, hidden)
            if squeeze:
                yield f"{name}.se.reduce", (squeeze, hidden)
                yield f"{name}.se.expand", (hidden, squeeze)
            yield f"{name}.project.conv", (stage.out_channels, hidden)
    yield HEAD, (config.hidden_dim, config.hidden_sizes[-1])


@lru_cache(maxsize=1)
def _tables() -> dict:
    return {tuple(weight_shapes(EfficientNetNVConfig.from_variant(name))): name for name in reversed(VARIANTS)}


def named_variant(config: EfficientNetNVConfig) -> str | None:
    """The named variant whose layers have these widths and depths, if there is one."""
    config, base = copy.copy(config), EfficientNetNVConfig()
    config.num_channels = base.num_channels
    if (config.kernel_sizes, config.strides) != (base.kernel_sizes, base.strides):
        return None
    return _tables().get(tuple(weight_shapes(config)))


def has_class_names(config: EfficientNetNVConfig) -> bool:
    """Whether its classes are called something: transformers numbers them where nobody does."""
    return any(name != f"LABEL_{i}" for i, name in config.id2label.items())


def three(values: list[float] | None) -> list[float] | None:
    """One number a channel, of grey images too: of three equal ones."""
    return [*values] * 3 if values is not None and len(values) == 1 else values


def _squeezed(shape) -> tuple:
    shape = tuple(shape)
    return shape[:2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _listed(label: str, names: list[str]) -> str:
    if not names:
        return ""
    shown = ", ".join(names[:_NAMES_IN_A_MESSAGE])
    more = len(names) - _NAMES_IN_A_MESSAGE
    return f"{len(names)} {label} {shown}" + (f" and {more} more" if more > 0 else "")
