"""summary.md: the card, what failed, the goals, and where everything is."""

import json
from pathlib import Path

from effnet_hf.benchmark.goals import gpu_goals
from effnet_hf.benchmark.page import SECTIONS, TITLES
from effnet_hf.benchmark.report import markdown_table
from effnet_hf.files import atomic_write


STATUSES = ("pass", "fail", "skipped")


def results_of(folder: Path) -> list[dict]:
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def write(folder: Path, rows: list[dict]) -> None:
    """Writes `folder/summary.md`."""
    results = results_of(folder)
    facts = next((figures for figures in results if figures["kind"] == "verify"), None)
    lines = ["# GPU check", ""]
    if facts:
        hardware = facts["hardware"]
        versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
        commit = f", commit {facts['commit']}" if facts["commit"] else ""
        lines += [f"{hardware['name']}, {facts['date']}{commit}{f'; {versions}' if versions else ''}.", ""]
    lines += [first_look(folder, rows), "", "## Goals", ""]
    goals = gpu_goals(results)
    cells = [{**goal, "reached": "yes" if goal["reached"] else "**no**"} for goal in goals]
    lines += [markdown_table(cells) if cells else "Nothing that they are about was measured."]
    lines += ["", "## What works", "", "| what | | evidence | s |", "|---|---|---|---|"]
    for row in rows:
        shown = f"**{row['status']}**" if row["status"] == "fail" else row["status"]
        lines.append(f"| {row['name']} | {shown} | {row['evidence'].replace('|', '/')} | {row['seconds']} |")
    for row in rows:
        if row["status"] == "fail" and row["output"]:
            lines += ["", f"### {row['name']}", "", "```", *row["output"], "```"]
    for figures in results:
        if figures["kind"] in ("train", "inference", "loop") and figures["rows"]:
            lines += ["", f"## {TITLES[figures['kind']]}", ""]
            lines += table(figures)
    with atomic_write(folder / "summary.md") as file:
        file.write("\n".join(lines) + "\n")


def table(figures: dict) -> list[str]:
    if figures["kind"] == "loop":
        return [markdown_table(rows) + "\n" for rows in (figures["rows"], figures.get("overhead")) if rows]
    return SECTIONS[figures["kind"]](figures)


def first_look(folder: Path, rows: list[dict]) -> str:
    """What to look at first: counts, every failure in a line, the goals missed."""
    count = ", ".join(f"{sum(row['status'] == status for row in rows)} {status}" for status in STATUSES)
    lines = [f"{count}."]
    lines += [f"- FAIL {row['name']}: {row['evidence']}" for row in rows if row["status"] == "fail"]
    missed = [goal for goal in gpu_goals(results_of(folder)) if not goal["reached"]]
    lines += [f"- goal missed: {goal['what']}: {goal['measured']}, wanted {goal['goal']}" for goal in missed]
    return "\n".join(lines)
