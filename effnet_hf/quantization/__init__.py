"""Quantization-aware training: insert quantizers, calibrate their ranges, fine-tune; start with `prepare.py`.

Where quantizers stand is `effnet_hf/quantization_efficientnet_nv.py`, a model file: it travels with every checkpoint.
"""

from ..quantization_efficientnet_nv import PLACEMENTS, fold_into_convolution, quantizers
from .calibrate import Calibration, calibrate, calibrate_weights
from .insert import quantize, set_quantizers
from .prepare import Quantization
from .report import model_bytes
from .sensitivity import sensitivity


__all__ = [
    "PLACEMENTS",
    "Calibration",
    "Quantization",
    "calibrate",
    "calibrate_weights",
    "fold_into_convolution",
    "model_bytes",
    "quantize",
    "quantizers",
    "sensitivity",
    "set_quantizers",
]
