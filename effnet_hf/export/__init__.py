"""Checkpoints as files that run elsewhere: written, proved, described. `export_model` is the way in."""

from .folder import Checkpoint, Exported, export_model, export_onnx, open_checkpoint
from .options import FORMATS, INT8_TARGETS, ExportOptions
from .runtime import ONNXEfficientNet


__all__ = [
    "FORMATS",
    "INT8_TARGETS",
    "Checkpoint",
    "ExportOptions",
    "Exported",
    "ONNXEfficientNet",
    "export_model",
    "export_onnx",
    "open_checkpoint",
]
