"""Detectors and segmenters of other libraries with our backbone in them.

`load_backbone_weights` gives one of transformers' the weights of a checkpoint; `FeaturePyramid` is the backbone that
torchvision's detectors take.
"""

import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal, TypeVar

import torch
from torch import nn

from .checkpoint import read_config, read_processor, read_weights
from .configuration import EfficientNetNVConfig
from .errors import UserError, printable
from .modeling_efficientnet_nv import ConvNormAct, EfficientNetNVBackbone


# What the maps depend on, and shapes do not always tell.
_NETWORK = (
    *("num_channels", "width_coefficient", "depth_coefficient", "depth_divisor", "kernel_sizes", "strides"),
    *("num_block_repeats", "expand_ratios", "out_channels", "stem_channels", "scale_stem_and_head"),
    *("se_ratio", "se_base", "batch_norm_eps", "hidden_act", "padding"),
)
_LEVELS = {"P2-P6": (4, 8, 16, 32), "P3-P7": (8, 16, 32)}
Module = TypeVar("Module", bound=nn.Module)


def load_backbone_weights(detector: Module, checkpoint: str) -> Module:
    """Gives every EfficientNet backbone in a detector or segmenter the weights of a checkpoint, in place.

    The rest of the detector stays as it is. Batch norm layers that the detector has replaced by frozen ones get theirs,
    too.

    Args:
        detector: a model of transformers made with our configuration as `backbone_config`, a [`FeaturePyramid`], …
        checkpoint: a folder or Hub id of a classifier, a feature model or a backbone of ours. It is read as data.

    Returns:
        The detector.

    Raises:
        UserError: there is no such backbone in the detector, or the checkpoint has another network, is quantized,
            lacks weights or cannot be read; or the detector has other norms in the backbone, or no real weights.
    """
    checkpoint = str(checkpoint)
    where = f"checkpoint {printable(checkpoint)}"
    backbones = [module for module in detector.modules() if isinstance(module, EfficientNetNVBackbone)]
    if not backbones:
        raise UserError(
            f"this {type(detector).__name__} has no EfficientNetNVBackbone to give weights to;"
            " make it with backbone_config=EfficientNetNVBackbone.for_detection(checkpoint).config."
        )
    config = read_config(checkpoint, where)
    if config.quantization:
        raise UserError(f"{where} is quantized, and detectors have no quantizers; name the float one it was made from.")
    weights = {name.removeprefix("efficientnet."): value for name, value in read_weights(checkpoint, where).items()}
    for backbone in backbones:
        _require_same_network(config, backbone, where)
        state = backbone.state_dict()
        for name, own in state.items():
            if name.endswith("num_batches_tracked"):  # a detector's frozen norms do not save these
                weights.setdefault(name, own)
            if name not in weights or weights[name].shape != own.shape:
                fault = "has another shape of" if name in weights else "lacks"
                raise UserError(f"{where} cannot be loaded: its weights file {fault} {name}.")
            if own.is_meta:
                raise UserError(
                    f"this {type(detector).__name__} has no weights to replace: {name} is on the meta device;"
                    " make the detector on a real one, and offload it after load_backbone_weights."
                )
        wanted = [name for name in weights if name.startswith("encoder.") and not name.endswith("num_batches_tracked")]
        if lacking := sorted(set(wanted) - state.keys()):
            raise UserError(
                f"the backbone of this {type(detector).__name__} has no {lacking[0]}, so {where} would be another"
                " network in it; replace its batch norm by a frozen one, or not at all."
            )
    for backbone in backbones:
        backbone.load_state_dict({name: weights[name] for name in backbone.state_dict()})
    return detector


def _require_same_network(config: EfficientNetNVConfig, backbone: EfficientNetNVBackbone, where: str) -> None:
    for field in _NETWORK:
        there, here = getattr(config, field), getattr(backbone.config, field)
        if there != here:
            raise UserError(
                f"{where} is another network than the detector's backbone: {field} is {there}, in the detector {here};"
                " make the detector with backbone_config=EfficientNetNVBackbone.for_detection(checkpoint).config."
            )


