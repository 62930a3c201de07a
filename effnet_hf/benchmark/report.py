"""Prints benchmark figures as a table, and writes them down."""

import json

from ..files import atomic_write


def write_report(figures: dict, output: str | None = None) -> None:
    """Prints each list of rows in `figures` as a Markdown table after what it was measured on.

    Args:
        output: also write `figures` to this JSON file.
    """
    for key, value in figures.items():
        if isinstance(value, list):
            print(f"\n{key}\n\n{markdown_table(value)}")
        else:
            print(f"{key}: {json.dumps(value) if isinstance(value, dict) else value}")
    if output:
        with atomic_write(output) as file:
            json.dump(figures, file, indent=1)
            file.write("\n")


def markdown_table(rows: list[dict]) -> str:
    """Rows with the same keys as a Markdown table; a pair of numbers is a range."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    lines += ["| " + " | ".join(_cell(row[name]) for name in names) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value) -> str:
    if isinstance(value, list):
        return " … ".join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.0f}" if value >= 100 else f"{value:.2f}"
    return str(value)


def print_rows(rows: list[dict], names: tuple[str, ...]) -> None:
    """The columns `names` of `rows`, aligned, with the best speed-up over each peer by CPU time or the clock."""
    for row in rows:
        cells = [_cell(row[name]) for name in names if row.get(name) is not None]
        ratios = " ".join(f"{peer} {ratio.get('cpu', ratio['wall']):.2f}x" for peer, ratio in row["speed_up"].items())
        print("  ".join(f"{cell:>9}" for cell in cells), " vs", ratios, flush=True)
