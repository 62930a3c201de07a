"""What a model knows: figures per class, its mistakes, calibration, likely label errors, and a report of all of it."""

from .answers import Answers, Recorder
from .figures import Figures
from .folds import sum_folds
from .measure import measure, summary
from .pages import require_report_folder, write_report
from .temperature import put_temperature, require_storable, store_temperature


__all__ = [
    "Answers",
    "Figures",
    "Recorder",
    "measure",
    "put_temperature",
    "require_report_folder",
    "require_storable",
    "store_temperature",
    "sum_folds",
    "summary",
    "write_report",
]
