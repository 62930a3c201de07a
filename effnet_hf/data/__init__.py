"""Input pipelines: one loader interface, several backends. `build_loaders(recipe, processor, plan)` is the way in."""

from .bad_files import BadFile, BadFiles
from .classes import in_words, match_classes
from .device_stage import BatchMixer, DeviceStage
from .folder import list_images
from .listing import DataListing
from .loaders import Loader, Loaders, build_loaders
from .pictures import BadPicture, Box, Picture, Reading, read_file
from .sampler import BatchPlan
from .scan import Scan, scan_data
from .source import DataSource, Split
from .transforms import EvaluationTransform, TrainTransform


__all__ = [
    "BadFile",
    "BadFiles",
    "BadPicture",
    "BatchMixer",
    "BatchPlan",
    "Box",
    "DataListing",
    "DataSource",
    "DeviceStage",
    "EvaluationTransform",
    "Loader",
    "Loaders",
    "Picture",
    "Reading",
    "Scan",
    "Split",
    "TrainTransform",
    "build_loaders",
    "in_words",
    "list_images",
    "match_classes",
    "read_file",
    "scan_data",
]
