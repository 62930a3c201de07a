"""Any EfficientNet in, ours out, and back: see docs/conversion.md."""

from .dialect import has_class_names
from .load import DIALECTS, Converted, find_dialect, imagenet_names, load_foreign
from .save import FOREIGN, check_output, to_foreign, write_folder, write_foreign
from .trainer_state import TRAINER_FILE, TrainerState, read_trainer_state
from .warm_start import warm_start


__all__ = [
    "DIALECTS",
    "FOREIGN",
    "TRAINER_FILE",
    "Converted",
    "TrainerState",
    "check_output",
    "find_dialect",
    "has_class_names",
    "imagenet_names",
    "load_foreign",
    "read_trainer_state",
    "to_foreign",
    "warm_start",
    "write_folder",
    "write_foreign",
]
