"""The page and chart of a result folder, from its JSON files alone: python benchmark.py page FOLDER

`FOLDER/*.json` -> `FOLDER.md` and `FOLDER/chart.png`. What a run left out, and what never ran, stands on the page, and
so does `FOLDER/notes.md`, if there is one.
"""

import json
from pathlib import Path

from effnet_hf import cli
from effnet_hf.errors import UserError
from effnet_hf.files import atomic_write

from . import published
from .contenders import OURS
from .report import ratio, table


PARTS = ("verify", "train", "inference", "memory", "roofline", "data", "loop", "ablation", "fused", "profile", "suite")
SIGNATURE = "this page is `python benchmark.py page FOLDER` of that folder."


def read_results(folder: Path) -> list[dict]:
    """Every run's figures in `folder`, in the order of `PARTS`.

    Raises:
        UserError: there is none, or a file is no result.
    """
    results = []
    for path in sorted(folder.glob("*.json")):
        try:
            figures = json.loads(path.read_text("utf-8"))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} is damaged: {error}.") from None
        if not isinstance(figures, dict) or "hardware" not in figures:
            raise UserError(f"{path} says of no hardware that it was measured on; move it out of the folder.")
        if isinstance(figures["hardware"], str):  # of the input pipelines, before they were written as the others are
            figures["hardware"] = {"device": "cpu", "name": figures["hardware"], "threads": 1}
        results.append({"kind": "data", "date": None, "commit": None, "command": path.name, "rows": [], **figures})
    if not results:
        raise UserError(f"{folder} holds no results; make some with benchmark.py suite.")
    return sorted(results, key=lambda figures: PARTS.index(figures["kind"]) if figures["kind"] in PARTS else len(PARTS))


def render(results: list[dict], folder_name: str, notes: str = "") -> str:
    """The Markdown page. It shows `chart.png` where a row stands beside a peer's."""
    first = results[0]
    facts = first["hardware"]
    on_cpu = facts["device"] == "cpu"
    place = "One thread" if on_cpu and facts["threads"] == 1 else f"{facts['threads']} threads" if on_cpu else "One GPU"
    date = max(figures["date"] or "" for figures in results)
    lines = [f"# Speed on {facts['name']}{f', {date}' if date else ''}", "", f"{place}."]
    if any(row.get("speed_up") for figures in results for row in figures["rows"]):
        lines += [
            "Images are noise that is in memory already. All contenders of a table took turns step by step, in an order"
            " drawn anew each round; the first rounds are not counted. `x timm` is how many times faster than timm's"
            " eager model: the median over rounds of the ratio within a round"
            + (", of **CPU time**; wall times are medians." if on_cpu and facts["threads"] == 1 else ", by the clock.")
            + " `same mode` is over the peer's form in that row's mode: its weights frozen where ours are, its layers"
            " fused by torch where ours are folded and that finds any, else eager.",
            "",
            f"![chart]({folder_name}/chart.png)",
        ]
    lines += ["", notes.strip()] if notes else []
    for figures in results:
        lines += ["", f"## {title(figures)}", "", *(f"    {line}" for line in figures["command"].splitlines()), ""]
        lines += SECTIONS.get(figures["kind"], _plain)(figures)
        lines += [f"- left out: {sentence}" for sentence in figures.get("left_out", [])]
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    commit = f"; commit {first['commit']}" if first["commit"] else ""
    lines += ["", "## Measured with", "", f"{facts['name']}; {versions}{commit}."]
    lines += ["", f"Raw figures: `{folder_name}/*.json`; {SIGNATURE}", "", NOT_RUN[facts["device"]]]
    return "\n".join(lines) + "\n"


def title(figures: dict) -> str:
    """Of a section; with what it ran where a page has several of a kind."""
    text = TITLES.get(figures["kind"], figures["kind"])
    if figures["kind"] not in ("train", "inference"):
        return text
    variants = ", ".join(dict.fromkeys(row["variant"] for row in figures["rows"]))
    batches = ", ".join(str(batch) for batch in dict.fromkeys(row["batch"] for row in figures["rows"]))
    return f"{text}: {variants}, batch {batches}"


