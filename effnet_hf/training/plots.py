"""Curves of one or several runs from their metrics.jsonl: loss, figures, learning rate, speed.

effnet-hf plots runs/a runs/b --output_dir plots
"""

import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import matplotlib


if "ipykernel" not in sys.modules:  # a notebook keeps its own, which shows figures
    matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from ..cli import moved
from ..drawn import SOFTWARE, is_ours
from ..errors import UserError, printable
from ..files import atomic_write
from ..run_folder import RunFolder


if TYPE_CHECKING:
    from .run import Run


_AVERAGE = "moving average"
PANELS = (  # (title, y label, [(row type, metric, legend)]); those without a figure are left out
    (
        "Loss",
        "cross entropy",
        [("epoch", "train.loss", "train"), ("val", "val.loss", "val"), ("val_ema", "val_ema.loss", _AVERAGE)],
    ),
    ("Top-1", "%", [("val", "val.top1", "val"), ("val_ema", "val_ema.top1", _AVERAGE)]),
    ("Top-5", "%", [("val", "val.top5", "val"), ("val_ema", "val_ema.top5", _AVERAGE)]),
    (
        "Mean of classes",
        "%",
        [
            ("val", "val.macro_recall", "recall"),
            ("val", "val.macro_f1", "F1"),
            ("val_ema", "val_ema.macro_recall", f"recall, {_AVERAGE}"),
            ("val_ema", "val_ema.macro_f1", f"F1, {_AVERAGE}"),
        ],
    ),
    ("mAP", "%", [("val", "val.map", "val"), ("val_ema", "val_ema.map", _AVERAGE)]),
    ("F1", "%", [("val", "val.f1", "val"), ("val_ema", "val_ema.f1", _AVERAGE)]),
    ("Learning rate", "", [("train", "train.lr", "")]),
    ("Speed", "images/s", [("train", "train.total_ips", "")]),
    ("Waiting for data", "% of the time", [("train", "train.wait", "")]),
)
STYLES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")
FILE = "curves.png"
_COLORS = {"epoch": "0.5", "train": "C0", "val": "C0", "val_ema": "C1"}  # of a run that is alone
_FROM_ZERO = ("Speed", "Waiting for data")
_MOST = 10**15  # of a figure that is drawn: an axis needs room to both sides of it
_SHARE = 0.1  # of a run's time that may go into drawing


def refuse_to_replace_a_drawing(target: Path) -> None:
    """Raises `UserError` for what is there and is no drawing of ours."""
    if os.path.lexists(target) and not is_ours(target):
        raise UserError(
            f"{target} may not have been drawn by this command; move it away, name another --output_dir, or replace it"
            " with --overwrite."
        )


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


# A dollar in the name of a folder begins no formula. A README shows 8 inches as some 800 pixels.
@plt.rc_context({"text.parse_math": False, "font.size": 8, "axes.titlesize": 9})  # type: ignore[operator]
def draw(runs: dict[str, Path], folder: Path) -> list[Path]:
    """Draws `curves.png` over the given runs (label -> output_dir); returns the files written.

    One run has a colour for each of its figures, several have one each. A star marks each run's best epoch.
    """
    rows = {printable(label): read_rows(path) for label, path in runs.items()}
    panels = _panels(rows)
    columns = max(math.ceil(len(panels) / 2), 2)
    figure, axes = plt.subplots(2, columns, figsize=(2.75 * columns, 4.8), layout="constrained")
    colors = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    for axis, panel in zip(axes.flat, panels):
        title, unit, series = panel
        axis.set(title=title, xlabel="epoch", ylabel=unit)
        for number, (label, entries) in enumerate(rows.items()):
            for place, (kind, metric, legend) in enumerate(series):
                if points := _points(entries, kind, metric):
                    name = " ".join(part for part in (label if len(rows) > 1 else "", legend) if part)
                    color = colors[number % len(colors)] if len(rows) > 1 else _COLORS[kind]
                    marker = "o" if len(points) == 1 else None
                    axis.plot(
                        *zip(*points), STYLES[place], color=color, label=name or None, linewidth=1.3, marker=marker
                    )
            _mark_best(axis, panel, entries, None if len(rows) == 1 else colors[number % len(colors)])
        axis.grid(alpha=0.3)
        if title in _FROM_ZERO:
            axis.set_ylim(bottom=0)
        if title == "Loss" and axis.lines:
            # Before batch norm's statistics have settled it may be ten times what it is afterwards.
            losses = [loss for line in axis.lines for loss in line.get_ydata()]
            typical = statistics.median(losses)
            if max(losses) > 5 * typical > 0:
                axis.set_ylim(0, 3 * typical)
        axis.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
        drawn = [line for line in axis.lines if line.get_label()[0] != "_"]
        if len(rows) == 1 and drawn:
            axis.legend(frameon=False, fontsize=7)
        elif len(series) > 1:
            styles = {line.get_linestyle() for line in drawn}
            names = [legend for style, (_, _, legend) in zip(STYLES, series) if style in styles]
            keys = [Line2D([], [], color="0.3", linestyle=style) for style in STYLES if style in styles]
            axis.legend(keys, names, frameon=False, fontsize=7)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    if len(rows) > 1:
        keys = [Line2D([], [], color=colors[number % len(colors)]) for number in range(len(rows))]
        figure.legend(keys, list(rows), loc="outside lower center", ncols=3, frameon=False)
    path = Path(folder) / FILE
    try:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=200, format="png", metadata={"Software": SOFTWARE})
    finally:
        plt.close(figure)
    return [path]


