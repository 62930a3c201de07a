"""The commands, one module each: parse, call, print. `effnet-hf train`, or `python -m effnet_hf.commands.train`."""

import importlib
import sys

from ..cli import run
from ..errors import UserError, did_you_mean


COMMANDS = {
    "train": "train or fine-tune on a folder of images",
    "validate": "measure a checkpoint: top-1, top-5, loss",
    "classify": "say what is on images",
    "convert": "any EfficientNet's checkpoint in, ours out; ours in, any out",
    "qat": "quantize to int8: calibrate, fine-tune, compare with float",
    "export": "write ONNX, OpenVINO or torch.export files, proved against PyTorch",
    "benchmark": "time our own training or validation steps",
    "scan": "check a folder of images before a run meets it",
    "plots": "draw the curves of one or several runs",
    "space": "make a web page of a checkpoint, for the Hub's Spaces",
    "folds": "sum the runs of a k-fold cross-validation",
}


def main() -> None:
    """The console script `effnet-hf`; ends the process."""
    known = sys.argv[1:2] and sys.argv[1] in COMMANDS
    run(_dispatch, None if known else "effnet-hf")  # the error is the program's, not a command's


def run_command(name: str) -> None:
    """Runs one command on `sys.argv[1:]`, for the scripts at the root of a clone; ends the process."""
    run(lambda: _module(name).main(sys.argv[1:]))


def _dispatch() -> int | None:
    from ..__about__ import __version__

    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        print(f"usage: effnet-hf COMMAND [flags]\n\n{lines}\n\neffnet-hf COMMAND --help lists its flags.")
        return 0 if words else 2
    if words[0] in ("-V", "--version"):
        print(f"effnet-hf {__version__}")
        return 0
    if words[0] not in COMMANDS:
        raise UserError(
            f"there is no command {words[0]}; there are {', '.join(COMMANDS)}.{did_you_mean(words[0], COMMANDS)}"
        )
    return _module(words[0]).main(words[1:])


def _module(name: str):
    return importlib.import_module(f"{__name__}.{name}")
