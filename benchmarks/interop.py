"""What `make interop` found, as the table of docs/interop.md: python benchmarks/interop.py RESULTS.json

One row a client: whether it works with ours and with the stock model, what the user does besides, what upstream lets
nobody do, and the versions that it was tried with. Exits with 1 where ours is worse than the stock model.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from effnet_hf.tables import markdown_table


WORDS = {"works": "works", "fails": "**no**", "skipped": "not run", "": ""}
WORST_FIRST = ("fails", "works", "skipped")
# In the order of a checkpoint's life: opened, trained, looked into, made smaller, exported, served.
GROUPS = (
    "Transformers", "Training", "Detection", "Data", "Trackers", "Checkpoints of others", "Graphs", "Looking inside",
    "Quantization and pruning", "Optimum", "OpenVINO", "Browsers", "Serving",
)  # fmt: skip
HEADER = ("client", "ours", "stock model", "extra step", "limit of the client's", "tried with")


def rows(results: list[dict]) -> dict[str, list[dict]]:
    """By group, one entry a client: the worst of its tests in each column."""
    clients: dict[tuple, list[dict]] = defaultdict(list)
    for result in results:
        clients[result["group"], result["client"]].append(result)
    groups: dict[str, list[dict]] = defaultdict(list)
    for (group, client), found in sorted(clients.items(), key=_place):
        versions: dict[str, set] = defaultdict(set)
        for result in found:
            for package, version in result["versions"].items():
                versions[package] |= {version} if version and result["result"] != "skipped" else set()
        said = {
            key: "; ".join(sorted({result[key] for result in found if result.get(key)})) for key in ("step", "limit")
        }
        sides = {}
        for side in ("ours", "stock"):
            of_side = {result["result"] for result in found if result["side"] == side}
            sides[side] = next((word for word in WORST_FIRST if word in of_side), "")
        tried = ", ".join(f"{name} {' and '.join(sorted(kinds))}" for name, kinds in versions.items() if kinds)
        groups[group].append({"client": client, **sides, **said, "tried": tried})
    return groups


def _place(entry: tuple) -> tuple:
    (group, client), _ = entry
    return GROUPS.index(group), client.lower()


def worse(groups: dict[str, list[dict]]) -> list[str]:
    """The clients that do not work with ours, though they do with the stock model, or it has no such job."""
    return [row["client"] for found in groups.values() for row in found if row["ours"] == "fails" != row["stock"]]


def summary(groups: dict[str, list[dict]]) -> str:
    run = [row for found in groups.values() for row in found if row["ours"] in ("works", "fails")]
    works = sum(row["ours"] == "works" for row in run)
    beside = [row["stock"] for row in run if row["stock"] in ("works", "fails")]
    stock = f"of the {len(beside)} in which a stock model was tried beside it, {beside.count('works')} work with that"
    return f"{len(run)} clients: {works} work with ours; {stock}."


def render(results: list[dict]) -> str:
    """The summary and a table for each group, in Markdown."""
    groups = rows(results)
    parts = [summary(groups)]
    for group, found in groups.items():
        cells = [
            [row["client"], WORDS[row["ours"]], WORDS[row["stock"]], row["step"], row["limit"], row["tried"]]
            for row in found
        ]
        parts += [f"### {group}", markdown_table(HEADER, cells)]
    return "\n\n".join(parts)


if __name__ == "__main__":
    groups = rows(json.loads(Path(sys.argv[1]).read_text("utf-8")))
    print(summary(groups))
    if clients := worse(groups):
        sys.exit(f"not with ours: {', '.join(clients)}")
