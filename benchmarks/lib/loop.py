"""Our whole training loop on real images and on synthetic ones: python benchmark.py loop --data_dir DIR

What the input pipeline leaves of the device's speed: `total_ips` counts waiting for data, `compute_ips` does not.
"""

import tempfile

import torch

from effnet_hf.cli import at_least, path
from effnet_hf.errors import UserError
from effnet_hf.recipes import load_recipe
from effnet_hf.training import benchmark_steps

from .contenders import PRECISIONS
from .environment import environment, resolve_device
from .flags import common_parser, numbers, settings, words
from .report import table, write_figures


LOADERS = ("synthetic", "imagefolder", "dali-cpu", "dali-gpu")


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("loop", __doc__.splitlines()[0], "precisions", "rounds")
    parser.add_argument("--data_dir", type=path, required=True, help="folder with train/<class>/… and val/<class>/…")
    parser.add_argument("--loaders", type=words(*LOADERS), default=["synthetic", "imagefolder"], help="comma-separated")
    parser.add_argument("--batch_sizes", type=numbers, default=[32], help="of each variant, comma-separated")
    parser.add_argument("--num_workers", type=at_least(0), help="loader processes; the free cores by default")
    parser.add_argument("--compile", choices=["none", "full", "blocks"], default="none", help="as train.py's")
    arguments = parser.parse_args(argv)
    if arguments.precisions[0] not in PRECISIONS or len(arguments.precisions) > 1:
        parser.error("--precisions: one at a time, Accelerate keeps it for the whole process")
    device = resolve_device(arguments.device, arguments.num_threads)
    if device.type == "cpu" and torch.accelerator.is_available():
        raise UserError("--device cpu: training takes the GPU of this machine; hide it with CUDA_VISIBLE_DEVICES=''.")
    rows, left_out = [], []
    for variant, batch in zip(arguments.variants, arguments.batch_sizes * len(arguments.variants)):
        for loader in arguments.loaders:
            with tempfile.TemporaryDirectory() as scratch:
                recipe = load_recipe(
                    "b0", variant=variant, loader=loader, precision=arguments.precisions[0], quiet=True,
                    data_dir=None if loader == "synthetic" else arguments.data_dir, output_dir=scratch,
                    per_device_batch_size=batch, global_batch_size=batch, num_workers=arguments.num_workers,
                    image_size=arguments.image_size, compile=arguments.compile,
                )  # fmt: skip
                try:
                    figures = benchmark_steps(recipe, "train", arguments.rounds)
                except UserError as error:
                    left_out.append(f"{variant} {loader}: {error}")
                    continue
            row = {"network": variant, "loader": loader, "precision": figures["precision"], "batch": batch}
            row["compile"] = figures["compile"]
            row |= {name: figures[name] for name in ("image_size", "total_ips", "compute_ips", "latency_p50", "steps")}
            rows.append(
                row | {"waiting, %": 100 * figures["data_time"] / (figures["data_time"] + figures["compute_time"])}
            )
    print(table(rows) if rows else "nothing ran")
    for line in left_out:
        print(f"left out: {line}")
    if arguments.output:
        figures = {"kind": "loop", **environment(device), "settings": settings(arguments), "rows": rows}
        write_figures({**figures, "left_out": left_out}, arguments.output)
    return 0
