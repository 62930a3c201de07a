"""Configuration of NVIDIA's EfficientNet family: plain, WideSE, and TensorFlow's Lite variants.

This file travels inside every saved checkpoint (``trust_remote_code``), so it imports nothing but transformers.

Numbers: block table, scaling rule and per-size dropout are those of "EfficientNet: Rethinking Model Scaling for
Convolutional Neural Networks" (arXiv:1905.11946, tables 1 and 8) as NVIDIA's "EfficientNet for PyTorch" uses them;
WideSE and the B4 survival probability are NVIDIA's own.
"""

import copy
import difflib
import inspect
import math
import numbers
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from transformers.activations import ACT2FN
from transformers.configuration_utils import PretrainedConfig


try:  # transformers >= 5
    from transformers.backbone_utils import BackboneConfigMixin
except ImportError:  # transformers 4.57
    from transformers.utils.backbone_utils import BackboneConfigMixin


# size: (width coefficient, depth coefficient, image size, dropout rate, survival probability)
_SIZES = {
    "b0": (1.0, 1.0, 224, 0.2, 1.0),
    "b1": (1.0, 1.1, 240, 0.2, 1.0),
    "b2": (1.1, 1.2, 260, 0.3, 1.0),
    "b3": (1.2, 1.4, 300, 0.3, 1.0),
    "b4": (1.4, 1.8, 380, 0.4, 0.8),
    "b5": (1.6, 2.2, 456, 0.4, 1.0),
    "b6": (1.8, 2.6, 528, 0.5, 1.0),
    "b7": (2.0, 3.1, 600, 0.5, 1.0),
}
# TensorFlow's Lite family: no squeeze-excite, ReLU6, TF "SAME" padding, stem/head/first/last stage not scaled.
_LITE_SIZES = {
    "lite0": (1.0, 1.0, 224, 0.2, 1.0),
    "lite1": (1.0, 1.1, 240, 0.2, 1.0),
    "lite2": (1.1, 1.2, 260, 0.3, 1.0),
    "lite3": (1.2, 1.4, 280, 0.3, 1.0),
    "lite4": (1.4, 1.8, 300, 0.3, 1.0),
}
_LITE_SETTINGS = {"se_ratio": 0.0, "hidden_act": "relu6", "padding": "same", "scale_stem_and_head": False}
_short = reprlib.repr  # a value may have a million entries
# What a field may be. The upper ends are far from any network that trains; beyond them building one takes for ever.
_INTERVALS = {
    "width_coefficient": "(0, 1000]", "depth_coefficient": "(0, 1000]", "batch_norm_eps": "(0, 1000]",
    "se_ratio": "[0, 1]", "batch_norm_momentum": "[0, 1]", "dropout_rate": "[0, 1)", "survival_prob": "(0, 1]",
}  # fmt: skip
_TABLE = ("kernel_sizes", "strides", "num_block_repeats", "expand_ratios", "out_channels")
_LARGEST, _LARGEST_IMAGE, _MOST_LABELS, _MOST_BLOCKS, _WIDEST = 65_536, 16_384, 1_000_000, 1000, 1_000_000
_CHOICES = {
    "scale_stem_and_head": (True, False), "se_base": ("input", "hidden"), "stochastic_depth_mode": ("batch", "row"),
    "conv_init": ("fan_in", "fan_out"), "padding": ("symmetric", "same"),
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}  # fmt: skip

# What `quantization` may say, with its defaults.
QUANTIZATION = {
    "engine": "modelopt",
    "placement": "nvidia",  # or "cpu"; a table in quantization_efficientnet_nv.py
    "num_bits": 8,
    "narrow_range": False,  # True: -127 to 127 (NVIDIA's published checkpoints), False: -128 to 127 (what int8 has)
    "calibration_method": "percentile",  # of activations: "percentile", "entropy" or "max"; weights: max per channel
    "calibration_percentile": 99.99,
    "calibration_pictures": 0,  # how many the ranges were taken from
    "batch_norm": "train",  # in fine-tuning: "train", "frozen" (statistics stay), "folded" (into the convolutions)
    "float_layers": [],  # modules left without quantizers, by name; shell wildcards
}
_QUANTIZATION_CHOICES = {
    "engine": ("modelopt",), "placement": ("nvidia", "cpu"), "num_bits": range(2, 9), "narrow_range": (False, True),
    "calibration_method": ("percentile", "entropy", "max"), "batch_norm": ("train", "frozen", "folded"),
}  # fmt: skip

