"""Flags that the commands share."""

import argparse
from collections.abc import Callable

from effnet_hf import cli
from effnet_hf.configuration import VARIANTS, EfficientNetNVConfig

from .contenders import PEERS, PRECISIONS


def words(*choices: str) -> Callable[[str], list[str]]:
    """Type of a comma-separated flag whose words come from `choices`."""

    def parse(text: str) -> list[str]:
        chosen = [word for word in text.split(",") if word]
        for word in chosen:
            if word not in choices:
                raise argparse.ArgumentTypeError(f"there is no {word}; there are {', '.join(choices)}")
        return chosen

    return parse


def numbers(text: str) -> list[int]:
    """Type of a comma-separated flag of positive integers."""
    try:
        parsed = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is no list of numbers such as 1,8,64") from None
    if min(parsed) < 1:
        raise argparse.ArgumentTypeError(f"{text}: numbers start at 1")
    return parsed


# Flags that several commands heed, and each that heeds one names.
_SHARED: dict[str, dict] = {
    "peers": {"type": words(*PEERS), "default": list(PEERS), "help": "comma-separated, may be empty"},
    "precisions": {"type": words(*PRECISIONS), "default": ["fp32"], "help": "comma-separated"},
    "rounds": {"type": cli.at_least(1), "default": 10, "help": "measured rounds, in which all take turns"},
    "budget": {"type": cli.above_zero, "help": "seconds after which no new cell starts"},
}


def common_parser(name: str, description: str, *shared: str) -> cli.ArgumentParser:
    """Flags of every command that runs networks, and those of `_SHARED` that are named."""
    parser = cli.ArgumentParser(prog=f"benchmark.py {name}", description=description)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--num_threads", type=cli.at_least(1), help="threads of a CPU; torch's choice if not given")
    parser.add_argument("--variants", type=words(*VARIANTS), default=["b0"], help="comma-separated")
    parser.add_argument("--image_size", type=cli.at_least(1), help="side in pixels; the variant's by default")
    for flag in shared:
        parser.add_argument(f"--{flag}", **_SHARED[flag])
    parser.add_argument("--output", type=cli.path, help="write the figures to this JSON file")
    return parser


def image_size_for(arguments, variant: str) -> int:
    """Side in pixels: `--image_size`, or the variant's own."""
    return arguments.image_size or EfficientNetNVConfig.from_variant(variant).image_size


def settings(arguments) -> dict:
    """The flags as they go into a result file: without paths of this machine."""
    return {name: value for name, value in vars(arguments).items() if name not in ("output", "data_dir", "model")}
