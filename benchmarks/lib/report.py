"""How figures are shown and written."""

import json
import math
from pathlib import Path

from effnet_hf.files import atomic_write
from effnet_hf.tables import markdown_table, text_table


def write_figures(figures: dict, path: str | Path) -> None:
    """One run's JSON, whole or not at all."""
    with atomic_write(path) as file:
        json.dump(figures, file, indent=1)
        file.write("\n")


def table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table; a list of numbers is a range."""
    return markdown_table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])


def cell(value) -> str:
    if isinstance(value, list):
        return " … ".join(map(cell, value))
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def print_rows(rows: list[dict], names: tuple[str, ...]) -> None:
    """The columns `names` of `rows`, aligned, with the best speed-up over each peer by CPU time or the clock."""
    if not rows:
        return
    shown = [name for name in names if rows[0].get(name) is not None]
    peers = list(dict.fromkeys(peer for row in rows for peer in row["speed_up"]))
    lines = [[*(cell(row[name]) for name in shown), *(ratio(row, peer) for peer in peers)] for row in rows]
    print(text_table([*shown, *(f"x {peer}" for peer in peers)], lines), flush=True)


def ratio(row: dict, peer: str, over: str = "speed_up") -> str:
    """How many times faster than `peer` a row is, by CPU time where that was taken, or nothing."""
    found = row.get(over, {}).get(peer)
    return "" if found is None else f"{found.get('cpu', found['wall']):.2f}"


def wilson(percent: float, n: int) -> tuple[float, float]:
    """95 % interval, in percent, of a proportion of `n` given in percent; it says nothing about other seeds."""
    p, z = percent / 100, 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = (100 * (centre + sign * spread) / (1 + z * z / n) for sign in (-1, 1))
    return low, high


def with_interval(percent: float, n: int) -> str:
    """`47.2 (44.1 to 50.3)`."""
    low, high = wilson(percent, n)
    return f"{percent:.1f} ({low:.1f} to {high:.1f})"