def _mark_best(axis, panel: tuple, rows: list[dict], color: str | None) -> None:
    """A star where the figures of the best model stand, in its run's colour; the title says the first of them, of a run
    that is alone, which has no colour of its own."""
    told = [row for row in rows if row["type"] in ("epoch", "summary") and _is_drawn(row.get("best_epoch"))]
    if not told:
        return
    epoch, average = told[-1]["best_epoch"], bool(told[-1].get("best_is_ema"))
    best = []
    for kind, metric, legend in panel[2]:
        values = dict(_points(rows, kind, metric)) if kind == ("val_ema" if average else "val") else {}
        if epoch in values:
            best.append((legend.split(",")[0], values[epoch]))
            axis.plot(
                [epoch], [values[epoch]], "*", color=color or _COLORS[kind], markersize=9, markeredgecolor="black",
                markeredgewidth=0.7, zorder=3,
            )  # fmt: skip
    if best and color is None:
        (which, value), several = best[0], len(best) > 1
        axis.set_title(
            f"{panel[0]}: {which} {value:.4g} at ★" if several else f"{panel[0]}: {value:.4g} at ★, epoch {epoch}"
        )


class LiveCurves:
    """`plots/curves.png` of a run that goes on, drawn anew after an epoch unless that would take more than a tenth of
    the time since the last drawing."""

    def __init__(self, run: "Run"):
        self.run, self.drawn_at, self.cost = run, time.monotonic(), 2.0  # seconds, at a guess

    def refresh(self) -> None:
        """Draws if it is time to, on the first process. No run ends because of its picture."""
        started, folder = time.monotonic(), RunFolder(self.run.recipe.output_dir)
        if not self.run.accelerator.is_main_process or self.cost > _SHARE * (started - self.drawn_at):
            return
        try:
            self.run.checkpoints.owner.adds(folder.plots.name)
            draw({folder.path.name: folder.path}, folder.plots)
        except UserError as error:
            self.run.report.line(f"         no curves yet: {error}")
        self.drawn_at = time.monotonic()
        self.cost = self.drawn_at - started


def _panels(runs: dict[str, list[dict]]) -> list[tuple]:
    """Those that have something to show: top-5 of five classes is always 100 %. At most six of one run: where waiting
    for data is shown, speed is left out first."""
    rows = [row for entries in runs.values() for row in entries]
    panels = []
    for panel in PANELS:
        values = [value for kind, metric, _ in panel[2] for _, value in _points(rows, kind, metric)]
        if values and not (panel[0] == "Top-5" and min(values) == 100):
            panels.append(panel)
    if len(panels) > 6:
        panels = [panel for panel in panels if panel[0] != "Speed"]
    return panels or list(PANELS[:1])


def _points(rows: list[dict], kind: str, metric: str) -> list[tuple[float, float]]:
    """(epochs completed, value) of every row of one kind that has the metric."""
    steps = max((row["update"] for row in rows if row["type"] == "train" and "update" in row), default=1)
    points = []
    for row in rows:
        if row["type"] == kind and "epoch" in row and _is_drawn(value := _value(row, metric)):
            points.append((row["epoch"] + (row["update"] / steps if "update" in row else 1), value))
    return points


def _value(row: dict, metric: str) -> Any:
    if metric != "train.wait":
        return row.get(metric)
    waiting: Any = row.get("train.data_time")
    computing: Any = row.get("train.compute_time")
    return 100 * waiting / max(waiting + computing, 1e-9) if _is_drawn(waiting) and _is_drawn(computing) else None


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
