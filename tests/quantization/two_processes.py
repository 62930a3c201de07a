"""What the processes of test_calibrate.py run: the same small model, batches of their own."""

import warnings

import torch
from accelerate import PartialState

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.quantization import calibrate, quantize, quantizers


def build(**settings):
    torch.manual_seed(0)
    config = EfficientNetNVConfig(
        image_size=32, kernel_sizes=[3, 5], strides=[1, 2], num_block_repeats=[1, 2], expand_ratios=[1, 4],
        out_channels=[16, 24], stem_channels=16, head_channels=32, num_labels=5,
    )  # fmt: skip
    model = EfficientNetNVForImageClassification(config).eval()
    quantize(model, **settings)
    return model


def batches_of(rank: int) -> list[torch.Tensor]:
    """Two batches of 4; the second process sees wider ones, and wider still the second time."""
    generator = torch.Generator().manual_seed(rank)
    return [(1 + rank) * scale * torch.randn(4, 3, 32, 32, generator=generator) for scale in (1.0, 1.5)]


def calibrate_here(folder: str) -> None:
    warnings.simplefilter("ignore")
    rank, model = PartialState(cpu=True).process_index, build()
    done = calibrate(model, batches_of(rank))
    amax = {name: quantizer._amax for name, quantizer in quantizers(model).items()}
    torch.save({"amax": amax, "images": done.images}, f"{folder}/{rank}.pt")
