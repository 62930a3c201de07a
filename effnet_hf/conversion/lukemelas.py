"""lukemelas' EfficientNet-PyTorch (`efficientnet_pytorch`), and the Lite models that took its names.

TensorFlow's weights and TensorFlow's "SAME" padding, worked out once for the image size a model is built with; ours is
worked out for every image. At that size they are the same function.
"""

from ..configuration import EfficientNetNVConfig
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .dialect import Dialect, named_variant
from .source import Source


class Lukemelas(Dialect):
    name = "lukemelas"
    title = "lukemelas'"
    builder = "EfficientNet-PyTorch"
    families = ("b", "lite")
    paddings = ("same",)
    layers = {
        "efficientnet.encoder.stem.conv": "_conv_stem",
        "efficientnet.encoder.stem.bn": "_bn0",
        "efficientnet.head.conv": "_conv_head",
        "efficientnet.head.bn": "_bn1",
        "classifier": "_fc",
    }
    block = "_blocks.{flat}"
    expanded = {
        "expand.conv": "_expand_conv",
        "expand.bn": "_bn0",
        "depthwise.conv": "_depthwise_conv",
        "depthwise.bn": "_bn1",
        "se.reduce": "_se_reduce",
        "se.expand": "_se_expand",
        "project.conv": "_project_conv",
        "project.bn": "_bn2",
    }
    unexpanded = {ours: theirs for ours, theirs in expanded.items() if not ours.startswith("expand.")}

    def fields(self, variant: str, source: Source, arch: str | None) -> dict:
        return {"padding": "same", "stochastic_depth_mode": "row"}

    def processor(self, config: EfficientNetNVConfig, source: Source, arch: str | None) -> EfficientNetNVImageProcessor:
        # B: examples/imagenet of EfficientNet-PyTorch resizes and crops to the same size, with ImageNet's statistics
        # (its `advprop` weights want a mean and standard deviation of 0.5). Lite: (x - 127) / 128, TensorFlow's ratio.
        size = config.image_size
        if str(config.variant).startswith("lite"):
            return EfficientNetNVImageProcessor(
                size=size + 32, crop_size=size, image_mean=[127 / 255] * 3, image_std=[128 / 255] * 3
            )
        return EfficientNetNVImageProcessor(size=size, crop_size=size)

    def notes(self, config: EfficientNetNVConfig, source: Source) -> list[str]:
        size = config.image_size
        notes = [
            f"The same function as EfficientNet-PyTorch's for images of {size} x {size} pixels, the size that its "
            "padding is worked out for."
        ]
        if not str(config.variant).startswith("lite"):
            notes.append(
                "Normalised with ImageNet's mean and standard deviation; `advprop` weights, which look the same, want "
                "0.5 for both."
            )
        return notes

    def loading(self, config: EfficientNetNVConfig, path: str) -> str:
        arguments = "" if config.num_labels == 1000 else f", num_classes={config.num_labels}"
        if config.batch_norm_eps != 1e-3:
            arguments += f", batch_norm_epsilon={config.batch_norm_eps:g}"
        load = "safetensors.torch.load_file" if path.endswith(".safetensors") else "torch.load"
        arch = f"efficientnet-{named_variant(config)}"
        return f'model = EfficientNet.from_name("{arch}"{arguments}); model.load_state_dict({load}("{path}"))'


LUKEMELAS = Lukemelas()