def _speed_table(figures: dict, mode: str) -> list[str]:
    named = figures["settings"]["peers"]
    peers = [peer for peer in named if any(peer in row["speed_up"] for row in figures["rows"])]
    # Files from before a peer was measured in our modes have no such ratio.
    in_our_mode = [peer for peer in peers if any(peer in row.get("same_mode", {}) for row in figures["rows"])]
    on_cpu = figures["hardware"]["device"] == "cpu"
    cells = []
    for row in figures["rows"]:
        cell = {"network": row["variant"], "by": row["by"], mode: row[mode], "precision": row["precision"]}
        cell |= {"px": row["image_size"], "batch": row["batch"]}
        if on_cpu:
            cell["CPU ms"] = f"{row['cpu_ms']:.1f}"
        if mode == "runtime":
            cell |= {"p50 ms": f"{row['p50_ms']:.2f}", "p95": f"{row['p95_ms']:.2f}", "p99": f"{row['p99_ms']:.2f}"}
        else:
            cell["wall ms (quartiles)"] = f"{row['wall_ms']:.1f} ({row['wall_ms_q25']:.1f} to {row['wall_ms_q75']:.1f})"
        cell["img/s"] = f"{row['ips']:,.1f}" if row["ips"] < 100 else f"{row['ips']:,.0f}"
        for peer in peers:
            cell[f"x {peer}"] = ratio(row, peer)
            if peer in in_our_mode:
                cell[f"x {peer}, same mode"] = ratio(row, peer, "same_mode")
        if not on_cpu:
            cell["layout"] = row["layout"]
            anchor = (
                published.training_ips(row["variant"], row["precision"])
                if mode == "mode"
                else published.inference_ips(row["variant"], row["precision"], row["batch"])
            )
            cell["original, A100 img/s"] = f"{anchor:,}" if anchor else ""
        cell["n"] = row["steps"]
        cells.append(cell)
    return [table(cells), *_best_ways(figures, mode, peers)] if cells else []


def _best_ways(figures: dict, mode: str, peers: list[str]) -> list[str]:
    """What a user asks: our fastest way beside the fastest of each peer's, of every network, precision and batch."""
    cells: dict[tuple, dict] = {}
    on_cpu = figures["hardware"]["device"] == "cpu" and figures["hardware"]["threads"] == 1
    for row in figures["rows"]:
        if row["by"] != OURS or not row.get("best"):  # files from before have none
            continue
        key = tuple(row[name] for name in ("variant", "precision", "image_size", "batch"))
        best = cells.get(key)
        if best is None or row["cpu_ms" if on_cpu else "wall_ms"] < best["ms"]:
            cells[key] = {"row": row, "ms": row["cpu_ms" if on_cpu else "wall_ms"]}
    found = []
    for (variant, precision, size, batch), best in cells.items():
        cell = {
            "network": variant,
            "precision": precision,
            "px": size,
            "batch": batch,
            "our fastest": best["row"][mode],
        }
        for peer in peers:
            theirs = best["row"]["best"].get(peer)
            value = "" if theirs is None else f"{theirs.get('cpu', theirs['wall']):.2f} ({theirs['mode']})"
            cell[f"x {peer}'s fastest"] = value
        found.append(cell)
    return ["", "The fastest of our ways beside the fastest of theirs:", "", table(found)] if found else []


def _verify(figures: dict) -> list[str]:
    rows = figures["rows"]
    cells = []
    for row in rows:
        status = f"**{row['status']}**" if row["status"] == "fail" else row["status"]
        cells.append({"what": row["name"], "": status, "evidence": row["evidence"], "s": f"{row['seconds']:.0f}"})
    return [f"{count_statuses(rows)}.", "", *([table(cells)] if cells else [])]


def count_statuses(rows: list[dict]) -> str:
    """`3 pass, 0 fail, 1 skipped`."""
    statuses = [row["status"] for row in rows]
    return ", ".join(f"{statuses.count(status)} {status}" for status in ("pass", "fail", "skipped"))


def _memory(figures: dict) -> list[str]:
    cells = []
    for row in figures["rows"]:
        cell = {"network": row["variant"], "by": row["by"], "precision": row["precision"], "px": row["image_size"]}
        cell |= {"batch": row["batch"], "checkpointing": "yes" if row["gradient_checkpointing"] else "no"}
        cells.append(
            cell | {"training, MiB": f"{row['training_mb']:,.1f}", "inference, MiB": f"{row['inference_mb']:,.1f}"}
        )
    return [table(cells)]


def _roofline(figures: dict) -> list[str]:
    cells = []
    for row in figures["rows"]:
        cell = {"network": row["variant"], "": row["kind"], "precision": row["precision"], "px": row["image_size"]}
        cell |= {
            "GFLOP": f"{row['gflop']:.2f}",
            "MB unfused": f"{row['eager_mb']:.0f}",
            "MB fused": f"{row['fused_mb']:.0f}",
        }
        cell |= {
            "img/s by arithmetic": f"{row['compute_ips']:,.0f}",
            "by memory, unfused": f"{row['eager_memory_ips']:,.0f}",
        }
        cells.append(cell | {"by memory, fused": f"{row['fused_memory_ips']:,.0f}", "reached": row.get("reached", "")})
    peaks = "; ".join(
        f"{precision}: copy {machine['tb_per_s']:.3g} TB/s, product {machine['tflops']:.3g} TFLOP/s"
        for precision, machine in figures["machine"].items()
    )
    sheet = figures["datasheet"]
    lines = [
        "Per image, counted: FLOPs, and bytes of every operation (unfused) or of convolutions and matrix products"
        " alone (fused). `reached` is our best speed of the tables above, and its share of the lower of the two"
        " ceilings that no code gets past, arithmetic and fused memory.",
        "",
        table(cells),
        "",
        f"Peaks measured in this run: {peaks}."
        + (f" Datasheet: {sheet[0]} TB/s, {sheet[1]} TFLOP/s dense." if sheet else ""),
    ]
    return lines


