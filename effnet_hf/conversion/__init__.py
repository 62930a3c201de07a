"""Any EfficientNet in, ours out, and back: see docs/conversion.md."""

from .load import DIALECTS, Converted, find_dialect, imagenet_names, load_foreign
from .save import FOREIGN, TRAINER_FILE, to_foreign, write_folder, write_foreign
from .trainer_state import TrainerState
from .warm_start import warm_start


__all__ = [
    "DIALECTS",
    "FOREIGN",
    "TRAINER_FILE",
    "Converted",
    "TrainerState",
    "find_dialect",
    "imagenet_names",
    "load_foreign",
    "to_foreign",
    "warm_start",
    "write_folder",
    "write_foreign",
]
