"""summary.md: the card, what failed, and where everything is."""

import json
from pathlib import Path

from lib.page import SECTIONS, count_statuses, title

from effnet_hf.files import atomic_write


def write(folder: Path, rows: list[dict]) -> None:
    """Writes `folder/summary.md`."""
    results = [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]
    lines = ["# GPU check", ""]
    for figures in results:
        if figures["kind"] == "verify":
            versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items())
            commit = f", commit {figures['commit']}" if figures["commit"] else ""
            card = figures["hardware"]["name"]
            lines += [f"{card}, {figures['date']}{commit}{f'; {versions}' if versions else ''}.", ""]
    lines += [first_look(rows)]
    for row in rows:
        if row["status"] == "fail" and row["output"]:
            lines += ["", f"### {row['name']}", "", "```", *row["output"], "```"]
    for figures in results:
        if figures["kind"] in ("verify", "train", "inference", "loop") and figures["rows"]:
            lines += ["", f"## {title(figures)}", "", *SECTIONS[figures["kind"]](figures)]
    with atomic_write(folder / "summary.md") as file:
        file.write("\n".join(lines) + "\n")


def first_look(rows: list[dict]) -> str:
    """What to look at first: counts, and every failure in a line."""
    failed = [f"- FAIL {row['name']}: {row['evidence']}" for row in rows if row["status"] == "fail"]
    return "\n".join([f"{count_statuses(rows)}.", *failed])
