"""The network as it is exported: batch norm folded away, one tensor in, one out; and as a `torch.export` program.

Nothing here needs the onnx package.
"""

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..modeling_efficientnet_nv import ConvNormAct, EfficientNetNVForImageClassification
from ..multi_label import probabilities
from ..quantization_efficientnet_nv import fold_into_convolution
from .options import DTYPES, ExportOptions


class ExportedNetwork(nn.Module):
    """`pixel_values` float32 (N, 3, H, W) to `logits` or probabilities, float32 (N, classes).

    Args:
        model: left as it is; a copy is folded and converted.
    """

    def __init__(self, model: EfficientNetNVForImageClassification, options: ExportOptions):
        super().__init__()
        self.dtype, self.probabilities = DTYPES[options.dtype], options.probabilities
        self.model = fold_all(copy.deepcopy(model).eval()).to(self.dtype)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.dtype != torch.float32:
            pixel_values = pixel_values.to(self.dtype)
        logits = self.model(pixel_values).logits
        if self.dtype != torch.float32:
            logits = logits.float()
        return probabilities(logits, self.model.config) if self.probabilities else logits

    def example(self, size: tuple[int, int]) -> torch.Tensor:
        """`pixel_values` to trace it with: two images of (height, width)."""
        return torch.zeros(2, self.model.config.num_channels, *size)


@torch.no_grad()
def fold_all(model: nn.Module) -> nn.Module:
    """In place: every convolution takes over the scale and shift of its batch norm; in evaluation the same function.

    Quantized weights are put on their grid first: the fold then multiplies the grid, and no weight changes its integer.
    """
    for layer in model.modules():
        if hasattr(layer, "weight_quantizer"):
            layer.weight.copy_(layer.weight_quantizer(layer.weight))
        if isinstance(layer, ConvNormAct) and isinstance(layer.bn, nn.BatchNorm2d):
            fold_into_convolution(layer)
    return model


def free_axes(options: ExportOptions) -> dict[int, torch.export.Dim]:
    """For `torch.export`; from 64 pixels on, because a last map of a single pixel is a case of its own."""
    axes = {0: torch.export.Dim("batch")}
    if options.dynamic_image_size:
        axes |= {2: torch.export.Dim("height", min=64), 3: torch.export.Dim("width", min=64)}
    return axes


def write_pt2(network: ExportedNetwork, path: Path, size: tuple[int, int], options: ExportOptions) -> None:
    """A `torch.export` program with a free batch size: opens with `torch.export.load`, without this package."""
    save_program(network, path, (network.example(size),), {}, {"pixel_values": free_axes(options)})


def save_program(network: nn.Module, path: Path, arguments: tuple, named: dict, free: dict | None = None) -> None:
    """The same of any module and any example inputs, by place and by name; without `free` axes for these alone."""
    with quiet_exporter():
        program = torch.export.export(network, arguments, named, dynamic_shapes=free)
        buffer = io.BytesIO()  # torch's own writer ends the process when a disk is full
        torch.export.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Without torch's advice to its developers: which exporter is newer, which check was traced as a constant."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels):
                logger.setLevel(level)
