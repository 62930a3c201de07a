"""Training as one readable story under Accelerate: start with `loop.py`."""

from .evaluation import validate_checkpoint
from .loop import train, train_step, validate
from .lr_find import find_learning_rate
from .memory import largest_map
from .metrics import LatencyMeter, LossMeter, TopKAccuracy, percentiles
from .model import Start, build_model, build_processor, open_start
from .optim import build_optimizer, learning_rate, set_learning_rate, training_loss
from .precision import allow_tf32, keep_freed_memory, make_accelerator, settle_precision, start_accelerator
from .run import Run
from .setup import build_run, describe_device, restore_run
from .steps import benchmark_steps, training_steps


__all__ = [
    "LatencyMeter",
    "LossMeter",
    "Run",
    "Start",
    "TopKAccuracy",
    "allow_tf32",
    "build_model",
    "benchmark_steps",
    "build_optimizer",
    "build_processor",
    "build_run",
    "restore_run",
    "training_steps",
    "describe_device",
    "find_learning_rate",
    "keep_freed_memory",
    "largest_map",
    "learning_rate",
    "make_accelerator",
    "set_learning_rate",
    "open_start",
    "percentiles",
    "settle_precision",
    "start_accelerator",
    "train",
    "train_step",
    "training_loss",
    "validate",
    "validate_checkpoint",
]
