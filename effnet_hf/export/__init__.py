"""Checkpoints as files that run elsewhere: written, proved, described. `export_model` is the way in."""

from .api import export_model
from .describe import Exported
from .fastest import EfficientNetNVForInference, load_for_inference
from .options import FORMATS, INT8_TARGETS, ExportOptions
from .runners import onnxruntime_runner, openvino_runner
from .runtime import ONNXEfficientNet


__all__ = [
    "FORMATS",
    "INT8_TARGETS",
    "EfficientNetNVForInference",
    "ExportOptions",
    "Exported",
    "ONNXEfficientNet",
    "export_model",
    "load_for_inference",
    "onnxruntime_runner",
    "openvino_runner",
]
