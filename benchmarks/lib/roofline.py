"""What a step must move and compute, and what this machine could: python benchmark.py roofline --variants b0,b4

FLOPs and bytes are counted on tensors without storage, so this runs anywhere in seconds:

    eager bytes   inputs and outputs of every operation: what unfused kernels move
    fused bytes   inputs and outputs of convolutions and matrix products alone: every elementwise operation and batch
                  norm's scaling fused into a neighbour, which is about what a compiler can reach

The peaks of the machine are measured: a large copy, a large matrix product.
"""

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from effnet_hf.configuration import EfficientNetNVConfig
from effnet_hf.modeling_efficientnet_nv import EfficientNetNVForImageClassification

from .contenders import AUTOCAST, placed, set_precision
from .environment import datasheet, environment, resolve_device
from .flags import common_parser, image_size_for, settings
from .report import table, write_figures
from .timing import wait_for


PRODUCTS = ("convolution", "addmm", "mm", "bmm")
VIEWS = (
    "view",
    "t",
    "detach",
    "expand",
    "slice",
    "permute",
    "transpose",
    "alias",
    "unsqueeze",
    "squeeze",
    "as_strided",
)


class ByteCounter(TorchDispatchMode):
    """Adds up the bytes of all operations' tensors; `product_bytes` of convolutions and matrix products only."""

    def __init__(self):
        super().__init__()
        self.bytes = self.product_bytes = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name.split("::")[1]
        if name not in VIEWS:
            moved = sum(x.numel() * x.element_size() for x in _tensors((args, kwargs or {}, result)))
            self.bytes += moved
            if name.startswith(PRODUCTS):
                self.product_bytes += moved
        return result


def _tensors(thing) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(thing) if isinstance(leaf, torch.Tensor)]


def count(variant: str, image_size: int, dtype: torch.dtype = torch.float32, batch: int = 8) -> dict[str, dict]:
    """Per image, for `"inference"` and `"training"` (forward and backward, no optimizer): `flops`, `eager_bytes`,
    `fused_bytes`. A multiplication with its addition is two FLOPs."""
    figures = {}
    config = EfficientNetNVConfig.from_variant(variant, survival_prob=1.0)
    with torch.device("meta"):
        pixels = torch.randn(batch, 3, image_size, image_size, dtype=dtype)
        model = placed(EfficientNetNVForImageClassification(config), pixels)
    for kind in ("inference", "training"):
        model.train(kind == "training")
        with torch.set_grad_enabled(kind == "training"), ByteCounter() as moved:
            with FlopCounterMode(display=False) as flops:
                logits = model(pixels).logits
            if kind == "training":
                logits.sum().backward()
        # Backward is two products for each one forward. (torch's counter overlooks the groups of depthwise gradients.)
        figures[kind] = {
            "flops": flops.get_total_flops() / batch * (3 if kind == "training" else 1),
            "eager_bytes": moved.bytes / batch,
            "fused_bytes": moved.product_bytes / batch,
        }
    return figures


def peaks(device: torch.device, precision: str) -> dict[str, float]:
    """Measured `tb_per_s` (a copy counts twice) and `tflops` of this device in `precision`; best of several."""
    dtype = AUTOCAST.get(precision, torch.float32)
    on_cuda = device.type == "cuda"
    source = torch.ones(2**28 if on_cuda else 2**25, device=device)
    target = torch.empty_like(source)
    side = 8192 if on_cuda else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    copy = _best(lambda: target.copy_(source), device)
    # On a CPU as a 1x1 convolution, because oneDNN's product is twice as fast as the BLAS on some machines.
    image, kernel = a.view(side // 64, 8, 8, side).permute(0, 3, 1, 2), b.view(side, side, 1, 1)
    product = _best((lambda: a @ b) if on_cuda else (lambda: torch.conv2d(image, kernel)), device)
    return {"tb_per_s": 2 * source.nbytes / copy / 1e12, "tflops": 2 * side**3 / product / 1e12}


def _best(function, device: torch.device, repeats: int = 8) -> float:
    times, clock = [], time.process_time if device.type == "cpu" else time.perf_counter
    for _ in range(repeats):
        wait_for(device)
        started = clock()
        function()
        wait_for(device)
        times.append(clock() - started)
    return min(times[1:]) / (torch.get_num_threads() if device.type == "cpu" else 1)


def bound(figures: dict, machine: dict) -> dict[str, float]:
    """Images per second that the peaks allow: `compute_ips`, `eager_memory_ips`, `fused_memory_ips`."""
    return {
        "compute_ips": machine["tflops"] * 1e12 / figures["flops"],
        "eager_memory_ips": machine["tb_per_s"] * 1e12 / figures["eager_bytes"],
        "fused_memory_ips": machine["tb_per_s"] * 1e12 / figures["fused_bytes"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("roofline", __doc__.splitlines()[0], "precisions")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    machine, rows = {}, []
    for precision in arguments.precisions:
        set_precision(precision, device)
        machine[precision] = peaks(device, precision)
    for variant in arguments.variants:
        size = image_size_for(arguments, variant)
        for precision in arguments.precisions:
            for kind, figures in count(variant, size, AUTOCAST.get(precision, torch.float32)).items():
                row = {"variant": variant, "kind": kind, "precision": precision, "image_size": size}
                rows.append(row | {
                    "gflop": figures["flops"] / 1e9, "eager_mb": figures["eager_bytes"] / 1e6,
                    "fused_mb": figures["fused_bytes"] / 1e6, **bound(figures, machine[precision]),
                })  # fmt: skip
    figures = {"kind": "roofline", **environment(device), "settings": settings(arguments), "rows": rows}
    figures |= {"machine": machine, "datasheet": datasheet(figures["hardware"]["name"])}
    print(table(rows))
    print(f"measured peaks: {machine}")
    if arguments.output:
        write_figures(figures, arguments.output)
    return 0
