"""Curves of one or several runs from their metrics.jsonl: loss, accuracy, learning rate, throughput.

effnet-hf plots runs/a runs/b --output_dir plots
"""

import json
from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import matplotlib.pyplot as plt

from ..cli import moved
from ..errors import UserError, printable
from ..files import atomic_write
from ..run_folder import RunFolder


PANELS = (  # (title, y label, [(row type, metric, legend)])
    ("Loss", "cross entropy", [("epoch", "train.loss", "train"), ("val", "val.loss", "val")]),
    ("Top-1", "%", [("val", "val.top1", "val"), ("val_ema", "val_ema.top1", "moving average")]),
    ("Top-5", "%", [("val", "val.top5", "val"), ("val_ema", "val_ema.top5", "moving average")]),
    ("mAP", "%", [("val", "val.map", "val"), ("val_ema", "val_ema.map", "moving average")]),
    ("F1", "%", [("val", "val.f1", "val"), ("val_ema", "val_ema.f1", "moving average")]),
    ("Learning rate", "", [("train", "train.lr", "")]),
    ("Training throughput", "images/s", [("train", "train.total_ips", "")]),
)
_ONE_LABEL, _SEVERAL = ("Top-1", "Top-5"), ("mAP", "F1")
STYLES = ("-", "--", ":")
SOFTWARE = "effnet_hf"  # by which a drawing of ours is known
_MOST = 10**15  # of a figure that is drawn: an axis needs room to both sides of it


def read_rows(run_dir: Path) -> list[dict]:
    """All rows of a run's metrics.jsonl.

    Raises:
        UserError: there is no such file, or a line of it is not JSON.
    """
    path = RunFolder(run_dir).metrics
    try:
        if not path.is_file():  # nor a pipe, which would be waited for
            raise FileNotFoundError
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    except OSError:
        raise UserError(f"{run_dir} holds no {path.name}; name the --output_dir of a run.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is damaged: it is no text.") from None
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("type"), str) or not _has_a_place(row):
            raise UserError(f"{path} is damaged: line {number} is no row of metrics.")
        rows.append(row)
    return rows


def _has_a_place(row: dict) -> bool:
    return all(
        isinstance(row.get(name, 1), int) and low <= row.get(name, 1) <= _MOST
        for name, low in (("epoch", 0), ("update", 1))
    )


# A dollar in the name of a folder begins no formula.
@plt.rc_context({"text.parse_math": False})  # type: ignore[operator]
def draw(runs: dict[str, Path], folder: Path) -> list[Path]:
    """Draws `curves.png` over the given runs (label -> output_dir), one colour a run; returns the files written."""
    rows = {printable(label): read_rows(path) for label, path in runs.items()}
    panels = _panels(rows)
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.4), layout="constrained", squeeze=False)
    for axis, (title, unit, series) in zip(axes[0], panels):
        for color, (label, entries) in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, rows.items()):
            for style, (kind, metric, legend) in zip(STYLES, series):
                points = _points(entries, kind, metric)
                name = " ".join(part for part in (label if len(rows) > 1 else "", legend) if part)
                if points:
                    marker = "o" if len(points) == 1 else None
                    axis.plot(*zip(*points), style, color=color, label=name or None, linewidth=1.4, marker=marker)
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[1]:
            axis.legend(frameon=False, fontsize=8)
    path = Path(folder) / "curves.png"
    try:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=110, format="png", metadata={"Software": SOFTWARE})
    finally:
        plt.close(figure)
    return [path]


def _panels(runs: dict[str, list[dict]]) -> list[tuple]:
    """Those for one label per image, for several, or for both, by what was validated."""
    rows = [row for entries in runs.values() for row in entries]
    several = any("val.map" in row for row in rows)
    left_out = () if several and any("val.top1" in row for row in rows) else _ONE_LABEL if several else _SEVERAL
    return [panel for panel in PANELS if panel[0] not in left_out]


def _points(rows: list[dict], kind: str, metric: str) -> list[tuple[float, float]]:
    """(epochs completed, value) of every row of one kind that has the metric."""
    steps = max((row["update"] for row in rows if row["type"] == "train" and "update" in row), default=1)
    points = []
    for row in rows:
        if row["type"] == kind and "epoch" in row and _is_drawn(row.get(metric)):
            points.append((row["epoch"] + (row["update"] / steps if "update" in row else 1), row[metric]))
    return points


def _is_drawn(value: object) -> bool:
    return isinstance(value, (int, float)) and -_MOST <= value <= _MOST


def labels(folders: list[str]) -> dict[str, Path]:
    """A name for every run: its folder's, with as many of the folders above as it takes to tell them apart."""
    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        labels = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(labels)) == len(paths):
            break
    return dict(zip(labels, paths))


if __name__ == "__main__":
    moved("plots")
