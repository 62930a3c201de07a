"""Time our own training or validation steps: images per second, and where the time goes.

effnet-hf benchmark train --config b0 --loader synthetic --per_device_batch_size 32 --global_batch_size 32
effnet-hf benchmark inference --config b0 --data_dir DIR --steps 50
"""

import sys

from ..cli import at_least, run
from ..errors import UserError
from ..recipes import parse_recipe
from ..run_folder import RunFolder


def add_flags(parser) -> None:
    parser.add_argument("mode", nargs="?", choices=["train", "inference"], default="train", help="which steps to time")
    parser.add_argument("--steps", type=at_least(1), default=100, help="steps to time, after 10 that do not count")


def main(argv: list[str] | None = None) -> int:
    recipe, arguments = parse_recipe(
        argv,
        description="Time training or validation steps; every option defaults to the recipe's.",
        extra_flags=add_flags,
    )
    if arguments.print_config:
        print(recipe.to_yaml(), end="")
        return 0
    if recipe.placement != "none":
        raise UserError(f"--config {arguments.config} is a recipe that quantizes; only float networks are timed.")
    if not (recipe.data_dir or recipe.dataset_name or recipe.labels) and recipe.loader != "synthetic":
        print("no --data_dir: timed on synthetic batches, which cost no loading", file=sys.stderr)
        recipe = recipe.replace(loader="synthetic")
    return run_benchmark(recipe, arguments.mode, arguments.steps)


def run_benchmark(recipe, mode: str, steps: int) -> int:
    """Times steps and prints what was found."""
    from ..training import benchmark_steps

    figures = benchmark_steps(recipe, mode, steps)
    print(f"{figures['device']}, {figures['precision']}")
    print(f"{figures['total_ips']:.1f} images/s, {figures['compute_ips']:.1f} without waiting for data")
    print("  ".join(f"{name} {figures[f'latency_{name}']:.1f} ms" for name in ("p50", "p95", "p99")), "per step")
    print(f"all figures: {RunFolder(recipe.output_dir).benchmark}")
    return 0


if __name__ == "__main__":
    run(main)