VARIANTS = (*_SIZES, *(f"widese-{size}" for size in _SIZES), *_LITE_SIZES)


@dataclass(frozen=True)
class StageSpec:
    """One row of the scaled block table; `survival_probs` has one entry per block."""

    name: str
    kernel_size: int
    stride: int
    expand_ratio: int
    in_channels: int
    out_channels: int
    survival_probs: tuple[float, ...]

    @property
    def num_blocks(self) -> int:
        return len(self.survival_probs)


class EfficientNetNVConfig(BackboneConfigMixin, PretrainedConfig):
    """Describes one EfficientNet completely; every width, depth and squeeze size follows from these fields.

    The defaults are B0. Named architectures come from [`EfficientNetNVConfig.from_variant`].

    Args:
        image_size (`int`): side of the square image the model is trained and evaluated at, in pixels.
        num_channels (`int`): input channels.
        width_coefficient, depth_coefficient (`float`): scale every width / every stage's number of blocks.
        depth_divisor (`int`): widths are rounded to multiples of this, never down by more than 10 %.
        kernel_sizes, strides, num_block_repeats, expand_ratios, out_channels (`list[int]`): the unscaled block table,
            one entry per stage (paper, table 1).
        stem_channels, head_channels (`int`): unscaled widths of the stem and of the head's 1x1 convolution.
        scale_stem_and_head (`bool`): `False` for the Lite family, which scales neither stem and head widths nor the
            depth of the first and last stage.
        se_ratio (`float`): squeeze width as a fraction of `se_base`; 0 builds blocks without squeeze-excite.
        se_base (`str`): `"input"` squeezes relative to the block's input channels (plain EfficientNet),
            `"hidden"` relative to its expanded channels (NVIDIA's WideSE).
        dropout_rate (`float`): dropout before the classifier.
        survival_prob (`float`): stochastic depth. Block i of N survives with `1 - (1 - survival_prob) * i / N`;
            1.0 switches it off. Only residual blocks can be dropped.
        stochastic_depth_mode (`str`): a block is drawn once per `"batch"` (NVIDIA) or once per `"row"` (paper, timm).
        batch_norm_eps (`float`), batch_norm_momentum (`float`): PyTorch's meaning of both; 0.01 is TensorFlow's 0.99.
        conv_init (`str`): Kaiming normal with `"fan_in"` (NVIDIA's default) or `"fan_out"`.
        hidden_act (`str`): activation, a key of `transformers.activations.ACT2FN`.
        padding (`str`): `"symmetric"` pads `(k - 1) // 2` on both sides (NVIDIA, timm `efficientnet_*`, torchvision);
            `"same"` pads like TensorFlow (timm `tf_efficientnet_*`, Lite).
        quantization (`dict`, *optional*): the quantizers it carries, with the keys of `QUANTIZATION`; `None` if float.
        thresholds (`list[float]`, *optional*): where `problem_type` is `"multi_label_classification"`, the least
            probability (sigmoid) of every class, in label order, at which an image has it; `None` is 0.5 for each.
        softmax_temperature (`float`, *optional*): divides the logits in evaluation, for truer probabilities.
        variant (`str`, *optional*): the name this configuration was made from; a label, nothing is derived from it.
        out_features, out_indices (`list`, *optional*): stages that [`EfficientNetNVBackbone`] returns.

    Raises:
        ValueError: one sentence naming the field, the value and what is allowed.
    """

    model_type = "efficientnet_nv"
    _auto_class = "AutoConfig"  # this file is saved along, so that the folder opens where the package is not installed
    if TYPE_CHECKING:  # never None; outside of this block transformers 5 would make a dataclass field of it
        id2label: dict[int, str]

    def __init__(
        self,
        image_size: int = 224,
        num_channels: int = 3,
        width_coefficient: float = 1.0,
        depth_coefficient: float = 1.0,
        depth_divisor: int = 8,
        kernel_sizes: Sequence[int] = (3, 3, 5, 3, 5, 5, 3),
        strides: Sequence[int] = (1, 2, 2, 2, 1, 2, 1),
        num_block_repeats: Sequence[int] = (1, 2, 2, 3, 3, 4, 1),
        expand_ratios: Sequence[int] = (1, 6, 6, 6, 6, 6, 6),
        out_channels: Sequence[int] = (16, 24, 40, 80, 112, 192, 320),
        stem_channels: int = 32,
        head_channels: int = 1280,
        scale_stem_and_head: bool = True,
        se_ratio: float = 0.25,
        se_base: str = "input",
        dropout_rate: float = 0.2,
        survival_prob: float = 1.0,
        stochastic_depth_mode: str = "batch",
        batch_norm_eps: float = 1e-3,
        batch_norm_momentum: float = 0.01,
        conv_init: Literal["fan_in", "fan_out"] = "fan_in",
        hidden_act: str = "silu",
        padding: str = "symmetric",
        quantization: dict | None = None,
        thresholds: Sequence[float] | None = None,
        softmax_temperature: float | None = None,
        variant: str | None = None,
        out_features: list[str] | None = None,
        out_indices: list[int] | None = None,
        **kwargs,
    ):
        _check_choice("problem_type", kwargs.get("problem_type"), _CHOICES["problem_type"])  # transformers 5 does later
        super().__init__(**_complete_labels(kwargs))
        self.image_size, self.num_channels = image_size, num_channels
        self.width_coefficient, self.depth_coefficient = width_coefficient, depth_coefficient
        self.depth_divisor, self.stem_channels, self.head_channels = depth_divisor, stem_channels, head_channels
        self.kernel_sizes, self.strides = _as_list(kernel_sizes), _as_list(strides)
        self.num_block_repeats, self.expand_ratios = _as_list(num_block_repeats), _as_list(expand_ratios)
        self.out_channels = _as_list(out_channels)
        self.scale_stem_and_head, self.se_ratio, self.se_base = scale_stem_and_head, se_ratio, se_base
        self.dropout_rate, self.survival_prob = dropout_rate, survival_prob
        self.stochastic_depth_mode = stochastic_depth_mode
        self.batch_norm_eps, self.batch_norm_momentum = batch_norm_eps, batch_norm_momentum
        self.conv_init, self.hidden_act, self.padding = conv_init, hidden_act, padding
        self.quantization, self.thresholds = _completed(quantization), _as_list(thresholds)
        self.variant, self.softmax_temperature = variant, softmax_temperature
        self.check()
        self.stage_names = ["stem", *(f"stage{i + 1}" for i in range(len(self.out_channels)))]
        if out_indices is not None:
            count, out_indices = len(self.stage_names), _as_list(out_indices)
            if not isinstance(out_indices, list) or not all(_is_integer(i, -count) and i < count for i in out_indices):
                raise ValueError(f"out_indices must be a list of stages -{count} to {count - 1}, got {out_indices!r}.")
            out_indices = [i % count for i in out_indices]
        if hasattr(self, "set_output_features_output_indices"):  # transformers >= 5
            self.set_output_features_output_indices(out_features=out_features, out_indices=out_indices)
        elif out_features is not None and out_indices is not None:
            self.out_features = out_features
            if list(self.out_indices) != list(out_indices):  # type: ignore[has-type]
                raise ValueError(f"out_features {out_features} and out_indices {out_indices} name different stages.")
        elif out_indices is not None:
            self.out_indices = out_indices
        else:
            self.out_features = out_features  # type: ignore[assignment]  # a property, whose setter takes None

    @classmethod
    def from_variant(cls, name: str, **overrides) -> "EfficientNetNVConfig":
        """The configuration of a named architecture, e.g. `from_variant("widese-b4", num_labels=10)`.

        Args:
            name: `b0`…`b7`, `widese-b0`…`widese-b7` or `lite0`…`lite4`. The original's prefixes are understood:
                `efficientnet-` is dropped, and so is `quant-`: every model of this package can be quantized.
            overrides: any field of the configuration; `num_labels` defaults to ImageNet's 1000.
        """
        key = str(name).lower().replace("_", "-").removeprefix("efficientnet-").removeprefix("quant-")
        size = key.removeprefix("widese-")
        if key not in VARIANTS:
            nearest = difflib.get_close_matches(key, VARIANTS, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"Unknown variant {name!r}.{hint} Known variants: {', '.join(VARIANTS)}.")
        settings = dict(_LITE_SETTINGS) if size in _LITE_SIZES else {}
        if key.startswith("widese-"):
            settings["se_base"] = "hidden"
        fields = ("width_coefficient", "depth_coefficient", "image_size", "dropout_rate", "survival_prob")
        settings |= {"variant": key, **dict(zip(fields, (_SIZES | _LITE_SIZES)[size]))}
        if not {"id2label", "label2id"} & overrides.keys():
            settings["num_labels"] = 1000
        return cls(**{**settings, **overrides})

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs) -> "EfficientNetNVConfig":
        """As in transformers, but overrides pass through the constructor: a bad one is refused, and what depends on
        an overridden field (class names on `num_labels`, `out_indices` on `out_features`) is derived anew."""
        labels, outputs = {"num_labels", "id2label", "label2id"}, {"out_features", "out_indices"}
        fields = {*inspect.signature(cls.__init__).parameters, *labels, "problem_type"}
        given = {field: kwargs.pop(field) for field in fields & kwargs.keys()}
        overrides = {field: value for field, value in given.items() if value is not None}
        replaced, names = set(overrides), config_dict.get("id2label") or ()
        if {"id2label", "label2id"} & replaced or overrides.get("num_labels", len(names)) != len(names):
            replaced |= labels
        replaced |= {"thresholds", "softmax_temperature"} if {*labels, "problem_type"} & replaced else set()
        replaced |= outputs if outputs & replaced else set()
        config_dict = {field: value for field, value in config_dict.items() if field not in replaced} | overrides
        return super().from_dict(config_dict, **kwargs)

    def check(self) -> None:
        """Raises `ValueError` if a field is out of range. Models call it too: a field may have been set by hand."""
        _check_integers("image_size", self.image_size, most=_LARGEST_IMAGE)
        for field in ("num_channels", "depth_divisor", "stem_channels", "head_channels"):
            _check_integers(field, getattr(self, field))
        for field, interval in _INTERVALS.items():
            _check_interval(field, getattr(self, field), interval)
        for field, allowed in _CHOICES.items():
            _check_choice(field, getattr(self, field), allowed)
        if not isinstance(self.hidden_act, str) or self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {_short(self.hidden_act)} is not an activation of transformers, e.g. 'silu'.")
        if self.variant is not None and not (isinstance(self.variant, str) and self.variant.isprintable()):
            raise ValueError(f"variant must be a name or None, got {_short(self.variant)}.")
        if self.quantization is not None:
            _check_quantization(self.quantization)
        if self.softmax_temperature is not None:
            _check_interval("softmax_temperature", self.softmax_temperature, "[0.001, 1000]")
            if self.problem_type in ("regression", "multi_label_classification"):
                raise ValueError(f"softmax_temperature needs one label per image, not {self.problem_type!r}.")
        if self.thresholds is not None:
            _check_thresholds(self.thresholds, self.problem_type, self.num_labels)
        for field in _TABLE:
            _check_integers(field, getattr(self, field), listed=True)
        lengths = {field: len(getattr(self, field)) for field in _TABLE}
        if len(set(lengths.values())) != 1 or not self.out_channels:
            raise ValueError(f"The block table needs one entry per stage in each of its fields, got lengths {lengths}.")
        if any(kernel % 2 == 0 for kernel in self.kernel_sizes):
            raise ValueError(f"kernel_sizes must be odd, got {_short(self.kernel_sizes)}.")
        if self.num_hidden_layers > _MOST_BLOCKS:
            raise ValueError(f"num_block_repeats and depth_coefficient make more than {_MOST_BLOCKS:,} blocks.")
        widest = max(width * ratio for width, ratio in zip(self.hidden_sizes, self.expand_ratios))
        if max(widest, *self.hidden_sizes, self.hidden_dim) > _WIDEST:
            raise ValueError(f"The widths make a layer of more than {_WIDEST:,} channels; lower width_coefficient.")

    # What follows is derived, never stored.

    def round_width(self, channels: int) -> int:
        """Scaled width: nearest multiple of `depth_divisor`, at most 10 % below `channels * width_coefficient`."""
        scaled, divisor = channels * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
        return rounded + divisor if rounded < 0.9 * scaled else rounded

    @property
    def stem_width(self) -> int:
        return self.round_width(self.stem_channels) if self.scale_stem_and_head else self.stem_channels

    @property
    def hidden_dim(self) -> int:
        """Channels of the head's feature map, i.e. the classifier's input width."""
        return self.round_width(self.head_channels) if self.scale_stem_and_head else self.head_channels

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the stem and of each stage's output, in order."""
        return [self.stem_width, *(self.round_width(channels) for channels in self.out_channels)]

    @property
    def depths(self) -> list[int]:
        """Scaled number of blocks of each stage."""
        last = len(self.num_block_repeats) - 1
        return [
            repeats if not self.scale_stem_and_head and i in (0, last) else math.ceil(repeats * self.depth_coefficient)
            for i, repeats in enumerate(self.num_block_repeats)
        ]

    @property
    def num_hidden_layers(self) -> int:
        """Number of MBConv blocks."""
        return sum(self.depths)

    @property
    def survival_probs(self) -> list[float]:
        """Survival probability of every block, counted over all stages: `1 - (1 - survival_prob) * i / N`."""
        total = self.num_hidden_layers
        return [1 - (1 - self.survival_prob) * i / total for i in range(total)]

    @property
    def stages(self) -> list[StageSpec]:
        """The scaled block table."""
        sizes, depths, probs = self.hidden_sizes, self.depths, self.survival_probs
        rows = zip(self.kernel_sizes, self.strides, self.expand_ratios, sizes, sizes[1:])
        return [
            StageSpec(f"stage{i + 1}", *row, survival_probs=tuple(probs[sum(depths[:i]) : sum(depths[: i + 1])]))
            for i, row in enumerate(rows)
        ]

    def squeeze_width(self, in_channels: int, hidden_channels: int) -> int:
        """Channels between the two squeeze-excite layers of a block; 0 without squeeze-excite."""
        if not self.se_ratio:
            return 0
        return max(1, int(self.se_ratio * (hidden_channels if self.se_base == "hidden" else in_channels)))


