"""The flag that says what computes, for commands that answer with a network."""

import argparse


# Those of `effnet_hf.export.engines`, written out because that imports torch, which `--help` does not wait for.
RUNTIMES = ("torch", "auto", "folded", "compile", "graphs", "onnxruntime", "openvino")


def add_runtime_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runtime",
        choices=RUNTIMES,
        default="torch",
        help="what computes; auto: the fastest that is installed, measured once and remembered; torch if not given",
    )
