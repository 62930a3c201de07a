"""The runs of one cross-validation together: means over the folds, and figures of all images, each answered by the
network that was not trained on it."""

import csv
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from ..configuration import EfficientNetNVConfig
from ..data import DataListing
from ..errors import UserError, printable
from ..files import atomic_folder
from ..multi_label import is_multi_label, macro_f1, mean_average_precision, shown, thresholds_of
from ..reading import read_json
from ..recipes import Recipe, load_recipe
from ..run_folder import RunFolder
from ..tables import text_table
from .tables import write_csv


PREDICTIONS = "predictions.csv"
# What may differ between the folds of one cross-validation without being worth a word.
_OWN = {"fold", "output_dir", "resume", "overwrite", "name", "hub_model_id", "num_workers", "quiet", "report_to"}


@dataclass(frozen=True)
class FoldRun:
    """A finished run with `--fold`."""

    folder: RunFolder
    recipe: Recipe
    config: EfficientNetNVConfig
    summary: dict[str, Any]
    table: dict[str, list[str]]  # its report's predictions

    @classmethod
    def open(cls, path: str) -> "FoldRun":
        """Raises `UserError` where the folder holds no finished run of a fold with its report."""
        run = RunFolder(path)
        if not run.recipe.is_file() or not run.summary.is_file():
            raise UserError(f"{path} holds no finished run: it has no {run.recipe.name} or no {run.summary.name}.")
        try:
            recipe = load_recipe(str(run.recipe))
        except UserError as error:
            raise UserError(f"{run.recipe}: {error}") from None
        if not recipe.folds:
            raise UserError(f"{path} was not trained on a fold; train with --folds 5 --fold 1, and so on to --fold 5.")
        predictions = run.report / PREDICTIONS
        if not predictions.is_file():
            raise UserError(f"{path} has no {run.report.name}/{PREDICTIONS}; go on with --resume auto --report true.")
        summary, config = read_json(run.summary), EfficientNetNVConfig.from_pretrained(path)
        for name in (*_figures(config), "n"):
            if type(summary.get(name)) not in (int, float):
                raise UserError(f"{run.summary} has no figure {name}; was it written by this version?")
        with open(predictions, encoding="utf-8", errors="surrogateescape", newline="") as file:
            header, *rows = list(csv.reader(file)) or [[]]
        several = is_multi_label(config)
        wanted = {"image", *([] if several else ["label", "prediction", "label_probability"])}
        if several:
            wanted |= {f"{kind} {name}" for name in config.id2label.values() for kind in ("label", "probability")}
        if not wanted <= set(header) or not rows or any(len(row) != len(header) for row in rows):
            raise UserError(
                f"{predictions} is no whole table of predictions; go on with --resume auto to have it anew."
            )
        if len(rows) != summary["n"]:
            raise UserError(
                f"{predictions} has {len(rows):,} images, and {run.summary.name} counts {summary['n']:,}; go on with"
                " --resume auto to have both anew."
            )
        return cls(run, recipe, config, summary, dict(zip(header, map(list, zip(*rows)))))

    @property
    def names(self) -> list[str]:
        """The figures of its validation."""
        return _figures(self.config)

    def numbers(self, column: str) -> np.ndarray:
        """Raises `UserError` where a cell is none."""
        try:
            return np.array(self.table[column], np.float64)
        except ValueError:
            raise UserError(
                f"{self.folder.report / PREDICTIONS}: column {printable(column)} holds no numbers."
            ) from None


def _figures(config: EfficientNetNVConfig) -> list[str]:
    return ["map", "f1", "loss"] if is_multi_label(config) else ["top1", "macro_recall", "macro_f1", "loss"]