class FeaturePyramid(nn.Module):
    """A backbone for torchvision's detectors: images (N, 3, H, W) to maps of `out_channels` channels by name.

    `levels="P2-P6"` has strides 4 to 64 (maps "0" to "3" and "pool"), which FasterRCNN, MaskRCNN and KeypointRCNN take;
    `levels="P3-P7"` strides 8 to 128 (maps "0" to "2", "p6", "p7"), which RetinaNet and FCOS take, and SSD with a head.

    Made with the constructor its weights are random; see [`FeaturePyramid.from_pretrained`].

    Args:
        config: the backbone's architecture.
        levels: which maps.
        out_channels: width of all maps.
        trainable_stages: how many of the backbone's last stages train, the stem counted as one; by default all.
        frozen_norm: replace batch norm by torchvision's `FrozenBatchNorm2d`, for batches of few images.
        image_mean, image_std: what a detector should normalise images of 0 to 1 with; give it both.

    Raises:
        UserError: levels, out_channels or trainable_stages are none, or the backbone has no stage of one of these
            strides.
    """

    def __init__(
        self,
        config: EfficientNetNVConfig,
        levels: Literal["P2-P6", "P3-P7"],
        out_channels: int = 256,
        trainable_stages: int | None = None,
        frozen_norm: bool = False,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
    ):
        from torchvision.ops import FeaturePyramidNetwork, FrozenBatchNorm2d
        from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

        super().__init__()
        if not isinstance(config, EfficientNetNVConfig):
            raise UserError(f"{config!r} is no configuration; FeaturePyramid.from_pretrained takes a folder or Hub id.")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            least = 0 if name == "image_std" else -math.inf
            if not isinstance(values, Sequence) or not all(type(x) in (int, float) and x > least for x in values):
                raise UserError(f"{name} is {values!r}; it must be a number for each channel, of a deviation above 0.")
        if levels not in [*_LEVELS]:
            raise UserError(f"levels is {levels!r}; it must be one of {', '.join(map(repr, _LEVELS))}.")
        self.body = EfficientNetNVBackbone(copy.deepcopy(config))
        if type(out_channels) is not int or out_channels < 1:
            raise UserError(f"out_channels is {out_channels!r}; it must be a whole number of at least 1.")
        last = {stride: stage for stage, stride in self.body.strides.items()}
        if lacking := set(_LEVELS[levels]) - last.keys():
            raise UserError(f"levels {levels!r} need a stage of stride {min(lacking)}, and there are {sorted(last)}.")
        self.body.out_features = self.body.config.out_features = [last[stride] for stride in _LEVELS[levels]]
        stages = [self.body.encoder.stem, *self.body.encoder.stages]
        trainable_stages = len(stages) if trainable_stages is None else trainable_stages
        if type(trainable_stages) is not int or trainable_stages not in range(len(stages) + 1):
            raise UserError(
                f"trainable_stages is {trainable_stages!r}; it must be a whole number from 0 to {len(stages)}."
            )
        for stage in stages[: len(stages) - trainable_stages]:
            stage.requires_grad_(False)
        # torchvision's own pyramids end with these two
        extra = LastLevelMaxPool() if levels == "P2-P6" else LastLevelP6P7(out_channels, out_channels)
        self.fpn = FeaturePyramidNetwork(self.body.channels, out_channels, extra)
        if frozen_norm:
            for block in [block for block in self.body.modules() if isinstance(block, ConvNormAct)]:
                block.bn = FrozenBatchNorm2d(block.bn.num_features, block.eps)
        self.out_channels, self.image_mean, self.image_std = out_channels, list(image_mean), list(image_std)

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str,
        levels: Literal["P2-P6", "P3-P7"],
        out_channels: int = 256,
        trainable_stages: int | None = 5,
        frozen_norm: bool = True,
    ) -> "FeaturePyramid":
        """With the weights, mean and standard deviation of a folder or Hub id; the pyramid itself is random.

        The defaults are those of torchvision's `resnet_fpn_backbone`: what has strides 2 and 4 does not train (of B0 to
        B7, all but the last 5), and batch norm is frozen.

        Raises:
            UserError: as [`load_backbone_weights`]; or it does not say how to prepare images.
        """
        where = f"checkpoint {printable(str(checkpoint))}"
        processor = read_processor(str(checkpoint), where)
        # torchvision's transform gets 0 to 1, and our processor bytes
        scale = 255 * (processor.rescale_factor if processor.do_rescale else 1)
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0] * 3, [1] * 3)
        mean, std = [value / scale for value in mean], [value / scale for value in std]
        config = read_config(str(checkpoint), where)
        config.quantization = None  # if it has one, `load_backbone_weights` says so
        pyramid = cls(config, levels, out_channels, trainable_stages, frozen_norm, mean, std)
        return load_backbone_weights(pyramid, checkpoint)

    def forward(self, images: torch.Tensor) -> "OrderedDict[str, torch.Tensor]":
        """
        Args:
            images: normalised, (N, 3, H, W).
        """
        maps = self.body(images).feature_maps
        return self.fpn(OrderedDict((str(level), map_) for level, map_ in enumerate(maps)))


__all__ = ["FeaturePyramid", "load_backbone_weights"]
