"""The import path for a process that a test starts."""

import os
import sys
from pathlib import Path


def child_path(with_package: bool = False) -> str:
    """This process's import path as a PYTHONPATH, without the package unless `with_package`.

    Never with `transformers_modules`: transformers puts its cache of downloaded code on the path of a process that has
    opened remote code, and a child would look there instead of in its own.
    """
    left_out = ["transformers_modules", *([] if with_package else ["effnet_hf"])]
    entries = [entry for entry in sys.path if entry and not any((Path(entry) / name).exists() for name in left_out)]
    return os.pathsep.join(entries)
