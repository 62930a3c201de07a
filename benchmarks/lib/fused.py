"""Fused kernels in a training step, an experiment with an end: python benchmark.py fused --device cuda

Ours eager, compiled, with the kernels of effnet_hf/fused, and with them compiled, on one set of weights; then the same
with cuDNN's depthwise convolutions instead of our own. The losses of two steps have to agree before anything is timed.
`KEEP` times our compiled step, or the kernels go.

On a CPU it is a rehearsal in Triton's interpreter: TRITON_INTERPRET=1 python benchmark.py fused --image_size 32
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from effnet_hf.cli import at_least
from effnet_hf.configuration import EfficientNetNVConfig
from effnet_hf.errors import UserError, first_line
from effnet_hf.fused import fuse_for_gpu_training, layers
from effnet_hf.modeling_efficientnet_nv import ConvNormAct, EfficientNetNVForImageClassification, MBConv

from .contenders import AUTOCAST, OURS, build, images, set_precision, training_step
from .environment import environment, resolve_device
from .flags import common_parser, image_size_for, settings
from .report import table, write_figures
from .roofline import count
from .timing import Samples, release, speed_up, take_turns


KEEP = 1.15
BASELINE = "compile"
FORMS: dict[str, tuple[str, Callable | None]] = {
    "eager": ("eager", None),
    BASELINE: ("compile", None),
    "fused": ("eager", fuse_for_gpu_training),
    "fused, compile": ("compile", fuse_for_gpu_training),
    "fused but depthwise": ("eager", partial(fuse_for_gpu_training, depthwise=False)),
    "fused but depthwise, compile": ("compile", partial(fuse_for_gpu_training, depthwise=False)),
}
# What time may run out before, last.
GROUPS = (tuple(FORMS)[:4], (BASELINE, *tuple(FORMS)[4:]))
# Reads and writes of a batch norm's map in a training step, compiled and with our kernels, which name theirs.
PASSES = {"squeeze-excite": (11, 8), "activation": (8, 8), "neither": (8, 8)}


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("fused", __doc__.splitlines()[0], "precisions", "rounds")
    parser.add_argument("--batch_size", type=at_least(1), default=2, help="images per step")
    parser.add_argument("--burst", type=at_least(1), default=1, help="steps per turn")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    if layers.functions is None:
        raise UserError("benchmark.py fused needs triton, which is not installed: pip install triton.")
    if layers.INTERPRETED != (device.type == "cpu"):
        wanted = "set TRITON_INTERPRET=1 for Triton's interpreter" if device.type == "cpu" else "unset TRITON_INTERPRET"
        raise UserError(f"--device {device.type}: {wanted}.")
    figures = {"kind": "fused", **environment(device), "settings": settings(arguments), "rows": [], "predicted": []}
    figures["left_out"] = []
    for variant in arguments.variants:
        size = image_size_for(arguments, variant)
        for precision in arguments.precisions:
            set_precision(precision, device)
            figures["predicted"].append(predict(variant, size, precision))
            for group in GROUPS[: 1 if device.type == "cpu" else None]:
                rows, failures = measure(arguments, device, variant, size, precision, group)
                known = [(row["variant"], row["precision"], row["form"]) for row in figures["rows"]]
                figures["rows"] += [row for row in rows if (variant, precision, row["form"]) not in known]
                figures["left_out"] += failures
                figures["verdict"] = verdict(figures["rows"], device)
                if arguments.output:  # after every group: a run that is cut off leaves what it has
                    write_figures(figures, arguments.output)
    print(table(figures["predicted"]))
    if figures["rows"]:
        print(table(figures["rows"]))
    for line in figures["left_out"]:
        print(f"left out: {line}")
    print(figures["verdict"])
    return 0


def measure(arguments, device, variant, size, precision, forms) -> tuple[list[dict], list[str]]:
    """Rows of one group, and a sentence for each form that failed or computes something else."""
    torch.manual_seed(0)
    first = build(OURS, variant, size)
    first.dropout.p = 0.0  # losses are compared
    pixels = images(arguments.batch_size, size, device, channels_last=True)
    labels = torch.randint(0, 1000, (len(pixels),), device=device)
    steps: dict[str, Any] = {}
    losses: dict[str, list[float]] = {}
    failures: list[str] = []
    # A rehearsal's batch norms have a handful of values, and rounding grows to a tenth of the loss.
    tolerance = 0.2 if device.type == "cpu" else 0.02

    def fail(form: str, error: Exception) -> None:
        failures.append(f"{variant} {precision}, {form}: {first_line(error)}")

    for form in forms:
        mode, change = FORMS[form]
        model = copy.deepcopy(first)
        if change is not None:
            change(model)
        try:
            step = training_step(OURS, model, pixels, precision, mode, tuned=False, labels=labels)
            losses[form] = [step().item() for _ in range(2)]
            right = next(iter(losses.values()))
            if not all(math.isclose(own, other, rel_tol=tolerance) for own, other in zip(losses[form], right)):
                raise RuntimeError(f"losses {losses[form]} instead of {right}")
            steps[form] = step
        except RuntimeError as error:
            fail(form, error)
    warmup = 0 if device.type == "cpu" else 3
    samples = take_turns(steps, device, arguments.rounds, warmup=warmup, burst=arguments.burst, failed=fail)
    rows = []
    for form, own in samples.items():
        row: dict[str, Any] = {"variant": variant, "form": form, "precision": precision, "image_size": size}
        row |= {"batch": len(pixels), "losses": [round(loss, 4) for loss in losses[form]]}
        summary = own.summary(len(pixels))
        row |= {name: summary[name] for name in ("wall_ms", "wall_ms_q25", "wall_ms_q75", "ips", "steps")}
        rows.append(row | {"x compile": _times(own, samples.get(BASELINE))})
    steps.clear()
    release(device)
    return rows, failures


def _times(own: Samples, baseline: Samples | None) -> float | None:
    return None if baseline is None else speed_up(own, baseline, on_cpu=False)["wall"]


def verdict(rows: list[dict], device: torch.device) -> str:
    """The stop rule, in a sentence: B0 in bf16 on a card."""
    found = [row for row in rows if (row["variant"], row["precision"]) == ("b0", "bf16") and row["x compile"]]
    fused = [row for row in found if row["form"].startswith("fused")]
    if device.type == "cpu" or not fused:
        return "no verdict: it takes B0 in bf16 on a GPU, compiled and fused"
    best = max(fused, key=lambda row: row["x compile"])
    gain = f"{best['form']}: {best['x compile']:.3f} times our compiled step, n = {best['steps']}"
    return f"{gain}; {KEEP:g} was asked for: {'the kernels stay' if best['x compile'] >= KEEP else 'the kernels go'}"


def predict(variant: str, size: int, precision: str) -> dict:
    """Megabytes an image that a step moves, at best: convolutions and products, and the passes over batch norm's maps;
    and by how much the step shrinks if memory alone decides."""
    dtype = AUTOCAST.get(precision, torch.float32)
    elements = dict.fromkeys(PASSES, 0)
    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant)).train()
        gated = {block.depthwise for block in model.modules() if isinstance(block, MBConv) and block.se is not None}

        def note(layer: ConvNormAct, _, output: torch.Tensor) -> None:
            kind = "squeeze-excite" if layer in gated else "neither" if layer.act is None else "activation"
            elements[kind] += output[0].numel()

        for layer in model.modules():
            if isinstance(layer, ConvNormAct):
                layer.register_forward_hook(note)
        model(torch.empty(2, 3, size, size))
    products = count(variant, size, dtype)["training"]["fused_bytes"] / 1e6
    compiled, fused = (
        products + sum(PASSES[kind][way] * number for kind, number in elements.items()) * dtype.itemsize / 1e6
        for way in (0, 1)
    )
    row = {"variant": variant, "precision": precision, "image_size": size, "MB of products": products}
    return row | {"MB compiled": compiled, "MB fused": fused, "x compile, predicted": compiled / fused}
