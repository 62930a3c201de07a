"""Checkpoints as files that run elsewhere: written, proved, described. `export_model` is the way in."""

from .checkpoint import Checkpoint, open_checkpoint
from .folder import export_model
from .options import FORMATS, INT8_TARGETS, ExportOptions
from .result import Exported
from .runners import onnxruntime_runner, openvino_runner
from .runtime import ONNXEfficientNet


__all__ = [
    "FORMATS",
    "INT8_TARGETS",
    "Checkpoint",
    "ExportOptions",
    "Exported",
    "ONNXEfficientNet",
    "export_model",
    "onnxruntime_runner",
    "open_checkpoint",
    "openvino_runner",
]
