"""Training steps beside the peers': python benchmark.py train --variants b0,b4 --modes eager,compile

One optimizer step (forward, loss, backward, RMSprop) on synthetic pictures that are on the device already. Within a
cell (variant, precision, memory layout, batch) all contenders take turns step by step.
"""

import itertools
import time
from typing import Any

import torch

from ..cli import at_least
from ..recipes import load_recipe
from ..training import keep_freed_memory
from .contenders import MODES, OURS, build, has, pictures, set_precision, training_step
from .environment import environment, resolve_device, write_figures
from .flags import common_parser, image_size_for, settings, words
from .report import print_rows
from .timing import release, speed_up, take_turns


LAYOUTS = ("channels_last", "nchw")


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("train", __doc__.splitlines()[0], "peers", "precisions", "rounds", "budget")
    parser.add_argument("--modes", type=words(*MODES), default=["eager"], help="of ours, comma-separated")
    parser.add_argument("--peer_modes", type=words(*MODES), default=["eager"], help="of the peers")
    parser.add_argument("--layouts", type=words(*LAYOUTS), default=["channels_last"], help="memory format")
    parser.add_argument(
        "--batch_size", default="original", help="a number, `original` (NVIDIA's for this precision), or `largest`"
    )
    parser.add_argument("--burst", type=at_least(1), help="steps per turn; 1 on a CPU, 5 on a GPU")
    arguments = parser.parse_args(argv)
    if arguments.batch_size not in ("original", "largest") and not arguments.batch_size.isdigit():
        parser.error(f"--batch_size {arguments.batch_size}: a number, original, or largest")
    device = resolve_device(arguments.device, arguments.num_threads)
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
    pixels = pictures(batch, size, device, layout == "channels_last")
    wanted = [(OURS, mode) for mode in arguments.modes]
    wanted += [(peer, mode) for peer in arguments.peers if has(peer, variant) for mode in arguments.peer_modes]
    steps, failures = {}, []
    for name, mode in wanted:
        try:
            step = training_step(name, build(name, variant, size), pixels, precision, mode)
            step()  # compiles, allocates
            steps[name, mode] = step
        except (ImportError, RuntimeError) as error:  # running out of memory is a RuntimeError
            failures.append(f"{variant} {precision} {layout}, {name} {mode}: {str(error).strip().splitlines()[0]}")
            release(device)
    burst = arguments.burst or (1 if device.type == "cpu" else 5)
    samples = take_turns(steps, device, arguments.rounds, warmup=2, burst=burst)
    rows = []
    for (name, mode), own in samples.items():
        row: dict[str, Any] = {"variant": variant, "by": name, "mode": mode, "precision": precision, "layout": layout}
        row |= {"batch": batch, "image_size": size, **own.summary(batch)}
        row["speed_up"] = {
            peer: speed_up(own, samples[peer, "eager"], device.type == "cpu")
            for peer in arguments.peers
            if (peer, "eager") in samples
        }
        rows.append(row)
    steps.clear()
    release(device)
    return rows, failures


def choose_batch(wanted: str, variant: str, precision: str, layout: str, size: int, device: torch.device) -> int:
    """Pictures per step: a number, the original's for an A100 (our preset on a CPU), or the largest power of two."""
    if wanted == "largest" and device.type == "cuda":
        return largest_batch(variant, precision, layout, size, device)
    if wanted.isdigit():
        return int(wanted)
    preset = "cpu" if device.type == "cpu" else "a100"
    return load_recipe("b0", variant=variant, hardware=preset, precision=precision).per_device_batch_size


def largest_batch(variant: str, precision: str, layout: str, size: int, device: torch.device) -> int:
    """The largest power of two whose eager training step fits the device."""
    batch = 64
    while True:
        try:
            pixels = pictures(2 * batch, size, device, layout == "channels_last")
            step = training_step(OURS, build(OURS, variant, size), pixels, precision)
            step()
            step()
        except torch.OutOfMemoryError:
            return batch
        finally:
            step = pixels = None
            release(device)
        batch *= 2
