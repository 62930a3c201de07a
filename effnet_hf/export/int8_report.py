"""INT8 beside float, in one run: accuracy, agreement with the fake-quantized checkpoint, size, latency."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .runners import Runner
from .verify import compare, top1


LATENCY_BATCHES = (1, 8)
HEADER = ("", "top-1, %", "agreement, %", "MB", "ms at batch 1", "ms at batch 8", "times float")


@dataclass(frozen=True)
class Row:
    """One file in one runtime.

    Attributes:
        agreement: with the fake-quantized checkpoint in PyTorch, percent.
        latency: milliseconds per call at batch 1 and 8, one thread, median.
        times_float: speed relative to the float file in the same runtime, at batch 1 and 8.
    """

    name: str
    top1: float | None
    agreement: float
    megabytes: float | None
    latency: tuple[float, float]
    times_float: tuple[float, float] | None

    def cells(self) -> list[str]:
        return [
            self.name,
            "–" if self.top1 is None else f"{self.top1:.2f}",
            f"{self.agreement:.2f}",
            "–" if self.megabytes is None else f"{self.megabytes:.1f}",
            *(f"{value:.1f}" for value in self.latency),
            "–" if self.times_float is None else " / ".join(f"{value:.2f}" for value in self.times_float),
        ]


def latencies(runners: Mapping[str, Runner], picture: np.ndarray, repeats=(15, 7)) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a call at batch 1 and 8, all runners taking turns, after one call that is not counted."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    for position, (batch, count) in enumerate(zip(LATENCY_BATCHES, repeats)):
        array = np.repeat(picture, batch, axis=0)
        for repeat in range(count + 1):
            for name, run in runners.items():
                started = time.perf_counter()
                run(array)
                if repeat:
                    taken[name][position].append(1e3 * (time.perf_counter() - started))
    return {name: (float(np.median(one)), float(np.median(eight))) for name, (one, eight) in taken.items()}


def make_rows(
    outputs: Mapping[str, np.ndarray],
    reference: str,
    labels: np.ndarray | None,
    sizes: Mapping[str, int],
    times: Mapping[str, tuple[float, float]],
    floats: Mapping[str, str],
) -> list[Row]:
    """One row per entry of `outputs`; `floats` names the float row that a row is compared with."""
    rows = []
    for name, found in outputs.items():
        float_row = floats.get(name)
        own, other = times[name], times[float_row or name]
        ratio = None if float_row is None else (other[0] / own[0], other[1] / own[1])
        rows.append(
            Row(
                name=name,
                top1=None if labels is None else top1(found, labels),
                agreement=compare(outputs[reference], found).agreement,
                megabytes=sizes[name] / 1e6 if name in sizes else None,
                latency=times[name],
                times_float=ratio,
            )
        )
    return rows


def as_text(rows: Sequence[Row]) -> str:
    """The table, in columns for a terminal."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    padded = [[cell.rjust(width) for cell, width in zip(line, widths)] for line in lines]
    for line, (name, *_) in zip(padded, lines):
        line[0] = name.ljust(widths[0])
    return "\n".join("  ".join(line) for line in padded)


def warnings(rows: Sequence[Row]) -> list[str]:
    """A sentence for every INT8 row that is slower than its float row."""
    return [
        f"{row.name} is slower than float on this machine, {min(row.times_float):.2f} times its speed."
        for row in rows
        if row.times_float is not None and min(row.times_float) < 1
    ]
