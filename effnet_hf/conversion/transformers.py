"""transformers' own EfficientNet (`google/efficientnet-b0` to `-b7`).

It pads strided convolutions by one pixel less on the left and top than on the right and bottom, always in the stem and
by default in the blocks; `depthwise_padding` lists the blocks (flat indices) that pad symmetrically. On maps of even
size that is TensorFlow's "SAME" padding, on odd ones symmetric padding is. So a stock model is the same function as
ours with `padding="same"` at one image size, if its list names exactly the blocks that meet an odd map there (Google's
eight checkpoints do), and never the same as one with symmetric padding.
"""

import numpy as np
from PIL import Image
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

from ..configuration import EfficientNetNVConfig
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .dialect import Dialect, three
from .source import Source


class Transformers(Dialect):
    name = "transformers"
    title = "transformers'"
    builder = "transformers"
    families = ("b",)
    paddings = ("same",)  # on even maps
    layers = {
        "efficientnet.encoder.stem.conv": "efficientnet.embeddings.convolution",
        "efficientnet.encoder.stem.bn": "efficientnet.embeddings.batchnorm",
        "efficientnet.head.conv": "efficientnet.encoder.top_conv",
        "efficientnet.head.bn": "efficientnet.encoder.top_bn",
        "classifier": "classifier",
    }
    block = "efficientnet.encoder.blocks.{flat}"
    expanded = {
        "expand.conv": "expansion.expand_conv",
        "expand.bn": "expansion.expand_bn",
        "depthwise.conv": "depthwise_conv.depthwise_conv",
        "depthwise.bn": "depthwise_conv.depthwise_norm",
        "se.reduce": "squeeze_excite.reduce",
        "se.expand": "squeeze_excite.expand",
        "project.conv": "projection.project_conv",
        "project.bn": "projection.project_bn",
    }
    unexpanded = {ours: theirs for ours, theirs in expanded.items() if not ours.startswith("expand.")}

    def respell(self, key: str) -> str:
        return f"efficientnet.{key}" if key.startswith(("embeddings.", "encoder.")) else key

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        fields = {"padding": "same"}
        for name in ("image_size", "batch_norm_eps", "dropout_rate"):
            if name in source.config:
                fields[name] = source.config[name]
        if source.config.get("hidden_act", "swish") != "swish":
            fields["hidden_act"] = source.config["hidden_act"]
        return fields

    def read_difference(self, config: EfficientNetNVConfig, source: Source) -> str | None:
        """Where the stock model of this `config.json` pads otherwise than ours does."""
        if not source.config:
            return None
        if source.config.get("pooling_type", "mean") != "mean":
            return f"pooling ({source.config['pooling_type']} there, mean here)"
        symmetric = set(source.config.get("depthwise_padding") or [])
        odd, stem_is_odd = _odd_maps(config)
        strided = {i for i, _ in _strided_blocks(config)}
        if stem_is_odd or symmetric & strided != odd:
            blocks = sorted((symmetric & strided) ^ odd)
            where = ["the stem"] * stem_is_odd + [f"blocks {', '.join(map(str, blocks))}"] * bool(blocks)
            return f"padding of {' and '.join(where)} at {config.image_size} pixels"
        return None

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        stock, size = source.preprocessor, config.image_size
        if not stock:
            return EfficientNetNVImageProcessor(size=size, crop_size=size)
        # The stock processor can subtract 1 after rescaling, and divides by the standard deviation once more for a
        # classifier (`include_top`): (x * factor - 1 - mean) / std / std.
        std = np.asarray(stock.get("image_std") or IMAGENET_STANDARD_STD)
        mean = np.asarray(stock.get("image_mean") or IMAGENET_STANDARD_MEAN) * stock.get("do_normalize", True)
        divisions = stock.get("do_normalize", True) + stock.get("include_top", True)
        edge = stock.get("size", {}).get("height", size)
        crop = stock.get("crop_size", {}).get("height", edge) if stock.get("do_center_crop") else edge
        return EfficientNetNVImageProcessor(
            size=edge,
            crop_size=crop,
            resample=stock.get("resample", 0),
            rescale_factor=stock.get("rescale_factor", 1 / 255),
            image_mean=three((mean + bool(stock.get("rescale_offset"))).tolist()),
            image_std=three((std**divisions).tolist()),
        )

    def notes(self, config: EfficientNetNVConfig, source: Source) -> list[str]:
        size = config.image_size
        return [
            f"The same function as the stock model for images of {size} x {size} pixels; at other sizes its fixed "
            "padding differs from TensorFlow's.",
            "The stock processor squashes an image to a square; this one resizes the short side and crops the centre.",
        ]

    def difference(self, config: EfficientNetNVConfig) -> str | None:
        if difference := super().difference(config):
            return difference
        if _odd_maps(config)[1]:
            return f"padding (the stem's is fixed for even image sizes, this model has {config.image_size})"
        return None

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        return f'transformers.EfficientNetForImageClassification.from_pretrained("{path}")'

    def folder_config(self, config: EfficientNetNVConfig):
        """The stock configuration that comes nearest to ours, and is the same function if [`difference`] is None."""
        from transformers import EfficientNetConfig

        if config.padding == "same":
            depthwise_padding = sorted(_odd_maps(config)[0])
        else:  # all that can be symmetric: everything but the stem
            depthwise_padding = [i for i, _ in _strided_blocks(config)]
        return EfficientNetConfig(
            num_channels=config.num_channels,
            image_size=config.image_size,
            width_coefficient=config.width_coefficient,
            depth_coefficient=config.depth_coefficient,
            depth_divisor=config.depth_divisor,
            kernel_sizes=config.kernel_sizes,
            in_channels=[config.stem_channels, *config.out_channels[:-1]],
            out_channels=config.out_channels,
            depthwise_padding=depthwise_padding,
            strides=config.strides,
            num_block_repeats=config.num_block_repeats,
            expand_ratios=config.expand_ratios,
            squeeze_expansion_ratio=config.se_ratio,
            hidden_act="swish" if config.hidden_act == "silu" else config.hidden_act,
            hidden_dim=config.hidden_dim,
            batch_norm_eps=config.batch_norm_eps,
            batch_norm_momentum=config.batch_norm_momentum,
            dropout_rate=config.dropout_rate,
            drop_connect_rate=0.0,  # theirs drops single activations, ours whole branches
            id2label=config.id2label,
            label2id=config.label2id,
            problem_type=config.problem_type,
            **({"thresholds": config.thresholds} if config.thresholds else {}),  # kept, for the way back
            architectures=["EfficientNetForImageClassification"],
        )

    def folder_processor(self, processor: EfficientNetNVImageProcessor):
        """The stock processor nearest to ours: the same for square images, others it squashes before it crops."""
        from transformers import EfficientNetImageProcessor

        edge, crop = processor.size["shortest_edge"], processor.crop_size
        return EfficientNetImageProcessor(
            size={"height": edge, "width": edge},
            do_center_crop=processor.do_center_crop,
            crop_size=crop,
            resample=Image.Resampling(processor.resample),
            rescale_factor=processor.rescale_factor,
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            include_top=False,  # True would divide by the standard deviation a second time
        )


def _strided_blocks(config: EfficientNetNVConfig) -> list[tuple[int, int]]:
    """(flat index, side of the map it meets) of every block of stride 2, at the configuration's image size."""
    found, flat, side = [], 0, (config.image_size + 1) // 2
    for stage in config.stages:
        if stage.stride == 2:
            found.append((flat, side))
            side = (side + 1) // 2
        flat += stage.num_blocks
    return found


def _odd_maps(config: EfficientNetNVConfig) -> tuple[set[int], bool]:
    """Blocks that meet a map of odd side, and whether the stem does."""
    return {i for i, side in _strided_blocks(config) if side % 2}, config.image_size % 2 == 1


TRANSFORMERS = Transformers()
