"""Train or fine-tune an EfficientNet.

effnet-hf train --config imagenette --data_dir DIR
accelerate launch -m effnet_hf.commands.train --config b0 --data_dir DIR
effnet-hf train --config b0 --data_dir DIR --model me/effnet-b0 --epochs 10
"""

import os

from ..cli import at_least, invocation, run
from ..errors import UserError
from ..recipes import parse_recipe
from .benchmark import run_benchmark


def add_flags(parser) -> None:
    parser.add_argument("--benchmark", choices=["train", "inference"], help="time steps instead of training")
    parser.add_argument(
        "--lr_find",
        "--lr-find",
        action="store_true",
        help="raise the learning rate step by step instead and suggest one",
    )
    parser.add_argument(
        "--steps",
        type=at_least(1),
        help="steps that --benchmark times (100 by default), after 10 it does not; or of --lr_find (by default 100, or"
        " what takes a minute here)",
    )
    add_token_flag(parser)


def add_token_flag(parser) -> None:
    parser.add_argument(
        "--hub_token", "--hub-token", metavar="TOKEN", help="default: the one `hf auth login` stored, or HF_TOKEN"
    )


def main(argv: list[str] | None = None) -> int:
    recipe, arguments = parse_recipe(
        argv,
        description="Train or fine-tune an EfficientNet; every option defaults to the recipe's.",
        extra_flags=add_flags,
    )
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    if recipe.placement != "none":
        raise UserError(f"--config {arguments.config} is a recipe that quantizes; run {invocation('qat')} instead.")
    if arguments.steps and not (arguments.benchmark or arguments.lr_find):
        raise UserError(
            f"--steps {arguments.steps} goes with --benchmark or --lr_find; leave it out, a run's length is --epochs."
        )
    require_data(recipe)
    use_token(arguments.hub_token)
    if arguments.lr_find:
        if arguments.benchmark:
            raise UserError("--lr_find and --benchmark are two things to do instead of training; give one.")
        if recipe.resume:
            raise UserError("--lr_find tries rates from the start of a run; leave out --resume.")
    if arguments.benchmark:
        return run_benchmark(recipe, arguments.benchmark, arguments.steps or 100)
    if arguments.lr_find:
        from ..training import find_learning_rate

        find_learning_rate(recipe, arguments.steps)
        return 0
    from ..training import train  # torch takes seconds to import, so it waits until the flags are known to be right

    return train(recipe)


def require_data(recipe) -> None:
    """Raises `UserError` for a recipe that names no images."""
    if not (recipe.data_dir or recipe.dataset_name or recipe.labels) and recipe.loader != "synthetic":
        raise UserError(
            "no data: give --data_dir DIR with train/<class>/… and val/<class>/…, --labels FILE.csv, or --dataset_name"
            " user/name."
        )


def use_token(token: str | None) -> None:
    """Hands a token to huggingface_hub the way its own users do: it is no part of a recipe, a log or a card."""
    if token:
        os.environ["HF_TOKEN"] = token


if __name__ == "__main__":
    run(main)
