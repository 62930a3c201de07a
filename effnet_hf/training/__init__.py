"""Training as one readable story under Accelerate: start with `loop.py`."""

from .evaluation import validate_checkpoint
from .loop import train, validate
from .metrics import TopKAccuracy
from .model import build_model, build_processor, check_checkpoint


__all__ = [
    "TopKAccuracy",
    "build_model",
    "build_processor",
    "check_checkpoint",
    "train",
    "validate",
    "validate_checkpoint",
]
