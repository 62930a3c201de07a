"""Measures what this package claims, beside its peers: `python benchmark.py data --data_dir FOLDER`."""

import difflib
import importlib
import sys
from pathlib import Path

from effnet_hf.cli import run
from effnet_hf.errors import UserError


COMMANDS = {
    "train": "training steps beside timm, torchvision and stock transformers",
    "inference": "latency percentiles and throughput of every runtime, beside the peers",
    "memory": "peak memory of training and inference, with and without gradient checkpointing",
    "roofline": "bytes and FLOPs counted, and the share of this machine's peaks that a step reaches",
    "loop": "our whole training loop on real and on synthetic images",
    "ablation": "what each of our CPU tunings brings",
    "fused": "an experiment: our training step with fused kernels on a GPU",
    "data": "images per second and core of every loader, beside timm, torchvision and datasets",
    "suite": "training, inference, memory, roofline, ablation and loop as one page in benchmarks/",
    "page": "renders a folder of results again from its JSON",
}


def main() -> int:
    known = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    if sys.argv[1:2] in ([], ["-h"], ["--help"]):
        print(f"usage: benchmark.py COMMAND [flags]\n\n{known}\n\nbenchmark.py COMMAND --help lists its flags.")
        return 0
    if sys.argv[1] not in COMMANDS:
        nearest = difflib.get_close_matches(sys.argv[1], COMMANDS, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are: {', '.join(COMMANDS)}"
        raise UserError(f"unknown command {sys.argv[1]}; {hint}")
    sys.path.insert(0, str(Path(__file__).resolve().with_name("benchmarks")))  # where `lib` is
    return importlib.import_module(f"lib.{sys.argv[1]}").main(sys.argv[2:])


if __name__ == "__main__":
    run(main)
