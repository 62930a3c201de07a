"""Quantize a trained EfficientNet to int8: calibrate its ranges, fine-tune it, report float against int8.

effnet-hf qat --config quant-b0 --model runs/b0 --data_dir DIR
effnet-hf qat --config quant-b0 --model runs/b0 --data_dir DIR --epochs 0                      calibrate only
effnet-hf qat --config quant-b0 --model runs/b0 --data_dir DIR --epochs 0 --sensitivity sqnr   which layers hurt?
"""

from ..cli import run
from ..recipes import GROUPS, parse_recipe
from .train import add_token_flag, require_data, use_token


def main(argv: list[str] | None = None) -> int:
    recipe, arguments = parse_recipe(
        argv,
        description="Quantization-aware training; every option defaults to the recipe's.",
        extra_flags=add_token_flag,
        groups=GROUPS,
        config="quant-b0",
    )
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    require_data(recipe)
    use_token(arguments.hub_token)
    from ..quantization import Quantization  # torch takes seconds to import, so it waits until here
    from ..training import train

    return train(recipe, Quantization(recipe))


if __name__ == "__main__":
    run(main)
