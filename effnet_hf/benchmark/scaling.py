"""From one GPU to 8 and 64, on paper: python benchmark.py scaling

    step        t(1) = batch / step_ips                                     measured on one GPU
    all-reduce  V = 2 (n - 1) / n * parameters * 4 bytes                    fp32 gradients, ring
    exposed     max(0, V / bandwidth - t(1) * 2 / 3)                        the rest hides behind the backward pass
    waiting     W(n) = w_machine [n > 1] + w_network * log2(machines)       a step is as slow as its slowest GPU
    loader      t(loader) = batch / (cores per GPU * pictures per second and core)        where GPUs share the cores
    speed       n * batch / (max(t(1), t(loader)) + exposed + W(n))
    hours       epochs * 1,281,167 / speed * 1.09                           validation, checkpoints, start-up

Three constants are fitted to three of the original's published rows (8x A100 B0 fp16 and B4 fp16, 64x A100 B4 fp16):
w_machine = 11.7 ms, w_network = 11.7 ms, 144 pictures per second and core. The 1.09 is the mean of what the four
published whole runs took beyond their training steps. The other published rows check them; `tests/benchmark` does.
"""

import math
from typing import Any

from .. import cli
from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from . import published
from .report import markdown_table


IMAGENET = 1_281_167
WAIT_MACHINE, WAIT_NETWORK = 11.7e-3, 11.7e-3  # seconds a step
OVERHEAD = 1.09
PER_MACHINE = 8
# Bus bandwidth of an all-reduce, bytes per second: NVLink of an A100 machine; eight 200 Gb/s links between machines.
WITHIN, BETWEEN = 230e9, 160e9
ORIGINAL_CORES, ORIGINAL_LOADER = 16, 144.0  # per A100; Pillow with AutoAugment, from B0 fp16 on 8 GPUs


def parameters(variant: str) -> int:
    """Of the whole classifier, counted without storage."""
    import torch

    from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification

    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant))
    return sum(parameter.numel() for parameter in model.parameters())


def predict(
    step_ips: float, batch: int, num_parameters: int, gpus: int, loader_ips: float = ORIGINAL_CORES * ORIGINAL_LOADER
) -> dict[str, Any]:
    """What `gpus` reach together.

    Args:
        step_ips: pictures per second of one GPU alone, `batch` a step.
        loader_ips: pictures per second that the cores beside one GPU prepare.

    Returns:
        `ips`; `efficiency`, against `gpus` times one; `limit`, what costs most; `all_reduce_ms`, `exposed_ms`,
        `waiting_ms` a step.
    """
    step = batch / step_ips
    machines = math.ceil(gpus / PER_MACHINE)
    all_reduce = 2 * (gpus - 1) / gpus * num_parameters * 4 / (WITHIN if machines == 1 else BETWEEN)
    exposed = max(0.0, all_reduce - step * 2 / 3)
    waiting = (WAIT_MACHINE if gpus > 1 else 0.0) + WAIT_NETWORK * math.log2(machines)
    pace = max(step, batch / loader_ips) if gpus > 1 else step
    ips = gpus * batch / (pace + exposed + waiting)
    limit, lost = max(
        (("all-reduce", exposed), ("waiting", waiting), ("loader", pace - step)), key=lambda each: each[1]
    )
    return {
        "ips": ips,
        "efficiency": ips / (gpus * step_ips),
        "limit": limit if lost > 0.01 * step else "step",
        "all_reduce_ms": 1e3 * all_reduce,
        "exposed_ms": 1e3 * exposed,
        "waiting_ms": 1e3 * waiting,
    }


def whole_run(ips: float, gpus: int, epochs: int = 400, price: float = 2.0) -> dict[str, float]:
    """`hours`, `gpu_hours` and `cost` of `epochs` of ImageNet with validation."""
    hours = epochs * IMAGENET / ips / 3600 * OVERHEAD
    return {"hours": hours, "gpu_hours": hours * gpus, "cost": hours * gpus * price}