def _is_number(value) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and abs(value) < 1e300  # type: ignore[operator]


def _is_integer(value, minimum: int) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and int(value) >= minimum


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else value  # anything else is refused by `check`


def _check_integers(field: str, value, most: int = _LARGEST, listed: bool = False) -> None:
    if listed and not isinstance(value, list):
        raise ValueError(f"{field} must be a list with one entry per stage, got {_short(value)}.")
    if not all(_is_integer(entry, 1) and entry <= most for entry in (value if listed else [value])):
        wanted = "made of whole numbers" if listed else "a whole number"
        raise ValueError(f"{field} must be {wanted} from 1 to {most}, got {_short(value)}.")


def _check_interval(field: str, value, interval: str) -> None:
    low, high = map(float, interval[1:-1].split(","))
    inside = _is_number(value) and low <= value <= high
    if not inside or (value == low and interval[0] == "(") or (value == high and interval[-1] == ")"):
        raise ValueError(f"{field} must be a number in {interval}, got {_short(value)}.")


def _check_choice(field: str, value, allowed: Sequence) -> None:
    if not any(value == choice and type(value) is type(choice) for choice in allowed):  # 1 is not True, 8.0 not 8
        raise ValueError(f"{field} must be {' or '.join(map(repr, allowed))}, got {_short(value)}.")


