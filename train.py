"""Train or fine-tune an EfficientNet.

    accelerate launch train.py --config b0 --data_dir DIR
    accelerate launch train.py --config b0 --data_dir DIR --model me/effnet-b0 --epochs 10
    python train.py --help
"""

from effnet_hf.cli import run
from effnet_hf.errors import UserError
from effnet_hf.recipes import parse_recipe


def main() -> int:
    recipe, arguments = parse_recipe(description="Train or fine-tune an EfficientNet; every option defaults to the recipe's.")
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    if not recipe.data_dir and not recipe.dataset_name and recipe.loader != "synthetic":
        raise UserError("no data: give --data_dir DIR with train/<class>/… and val/<class>/…, or --dataset_name user/name.")
    from effnet_hf.training import train  # after the flags are known to be right: torch takes seconds to import

    return train(recipe)


if __name__ == "__main__":
    run(main)
