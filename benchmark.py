"""Measures what this package claims, beside its peers: `python benchmark.py data --data_dir FOLDER`."""

import importlib
import sys

from effnet_hf import cli


COMMANDS = {
    "data": "pictures per second and core of every loader, beside timm, torchvision and datasets",
}


def main() -> int:
    known = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        asked_for_help = sys.argv[1:2] in ([], ["-h"], ["--help"])
        print(
            f"usage: benchmark.py COMMAND [flags]\n\n{known}\n\nbenchmark.py COMMAND --help lists its flags."
            if asked_for_help
            else f"benchmark.py: error: unknown command {sys.argv[1]}; there are: {', '.join(COMMANDS)}",
            file=sys.stdout if asked_for_help else sys.stderr,
        )
        return 0 if asked_for_help else 2
    return importlib.import_module(f"effnet_hf.benchmark.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    cli.run(main)