@dataclass(frozen=True)
class CrossValidation:
    """What all folds say together.

    Attributes:
        runs: in the order of their folds.
        notes: sentences for the console.
        mean, deviation: over the folds, by figure; percent but for the loss. Every fold counts the same, and the
            deviation is that of a sample: its squares are divided by the number of folds less one.
        pooled: the same figures of all images at once.
        classes: of one label per image, rows of (class, n, precision, recall, f1) of all images at once, in percent.
    """

    runs: list[FoldRun]
    notes: list[str]
    mean: dict[str, float]
    deviation: dict[str, float]
    pooled: dict[str, float]
    classes: list[tuple[str, int, float, float, float]]

    def text(self) -> str:
        """As lines for a terminal."""
        names = self.runs[0].names

        def row(title: str, images: int, figures: dict[str, float]) -> list[str]:
            return [title, f"{images:,}", *(_number(name, figures[name]) for name in names)]

        images = sum(run.summary["n"] for run in self.runs)
        rows = [row(f"fold {run.recipe.fold}", run.summary["n"], run.summary) for run in self.runs]
        spread = [f"{_number(n, self.mean[n])} ± {_number(n, self.deviation[n])}" for n in names]
        rows += [["mean ± sd", "", *spread], row("all images", images, self.pooled)]
        lines = [text_table(["", "images", *(f"{shown(n)} %" if n != "loss" else n for n in names)], rows)]
        folds = len(self.runs)
        lines.append(
            f"mean ± sd is that of {folds} figures, one per fold, each counting the same; the sd divides by {folds - 1}"
        )
        worst = sorted(self.classes, key=lambda each: each[3])[:3]
        if worst:
            some = ", ".join(f"{name} {recall:.1f} % of {n:,}" for name, n, _, recall, _ in worst)
            lines.append(f"lowest recall: {some}")
        return "\n".join(map(printable, "\n".join([*lines, *(f"note: {note}" for note in self.notes)]).split("\n")))

    def write(self, folder: str, overwrite: bool = False) -> list[Path]:
        """Writes folds.json, folds.csv, classes.csv and predictions.csv into a folder of their own.

        Raises:
            UserError: there is something else, or it is there and may not be replaced.
        """
        names, spread = self.runs[0].names, {"mean": self.mean, "sd": self.deviation, "pooled": self.pooled}
        folds = [{"fold": run.recipe.fold, "run": str(run.folder.path), "n": run.summary["n"],
                  **{name: run.summary[name] for name in names}} for run in self.runs]  # fmt: skip
        columns = list(self.runs[0].table)
        tables: dict[str, list] = {
            "folds.csv": [["fold", "run", "n", *names], *([*fold.values()] for fold in folds)],
            PREDICTIONS: [["fold", *columns]]
            + [[run.recipe.fold, *row] for run in self.runs for row in zip(*(run.table[name] for name in columns))],
        }
        if self.classes:
            tables["classes.csv"] = [["class", "n", "precision", "recall", "f1"], *self.classes]
        with atomic_folder(folder, overwrite) as target:
            for name, rows in tables.items():
                write_csv(target / name, rows)
            text = json.dumps({"folds": folds, **spread}, indent=1, allow_nan=False)
            (target / "folds.json").write_text(text + "\n", encoding="utf-8")
        return [Path(folder, name) for name in ("folds.json", *tables)]


