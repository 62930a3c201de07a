"""Measures what this package claims, beside its peers: `python benchmark.py data --data_dir FOLDER`."""

import difflib
import importlib
import sys

from effnet_hf import cli
from effnet_hf.errors import UserError


COMMANDS = {
    "data": "pictures per second and core of every loader, beside timm, torchvision and datasets",
}


def main() -> int:
    known = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(f"usage: benchmark.py COMMAND [flags]\n\n{known}\n\nbenchmark.py COMMAND --help lists its flags.")
        return 0
    if sys.argv[1] not in COMMANDS:
        nearest = difflib.get_close_matches(sys.argv[1], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {sys.argv[1]}; {hint}")
    return importlib.import_module(f"effnet_hf.benchmark.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    cli.run(main)
