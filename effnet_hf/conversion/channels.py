"""A network for grey images of one channel, as one for RGB images that computes the same."""

from collections.abc import Mapping

import torch

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .dialect import STEM


# Pillow's luminance, convert("L"), in its own fractions, whose sum is exactly 1.
_LUMINANCE = tuple(part / 65536 for part in (19595, 38470, 7471))
GREY_NOTE = (
    "Made for grey images of one channel: its stem was spread over red, green and blue by Pillow's weights of"
    " luminance, so that it computes the same of a grey image, and of a coloured one what it computed of convert('L')."
)


def take_rgb(
    state: Mapping[str, torch.Tensor], config: EfficientNetNVConfig, processor: EfficientNetNVImageProcessor, where: str
) -> dict[str, torch.Tensor]:
    """`state` for RGB images; sets `config.num_channels` to 3. Of grey images it computes the same, up to rounding.

    Raises:
        UserError: neither 1 nor 3 channels; or how grey images are normalised is not known.
    """
    if config.num_channels == 3:
        return dict(state)
    if config.num_channels != 1:
        raise UserError(
            f"{where} takes images of {config.num_channels} channels; every command here prepares RGB images, of 3."
        )
    if config.quantization:
        raise UserError(f"{where} is quantized for images of one channel, and ours are prepared as RGB, of 3.")
    if processor.do_normalize and (len(set(processor.image_mean)) > 1 or len(set(processor.image_std)) > 1):
        raise UserError(
            f"{where} takes grey images of one channel and does not say how they are normalised; say it, e.g."
            " --image_mean 0.5 --image_std 0.5, or 0 and 1 for none."
        )
    config.num_channels = 3
    shares = state[STEM + ".weight"].new_tensor(_LUMINANCE, dtype=torch.float64).view(1, 3, 1, 1)
    return {**state, STEM + ".weight": (state[STEM + ".weight"].double() * shares).float()}
