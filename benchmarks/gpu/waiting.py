"""Imports everything, waits for a line on stdin, and runs a script: python waiting.py SCRIPT ARGUMENTS

Sections that are alone on the card start this way while others still run, so that no second of theirs is an import.
"""

import os
import runpy
import sys

import timm  # noqa: F401
import torchvision  # noqa: F401
import transformers.models.efficientnet.modeling_efficientnet  # noqa: F401

import effnet_hf.training.steps  # noqa: F401


if __name__ == "__main__" and sys.stdin.readline():  # nothing but the end of the file: whoever started this is gone
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(sys.argv[0])  # as where Python runs the script itself
    runpy.run_path(sys.argv[0], run_name="__main__")