def _completed(quantization):
    if not isinstance(quantization, dict):
        return quantization  # None, or refused by `check`
    return copy.deepcopy({key: _as_list(value) for key, value in (QUANTIZATION | quantization).items()})


def _check_quantization(section) -> None:
    if not isinstance(section, dict) or section.keys() != QUANTIZATION.keys():
        raise ValueError(f"quantization must have the keys {', '.join(QUANTIZATION)}, got {_short(section)}.")
    for key, allowed in _QUANTIZATION_CHOICES.items():
        _check_choice(f"quantization: {key}", section[key], allowed)
    _check_interval("quantization: calibration_percentile", section["calibration_percentile"], "(0, 100]")
    if not _is_integer(section["calibration_pictures"], 0):
        raise ValueError(f"quantization: calibration_pictures must count, got {_short(section)}.")
    layers = section["float_layers"]
    if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
        raise ValueError(f"quantization: float_layers must be a list of names, got {_short(layers)}.")


def _check_thresholds(thresholds, problem_type: str | None, num_labels: int) -> None:
    if problem_type != "multi_label_classification":
        raise ValueError(f"thresholds need problem_type 'multi_label_classification', and it is {problem_type!r}.")
    if not isinstance(thresholds, list) or len(thresholds) != num_labels:
        raise ValueError(f"thresholds must be a list of {num_labels} numbers, one a class, got {_short(thresholds)}.")
    for threshold in thresholds:
        _check_interval("thresholds", threshold, "[0, 1]")


