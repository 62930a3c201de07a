"""Training steps beside the peers': python benchmark.py train --variants b0,b4 --modes eager,compile

One optimizer step (forward, loss, backward, RMSprop) on synthetic images that are on the device already. Within a
cell (variant, precision, memory layout, batch) all contenders take turns step by step.
"""

import itertools
import time
from collections.abc import Callable
from typing import Any

import torch

from effnet_hf.cli import at_least
from effnet_hf.configuration import EfficientNetNVConfig
from effnet_hf.errors import UserError, first_line
from effnet_hf.recipes import load_recipe
from effnet_hf.training import keep_freed_memory, largest_map

from .contenders import COMPILED, MODES, OURS, build, has, images, set_precision, training_step
from .environment import environment, resolve_device
from .flags import common_parser, image_size_for, settings, words
from .report import print_rows, write_figures
from .timing import ratios, release, take_turns, wait_for


LAYOUTS = ("channels_last", "nchw")
MOST_ELEMENTS = 2**31 - 1  # kernels with 32-bit indices refuse more, or worse, do not
TOO_MUCH = (
    "out of memory",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Unable to find a valid cuDNN algorithm",
    "unable to find an engine to execute this computation",
    "FIND was unable to find an engine",
    "32-bit index",
    "canUse32BitIndexMath",
    "integer out of range",
)


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("train", __doc__.splitlines()[0], "peers", "precisions", "rounds", "budget")
    parser.add_argument("--modes", type=words(*MODES), default=["eager"], help="of ours, comma-separated")
    parser.add_argument("--peer_modes", type=words(*MODES), default=["eager"], help="of the peers")
    parser.add_argument("--layouts", type=words(*LAYOUTS), default=["channels_last"], help="memory format")
    parser.add_argument(
        "--batch_size", default="original", help="a number, `original` (NVIDIA's for this precision), or `largest`"
    )
    parser.add_argument("--compile_only", action="store_true", help="fill the compile cache, and measure nothing")
    parser.add_argument("--burst", type=at_least(1), help="steps per turn; 1 on a CPU, 5 on a GPU")
    arguments = parser.parse_args(argv)
    if arguments.batch_size not in ("original", "largest") and not arguments.batch_size.strip("0").isdigit():
        parser.error(f"--batch_size {arguments.batch_size}: a number above 0, original, or largest")
    device = resolve_device(arguments.device, arguments.num_threads)
    if arguments.batch_size == "largest" and device.type == "cpu":
        raise UserError("--batch_size largest looks for the end of a GPU's memory; give a number on a CPU.")
    keep_freed_memory()
    figures = {"kind": "train", **environment(device), "settings": settings(arguments), "rows": [], "left_out": []}
    started = time.monotonic()
    for variant, precision, layout in itertools.product(arguments.variants, arguments.precisions, arguments.layouts):
        if arguments.budget and time.monotonic() - started > arguments.budget:
            figures["left_out"].append(f"{variant} {precision} {layout}: no time left")
            continue
        set_precision(precision, device)
        size = image_size_for(arguments, variant)
        batch = choose_batch(arguments.batch_size, variant, precision, layout, size, device)
        rows, failures = measure(arguments, device, variant, precision, layout, size, batch)
        figures["rows"] += rows
        figures["left_out"] += failures
        print_rows(rows, ("variant", "by", "mode", "precision", "layout", "batch", "wall_ms", "cpu_ms", "ips"))
        if arguments.output:  # after every cell: a run that is cut off leaves what it has
            write_figures(figures, arguments.output)
    for line in figures["left_out"]:
        print(f"left out: {line}")
    return 0


def measure(arguments, device, variant, precision, layout, size, batch) -> tuple[list[dict], list[str]]:
    """Rows of one cell, and a sentence for each contender that failed."""
    wanted = [(OURS, mode) for mode in arguments.modes]
    wanted += [(peer, mode) for peer in arguments.peers if has(peer, variant) for mode in arguments.peer_modes]
    steps: dict[tuple[str, str], Any] = {}
    failures: list[str] = []

    def fail(key: tuple[str, str], error: Exception) -> None:
        failures.append(f"{variant} {precision} {layout}, {key[0]} {key[1]}: {first_line(error)}")

    pixels = images(batch, size, device, layout == "channels_last")
    for name, mode in wanted:
        if arguments.compile_only and mode not in COMPILED:
            continue
        step: Callable | None = None
        try:
            step = training_step(name, build(name, variant, size), pixels, precision, mode)
            step()  # compiles, allocates
            wait_for(device)
            if not arguments.compile_only:
                steps[name, mode] = step
        except (ImportError, RuntimeError) as error:  # running out of memory is a RuntimeError
            fail((name, mode), error)
        finally:
            step = None
            if arguments.compile_only or (name, mode) not in steps:
                release(device, compiled=arguments.compile_only)
    burst = arguments.burst or (1 if device.type == "cpu" else 5)
    warmup = 2 if device.type == "cpu" else 3
    samples = take_turns(steps, device, arguments.rounds, warmup=warmup, burst=burst, failed=fail)
    rows = []
    for (name, mode), own in samples.items():
        row: dict[str, Any] = {"variant": variant, "by": name, "mode": mode, "precision": precision, "layout": layout}
        row |= {"batch": batch, "image_size": size, **own.summary(batch)}
        rows.append(row | ratios(own, samples, arguments.peers, (mode,), "eager", device))
    steps.clear()
    release(device)
    return rows, failures


def choose_batch(wanted: str, variant: str, precision: str, layout: str, size: int, device: torch.device) -> int:
    """Images per step: a number, the original's for an A100 (our preset on a CPU), or the largest power of two."""
    if wanted == "largest":
        return largest_batch(variant, precision, layout, size, device)
    if wanted.isdigit():
        return int(wanted)
    preset = "cpu" if device.type == "cpu" else "a100"
    recipe = load_recipe("b0", variant=variant, hardware=preset, precision=precision)
    assert recipe.per_device_batch_size is not None  # every preset names one
    return recipe.per_device_batch_size


def largest_batch(variant: str, precision: str, layout: str, size: int, device: torch.device) -> int:
    """The largest power of two whose eager training step fits the device, and whose tensors fit 32-bit indices.

    Raises:
        UserError: not even one image fits.
    """
    most, batch = MOST_ELEMENTS // largest_map(EfficientNetNVConfig.from_variant(variant), size), 1
    while 2 * batch <= most:
        batch *= 2
    while batch:
        step: Callable | None = None
        pixels: torch.Tensor | None = None
        try:
            pixels = images(batch, size, device, layout == "channels_last")
            step = training_step(OURS, build(OURS, variant, size), pixels, precision)
            step()
            step()
            wait_for(device)
            return batch
        except RuntimeError as error:
            if not _is_too_much(error):
                raise
            batch //= 2
        finally:
            step = pixels = None
            release(device)
    raise UserError(f"--batch_size largest: not even one image of {size} pixels fits {variant} on this device.")


def _is_too_much(error: RuntimeError) -> bool:
    """torch's own exception, and what cuDNN, cuBLAS and the kernels say of too much memory or too many elements."""
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(words in text for words in TOO_MUCH)
