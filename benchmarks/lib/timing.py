"""Several candidates on one machine: they take turns, so that whatever else the machine does hits them alike."""

import gc
import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from effnet_hf.training import percentiles


Name = TypeVar("Name", bound=Hashable)


@dataclass
class Samples:
    """Seconds of one step, by the clock and of this process's CPU time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def summary(self, images: int) -> dict[str, float | int]:
        """Milliseconds per step (median, quartiles, percentiles) and images per second of the median step."""
        wall = 1e3 * np.array(self.wall)
        low, high = np.percentile(wall, [25, 75])
        latencies = percentiles(wall)
        return {
            "wall_ms": latencies["p50"],
            "wall_ms_q25": float(low),
            "wall_ms_q75": float(high),
            "p50_ms": latencies["p50"],
            "p95_ms": latencies["p95"],
            "p99_ms": latencies["p99"],
            "cpu_ms": 1e3 * statistics.median(self.cpu),
            "cpu_ms_best": 1e3 * min(self.cpu),
            "ips": 1e3 * images / latencies["p50"],
            "steps": len(wall),
        }


def take_turns(
    steps: Mapping[Name, Callable[[], object]],
    device: torch.device,
    rounds: int,
    warmup: int = 2,
    burst: int = 1,
    deadline: float | None = None,
    failed: Callable[[Name, RuntimeError], None] | None = None,
) -> dict[Name, Samples]:
    """Runs every step `burst` times in each round, in an order drawn anew, and times the rounds after `warmup`.

    A device is waited for before and after each burst, never within it. Denormal numbers count as zero meanwhile: fresh
    weights of stock transformers make them, trained ones do not, and some processors take ten times as long for them.

    Args:
        deadline: `time.monotonic()` after which no further round starts, once three have been counted.
        failed: told of a step that raises a `RuntimeError` (a full memory), which is then out; without it, all end.
    """
    samples = {name: Samples() for name in steps}
    order = list(steps)
    torch.set_flush_denormal(True)
    try:
        for turn in range(warmup + rounds):
            if deadline is not None and time.monotonic() > deadline and turn >= warmup + 3:
                break
            random.Random(turn).shuffle(order)
            for name in list(order):
                wait_for(device)
                clock, process = time.perf_counter(), time.process_time()
                try:
                    for _ in range(burst):
                        steps[name]()
                    wait_for(device)
                except RuntimeError as error:
                    if failed is None:
                        raise
                    failed(name, error)
                    order.remove(name)
                    del samples[name]
                    continue
                if turn >= warmup:
                    samples[name].wall.append((time.perf_counter() - clock) / burst)
                    samples[name].cpu.append((time.process_time() - process) / burst)
    finally:
        torch.set_flush_denormal(False)
    return samples


def speed_up(own: Samples, baseline: Samples, on_cpu: bool) -> dict[str, float]:
    """How many times faster `own` is: medians of the ratios within a round, by CPU time (on a CPU) and by the clock."""
    figures = {"wall": statistics.median(b / a for a, b in zip(own.wall, baseline.wall))}
    if on_cpu:
        figures["cpu"] = statistics.median(b / a for a, b in zip(own.cpu, baseline.cpu))
        figures["cpu_best"] = min(baseline.cpu) / min(own.cpu)
    return figures


def ratios(
    own: Samples,
    samples: Mapping[tuple[str, str], Samples],
    peers: Iterable[str],
    modes: Sequence[str],
    plain: str,
    device: torch.device,
) -> dict[str, dict]:
    """How many times faster `own` is than each peer that ran: `speed_up` over its `plain` (eager) form, `same_mode`
    over its form in the first of `modes` that it ran in, and `best` over the fastest of its forms, which `mode` names.
    `samples` are by (who, mode)."""
    on_cpu = device.type == "cpu" and torch.get_num_threads() == 1  # threads that wait take processor time, too
    found: dict[str, dict] = {"speed_up": {}, "same_mode": {}, "best": {}}
    for peer in peers:
        ways = {way: theirs for (name, way), theirs in samples.items() if name == peer}
        same = next((mode for mode in modes if mode in ways), None)
        for kind, way in (("speed_up", plain), ("same_mode", same)):
            if way in ways:
                found[kind][peer] = speed_up(own, ways[way], on_cpu)
        if ways:
            best = min(ways, key=lambda way: statistics.median(ways[way].cpu if on_cpu else ways[way].wall))
            found["best"][peer] = speed_up(own, ways[best], on_cpu) | {"mode": best}
    return found


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device, compiled: bool = True) -> None:
    """Frees what a finished measurement left, `compiled` code included."""
    if compiled:
        torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
