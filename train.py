"""Train or fine-tune an EfficientNet.

accelerate launch train.py --config b0 --data_dir DIR
accelerate launch train.py --config b0 --data_dir DIR --model me/effnet-b0 --epochs 10
python train.py --benchmark train --loader synthetic --variant b0 --per_device_batch_size 32 --global_batch_size 32
python train.py --help
"""

from effnet_hf.cli import at_least, run
from effnet_hf.errors import UserError
from effnet_hf.recipes import parse_recipe


def add_flags(parser) -> None:
    parser.add_argument("--benchmark", choices=["train", "inference"], help="time steps instead of training")
    parser.add_argument(
        "--steps", type=at_least(1), default=100, help="steps that --benchmark times, after 10 it does not"
    )


def main() -> int:
    recipe, arguments = parse_recipe(
        description="Train or fine-tune an EfficientNet; every option defaults to the recipe's.", extra_flags=add_flags
    )
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    if recipe.placement != "none":
        raise UserError(f"--config {arguments.config} is a recipe of qat.py, which quantizes; run that instead.")
    if not recipe.data_dir and not recipe.dataset_name and recipe.loader != "synthetic":
        raise UserError(
            "no data: give --data_dir DIR with train/<class>/… and val/<class>/…, or --dataset_name user/name."
        )
    if arguments.benchmark:  # torch takes seconds to import, so it waits until the flags are known to be right
        from effnet_hf.benchmark.steps import benchmark_steps

        figures = benchmark_steps(recipe, arguments.benchmark, arguments.steps)
        print(f"{figures['device']}, {figures['precision']}")
        print(f"{figures['total_ips']:.1f} pictures/s, {figures['compute_ips']:.1f} without waiting for data")
        print("  ".join(f"{name} {figures[f'latency_{name}']:.1f} ms" for name in ("p50", "p95", "p99")), "per step")
        print(f"all figures: {recipe.output_dir}/benchmark.json")
        return 0
    from effnet_hf.training import train

    return train(recipe)


if __name__ == "__main__":
    run(main)