def _complete_labels(kwargs: dict) -> dict:
    """Checks `num_labels`, `id2label` and `label2id` against each other and derives the map that is missing."""
    num_labels, names, indices = (kwargs.get(field) for field in ("num_labels", "id2label", "label2id"))
    if num_labels is not None and not (_is_integer(num_labels, 0) and num_labels <= _MOST_LABELS):
        raise ValueError(f"num_labels must be a whole number from 0 to {_MOST_LABELS}, got {_short(num_labels)}.")
    if indices is not None and not isinstance(indices, dict):
        raise ValueError(f"label2id must be a map of names to 0 to N - 1, got {_short(indices)}.")
    if names is None and indices is None:
        return kwargs
    names = {index: name for name, index in (indices or {}).items()} if names is None else names
    names = dict(enumerate(names)) if isinstance(names, (list, tuple)) else names
    if not isinstance(names, dict) or {str(index) for index in names} != {str(i) for i in range(len(names))}:
        raise ValueError(f"id2label must name the classes 0 to N - 1, e.g. {{0: 'cat'}}, got {_short(names)}.")
    if num_labels is not None and len(names) != num_labels:
        raise ValueError(f"num_labels is {num_labels} but id2label names {len(names)} classes; give one of them.")
    names = {int(index): name for index, name in sorted(names.items(), key=lambda entry: int(entry[0]))}
    if wrong := [name for name in names.values() if not isinstance(name, str)]:
        raise ValueError(f"id2label must name every class in words, got {_short(wrong[0])}.")
    derived = {name: index for index, name in names.items()}
    if len(derived) != len(names):
        twice = next(name for index, name in names.items() if derived[name] != index)
        raise ValueError(f"id2label names two classes {_short(twice)}; every class needs a name of its own.")
    if indices not in (None, {}, derived):
        raise ValueError(f"label2id {_short(indices)} does not say what id2label does; leave it out.")
    return {**kwargs, "id2label": names, "label2id": derived}


__all__ = ["EfficientNetNVConfig", "QUANTIZATION", "StageSpec", "VARIANTS"]
