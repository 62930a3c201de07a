"""Training as one readable story under Accelerate: start with `loop.py`."""

from .evaluation import validate_checkpoint
from .loop import train, train_step, validate
from .memory import largest_map
from .metrics import LatencyMeter, LossMeter, TopKAccuracy, percentiles
from .model import build_model, build_processor, check_checkpoint, load_model, load_processor
from .optim import build_optimizer, learning_rate, set_learning_rate, training_loss
from .precision import allow_tf32, keep_freed_memory, make_accelerator, precision_name, settle_precision
from .setup import Run, describe_device, set_up


__all__ = [
    "LatencyMeter",
    "LossMeter",
    "Run",
    "TopKAccuracy",
    "allow_tf32",
    "build_model",
    "build_optimizer",
    "build_processor",
    "check_checkpoint",
    "describe_device",
    "keep_freed_memory",
    "load_model",
    "load_processor",
    "largest_map",
    "learning_rate",
    "make_accelerator",
    "set_learning_rate",
    "percentiles",
    "precision_name",
    "set_up",
    "settle_precision",
    "train",
    "train_step",
    "training_loss",
    "validate",
    "validate_checkpoint",
]