def _number(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else f"{value:.2f}"


def sum_folds(paths: list[str]) -> CrossValidation:
    """Reads the runs of all folds of one cross-validation.

    Raises:
        UserError: a folder holds no such run, a fold is missing or there twice, or they are not of the same images and
            classes.
    """
    runs = [FoldRun.open(path) for path in paths]
    first = runs[0]
    by_fold: dict[int, FoldRun] = {}
    for run in runs:
        if run.recipe.folds != first.recipe.folds:
            raise UserError(
                f"{first.folder.path} is one of {first.recipe.folds} folds and {run.folder.path} one of"
                f" {run.recipe.folds}; name runs of one division."
            )
        if (other := by_fold.setdefault(run.recipe.fold, run)) is not run:
            raise UserError(f"{other.folder.path} and {run.folder.path} are both fold {run.recipe.fold}; name one.")
        if run.config.id2label != first.config.id2label or is_multi_label(run.config) != is_multi_label(first.config):
            raise UserError(
                f"{first.folder.path} and {run.folder.path} know other classes, or another number of labels."
            )
    if missing := [str(number) for number in range(1, first.recipe.folds + 1) if number not in by_fold]:
        some = "fold" if len(missing) == 1 else "folds"
        raise UserError(f"{some} {', '.join(missing)} of {first.recipe.folds} missing; name all runs of the division.")
    runs = [by_fold[number] for number in sorted(by_fold)]
    notes = _require_one_division(runs)
    differing = sorted(
        field.name for field in dataclasses.fields(Recipe)
        if field.name not in _OWN and len({repr(getattr(run.recipe, field.name)) for run in runs}) > 1
    )  # fmt: skip
    if differing:
        notes.append(f"the runs were not trained alike: they differ in {', '.join(differing)}.")
    figures = {name: np.array([run.summary[name] for run in runs], np.float64) for name in first.names}
    pooled, classes = (_pooled_sets(runs), []) if is_multi_label(first.config) else _pooled(runs)
    return CrossValidation(
        runs,
        notes,
        {name: float(values.mean()) for name, values in figures.items()},
        {name: float(values.std(ddof=1)) for name, values in figures.items()},
        pooled,
        classes,
    )


def _require_one_division(runs: list[FoldRun]) -> list[str]:
    """Raises `UserError` unless every image was validated on once; sentences where that cannot be known."""
    # An image within a data set may have a name such as 0.png, which others have too.
    named = [[name for name in run.table["image"] if "/" in name or name.startswith("row ")] for run in runs]
    _require_each_once(list(zip(runs, named)))
    without = [str(run.folder.path) for run in runs if not run.folder.data.is_file()]
    if without:
        return [f"whether all runs had the same images is not known: {without[0]} has no {runs[0].folder.data.name}."]
    listings = [DataListing.read(run.folder.data) for run in runs]
    listed = [_images(listing) for listing in listings]
    for run, own in zip(runs, listed):
        if differing := own ^ listed[0]:
            name = min(differing)[0]
            raise UserError(
                f"{runs[0].folder.path} and {run.folder.path} were trained and validated on other images:"
                f" {printable(name)} differs (of {len(differing):,}); train the folds anew on the same ones."
            )
    # By the names of the listings, too: the same folder may have lain elsewhere for each run.
    held_out = [
        listing.table.filter(pc.equal(listing.table["split"], "val"))["name"].to_pylist() for listing in listings
    ]
    _require_each_once(list(zip(runs, held_out)))
    if never := {name for name, _ in listed[0]}.difference(*held_out):
        raise UserError(
            f"none of the {len(runs)} runs was measured on {printable(min(never))} (of {len(never):,}); they are no"
            " folds of one division."
        )
    for run, images in zip(runs, held_out):
        if (n := run.summary["n"]) > len(images):
            raise UserError(
                f"{run.folder.path} has answers to {n:,} images, and its fold {len(images):,}; train it anew."
            )
    unread = len(listed[0]) - sum(run.summary["n"] for run in runs)
    are = "is" if unread == 1 else "are"
    return [f"{unread:,} of {len(listed[0]):,} images could not be read and {are} not counted."] if unread else []


def _require_each_once(held_out: list[tuple[FoldRun, list[str]]]) -> None:
    """Raises `UserError` where an image was validated on twice."""
    seen: dict[str, FoldRun] = {}
    for run, images in held_out:
        for image in images:
            if (other := seen.get(image)) is not None:
                who = f"{run.folder.path} was twice"
                if other is not run:
                    who = f"{other.folder.path} and {run.folder.path} were both"
                raise UserError(f"{who} measured on {printable(image)}; they are no folds of one division.")
            seen[image] = run


def _images(listing: DataListing) -> set[tuple[str, str]]:
    labels = listing.table["label"].to_pylist()
    words = listing.class_names if listing.label_sets is None else [row.tobytes().hex() for row in listing.label_sets]
    return {(name, words[label]) for name, label in zip(listing.table["name"].to_pylist(), labels)}


def _pooled(runs: list[FoldRun]) -> tuple[dict[str, float], list[tuple[str, int, float, float, float]]]:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    labels, answers = ([each for run in runs for each in run.table[column]] for column in ("label", "prediction"))
    given = np.concatenate([run.numbers("label_probability") for run in runs])
    present = set(labels)
    names = [name for _, name in sorted(runs[0].config.id2label.items()) if name in present]
    shares = precision_recall_fscore_support(labels, answers, labels=names, zero_division=0)
    precision, recall, f1, counts = (values.tolist() for values in shares)
    percent = [(name, n, 100 * p, 100 * r, 100 * f) for name, n, p, r, f in zip(names, counts, precision, recall, f1)]
    pooled = {
        "top1": 100 * float(accuracy_score(labels, answers)),
        "macro_recall": 100 * math.fsum(recall) / len(names),
        "macro_f1": 100 * math.fsum(f1) / len(names),
        "loss": float(-np.log(np.maximum(given, np.finfo(np.float64).tiny)).mean()),
    }
    return pooled, percent


def _pooled_sets(runs: list[FoldRun]) -> dict[str, float]:
    """Of several labels per image; each fold at its own thresholds."""
    from sklearn.metrics import log_loss

    names = [name for _, name in sorted(runs[0].config.id2label.items())]
    scores, truth = (
        np.concatenate([np.stack([run.numbers(f"{kind} {name}") for name in names], 1) for run in runs])
        for kind in ("probability", "label")
    )
    truth = truth.astype(np.int64)
    thresholds = np.concatenate([np.tile(thresholds_of(run.config), (len(run.table["image"]), 1)) for run in runs])
    return {
        "map": mean_average_precision(scores, truth),
        "f1": macro_f1(scores, truth, thresholds),
        "loss": float(np.mean([log_loss(truth[:, i], scores[:, i], labels=[0, 1]) for i in range(len(names))])),
    }
