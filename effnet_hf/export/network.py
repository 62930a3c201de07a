"""The network as it is exported: batch norm folded away, one tensor in, one tensor out."""

import copy

import torch
from torch import nn

from ..modeling_efficientnet_nv import ConvNormAct, EfficientNetNVForImageClassification
from ..quantization_efficientnet_nv import fold_into_convolution
from .options import DTYPES, ExportOptions


class ExportedNetwork(nn.Module):
    """`pixel_values` float32 (N, 3, H, W) to `logits` or probabilities, float32 (N, classes).

    Args:
        model: left as it is; a copy is folded and converted.
    """

    def __init__(self, model: EfficientNetNVForImageClassification, options: ExportOptions):
        super().__init__()
        self.dtype, self.softmax = DTYPES[options.dtype], options.softmax
        self.model = fold_all(copy.deepcopy(model).eval()).to(self.dtype)
        self.requires_grad_(False)
        self.eval()

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if self.dtype != torch.float32:
            pixel_values = pixel_values.to(self.dtype)
        logits = self.model(pixel_values).logits
        if self.dtype != torch.float32:
            logits = logits.float()
        return logits.softmax(-1) if self.softmax else logits


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