def check_rows() -> list[dict]:
    """Published rows beside the formulas: `fitted` ones gave the constants, the others test them."""
    rows = []
    counts = {variant: parameters(variant) for variant, _ in published.TRAINING}
    several = {(variant, precision, 8): ips for (variant, precision), (_, _, ips) in published.TRAINING.items()}
    for (variant, precision, gpus), ips in {**several, **published.SEVERAL_MACHINES}.items():
        batch, single, _ = published.TRAINING[variant, precision]
        predicted = predict(single, batch, counts[variant], gpus)["ips"]
        fitted = (variant, precision, gpus) in (("b0", "fp16", 8), ("b4", "fp16", 8), ("b4", "fp16", 64))
        row = {"network": variant, "precision": precision, "GPUs": gpus, "published img/s": f"{ips:,}"}
        row |= {"formula img/s": f"{predicted:,.0f}", "error": f"{100 * (predicted / ips - 1):+.1f} %"}
        rows.append(row | {"use": "fitted" if fitted else "check"})
    return rows


def outlook(step_ips: dict[str, float], batches: dict[str, int], loader_ips: float, price: float) -> list[dict]:
    """1, 8 and 64 GPUs of each variant."""
    rows = []
    for variant, ips in step_ips.items():
        count = parameters(variant)
        for gpus in (1, 8, 64):
            figures = predict(ips, batches[variant], count, gpus, loader_ips)
            run = whole_run(figures["ips"], gpus, price=price)
            row: dict[str, Any] = {"network": variant, "GPUs": gpus, "img/s": f"{figures['ips']:,.0f}"}
            row |= {"of linear": f"{100 * figures['efficiency']:.0f} %", "costs most": figures["limit"]}
            row |= {"all-reduce, ms": f"{figures['all_reduce_ms']:.2f}", "waiting, ms": f"{figures['waiting_ms']:.1f}"}
            row |= {"400 epochs, h": f"{run['hours']:,.1f}", "GPU-hours": f"{run['gpu_hours']:,.0f}"}
            rows.append(row | {"cost": f"${run['cost']:,.0f}"})
    return rows


def loader_row(step_ips: dict[str, float], loader_ips_per_core: float) -> list[dict]:
    """Cores beside each GPU that keep it busy."""
    return [
        {"network": variant, "one GPU, img/s": f"{ips:,.0f}", "cores that feed it": f"{ips / loader_ips_per_core:.0f}"}
        for variant, ips in step_ips.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(prog="benchmark.py scaling", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--step_ips", nargs="+", default=["b0=2489", "b4=331"], metavar="VARIANT=IPS",
        help="measured pictures per second of one GPU; by default the original's on an A100, fp16",
    )  # fmt: skip
    parser.add_argument("--batch", nargs="+", default=["b0=256", "b4=128"], metavar="VARIANT=N", help="per GPU")
    parser.add_argument("--cores_per_gpu", type=cli.at_least(1), default=ORIGINAL_CORES, help="that prepare pictures")
    parser.add_argument(
        "--loader_ips_per_core", type=cli.above_zero, default=ORIGINAL_LOADER, help="of `benchmark.py data`"
    )
    parser.add_argument(
        "--price", type=cli.above_zero, default=2.0, help="dollars per GPU-hour; an example, no quotation"
    )
    arguments = parser.parse_args(argv)
    step_ips, batches = _pairs("--step_ips", arguments.step_ips, float), _pairs("--batch", arguments.batch, int)
    for variant in step_ips:
        if variant not in batches:
            raise UserError(f"--batch has no {variant}; add {variant}=N.")
    loader_ips = arguments.cores_per_gpu * arguments.loader_ips_per_core
    print("Published rows and the formulas:\n")
    print(markdown_table(check_rows()))
    print("\nOutlook:\n")
    print(markdown_table(outlook(step_ips, batches, loader_ips, arguments.price)))
    print("\nFeeding one GPU:\n")
    print(markdown_table(loader_row(step_ips, arguments.loader_ips_per_core)))
    return 0


def _pairs(flag: str, words: list[str], kind: type) -> dict:
    pairs = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            variant = EfficientNetNVConfig.from_variant(name).variant
            pairs[variant] = kind(value)
        except ValueError as error:
            raise UserError(f"{flag} {word}: write VARIANT=NUMBER, for example b0=2489 ({error}).") from None
        if pairs[variant] <= 0:
            raise UserError(f"{flag} {word}: must be above 0.")
    return pairs