def _plain(figures: dict) -> list[str]:
    lines: list[str] = []
    for name, rows in figures.items():
        if isinstance(rows, list) and rows and isinstance(rows[0], dict):
            lines += [*([] if name == "rows" else [f"### {name.capitalize()}", ""]), table(rows), ""]
    return lines + (["```", figures["text"].rstrip(), "```"] if figures.get("text") else [])


def add_reached(results: list[dict]) -> None:
    """Puts our best measured speed, and its share of the ceiling, into the roofline's rows."""
    best: dict[tuple, tuple[float, int]] = {}
    for figures in results:
        kind = {"train": "training", "inference": "inference"}.get(figures["kind"])
        for row in figures["rows"] if kind else ():
            if row["by"] == OURS:
                key = (kind, row["variant"], row["precision"], row["image_size"])
                by_cpu = figures["hardware"]["device"] == "cpu" and figures["hardware"]["threads"] == 1
                ips = 1e3 * row["batch"] / row["cpu_ms"] if by_cpu else row["ips"]
                best[key] = max(best.get(key, (0, 0)), (ips, row["batch"]))
    for figures in results:
        for row in figures["rows"] if figures["kind"] == "roofline" else ():
            ips, batch = best.get((row["kind"], row["variant"], row["precision"], row["image_size"]), (0, 0))
            if ips:
                ceiling = min(row["compute_ips"], row["fused_memory_ips"])
                row["reached"] = f"{ips:,.1f} at batch {batch} ({100 * ips / ceiling:.0f} %)"


def draw(results: list[dict], path: Path) -> None:
    """A panel for each kind and network: how many times faster than timm's eager model every row is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels: dict[str, list[tuple[str, float, bool]]] = {}
    for figures in results:
        for row in figures["rows"] if figures["kind"] in ("train", "inference") else ():
            ratio = row["speed_up"].get("timm")
            if ratio is None:
                continue
            label = f"{row['by']} {row.get('mode') or row['runtime']}, batch {row['batch']}, {row['precision']}"
            title = f"{'training step' if figures['kind'] == 'train' else 'inference'}, {row['variant']}"
            panels.setdefault(title, []).append((label, ratio.get("cpu", ratio["wall"]), row["by"] == OURS))
    if not panels:
        return
    height = max(len(bars) for bars in panels.values())
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.4 * len(panels), 1 + 0.26 * height), squeeze=False, layout="constrained"
    )
    for axis, (title, bars) in zip(axes[0], panels.items()):
        names, values, own = zip(*bars[::-1])
        drawn = axis.barh(range(len(bars)), values, color=["#76b900" if ours else "#b0b0b0" for ours in own])
        axis.set_yticks(range(len(bars)), names, fontsize=7)
        axis.bar_label(drawn, fmt="%.2f", fontsize=7, padding=2)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_title(f"{title}: x timm eager", fontsize=9)
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)


def write_page(folder: Path) -> Path:
    """Renders `folder` and returns the page's path.

    Raises:
        UserError: as `read_results`, or the page there was written by hand.
    """
    results = read_results(folder)
    page, notes = folder.with_name(folder.name + ".md"), folder / "notes.md"
    if page.exists() and SIGNATURE not in page.read_text("utf-8"):
        raise UserError(f"{page} was written by hand; rename it, or give a copy of {folder}.")
    add_reached(results)
    draw(results, folder / "chart.png")
    with atomic_write(page) as file:
        file.write(render(results, folder.name, notes.read_text("utf-8") if notes.exists() else ""))
    return page


def main(argv: list[str] | None = None) -> int:
    parser = cli.ArgumentParser(prog="benchmark.py page", description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=cli.path, help="with the JSON files of a suite, of `benchmark.py data` or of gpu_check.py"
    )
    print(write_page(Path(parser.parse_args(argv).folder)))
    return 0


TITLES = {
    "verify": "What works",
    "train": "Training step",
    "inference": "Inference",
    "memory": "Peak memory",
    "roofline": "What the machine allows",
    "data": "Input pipelines",
    "loop": "Our training loop, real data and synthetic",
    "ablation": "What each tuning brings",
    "fused": "Fused kernels, an experiment",
    "profile": "Where the time goes",  # of earlier pages; a run has `train.py --profile`
    "suite": "The suite",
}
SECTIONS = {
    "verify": _verify,
    "train": lambda figures: _speed_table(figures, "mode"),
    "inference": lambda figures: _speed_table(figures, "runtime"),
    "memory": _memory,
    "roofline": _roofline,
    "loop": _plain,
    "fused": lambda figures: [figures["verdict"] + ".", "", *_plain(figures)],
}
NOT_RUN = {
    "cpu": "Not run here: a GPU (`make gpu` checks and measures one), fp16, TF32.",
    "cuda": "Not run here: several GPUs.",
}
