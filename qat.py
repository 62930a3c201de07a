"""Quantize a trained EfficientNet to int8: calibrate its ranges, fine-tune it, report float against int8.

accelerate launch qat.py --config quant-b0 --model runs/b0 --data_dir DIR
python qat.py --config quant-b0 --model runs/b0 --data_dir DIR --epochs 0                      calibrate only
python qat.py --config quant-b0 --model runs/b0 --data_dir DIR --epochs 0 --sensitivity sqnr   which layers hurt?
python qat.py --help
"""

from effnet_hf.cli import run
from effnet_hf.errors import UserError
from effnet_hf.recipes import GROUPS, parse_recipe
from validate import show


def add_flags(parser) -> None:
    parser.add_argument("--evaluate", action="store_true", help="only measure --model as it is, as validate.py does")


def main() -> int:
    recipe, arguments = parse_recipe(
        description="Quantization-aware training; every option defaults to the recipe's.",
        extra_flags=add_flags,
        groups=GROUPS,
        config="quant-b0",
    )
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    if not recipe.data_dir and not recipe.dataset_name and recipe.loader != "synthetic":
        raise UserError("no data: give --data_dir DIR with train/<class>/… and val/<class>/….")
    if arguments.evaluate:
        loader = recipe.loader
        if not recipe.model or loader == "synthetic":
            raise UserError("--evaluate needs --model and real pictures.")
        from effnet_hf.training import validate_checkpoint

        show(
            validate_checkpoint(
                recipe.model,
                recipe.data_dir,
                precision=recipe.precision,
                per_device_batch_size=recipe.per_device_batch_size or 64,
                num_workers=recipe.num_workers,
                loader=loader,
                topk=recipe.topk,
                dataset_name=recipe.dataset_name,
                dataset_config=recipe.dataset_config,
                val_fraction=recipe.val_fraction,
            ),
            recipe.topk,
        )
        return 0
    from effnet_hf.quantization import Quantization  # torch takes seconds to import, so it waits until here
    from effnet_hf.training import train

    quantization = Quantization(recipe)
    return train(
        recipe, prepare_model=quantization.prepare, check_model=quantization.check, describe=quantization.describe
    )


if __name__ == "__main__":
    run(main)
