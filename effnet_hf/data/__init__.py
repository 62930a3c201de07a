"""Input pipelines: one loader interface, several backends. `build_loaders(recipe, ...)` is the way in."""

from .bad_files import BadFile, BadFiles
from .loaders import Loader, Loaders, build_loaders
from .sampler import BatchPlan
from .source import DataSource, Split


__all__ = ["BadFile", "BadFiles", "BatchPlan", "DataSource", "Loader", "Loaders", "Split", "build_loaders"]
