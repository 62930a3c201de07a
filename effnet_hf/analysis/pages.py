"""The report that a human opens: one HTML file that holds everything, its tables and pictures beside it.

The text is in `page.html.jinja`, next to this file. What comes first is what is wrong. A page shows as many rows and
pictures as somebody reads; all of them stand in the files beside it.
"""

import io
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..data import Reading, Split, in_words
from ..errors import UserError, printable
from ..files import atomic_folder, refuse_foreign, refuse_to_remove, require_place
from ..manifest import read_manifest
from . import drawings
from .answers import Answers
from .calibration import Calibration
from .figures import Estimate, Figures
from .measure import FEW, measure
from .sheets import Source, looks, sheets, suspects, uri
from .tables import write_tables


TEMPLATE = Path(__file__).with_name("page.html.jinja")
PAGE, FIGURES = "report.html", "figures.json"
_WORST, _NAMED, _PAIRS = 5, 12, 30  # on a page
_MATRIX = 40  # classes of a matrix that has not all
_FILES = {
    FIGURES: "all figures", "classes.csv": "every class", "predictions.csv": "every image",
    "suspects.csv": "likely label errors", "confusion.csv": "every confusion",
}  # fmt: skip

_HOW = {
    "classes": "Recall: of the images with this label, the share that was found. Precision: of the images that were"
    " taken for it, the share that has it. F1 is their harmonic mean. Behind each the 95 % interval: a class of few"
    " images has a wide one. A click on a head sorts.",
    "attention": "Grad-CAM. Left the image as the network gets it; then, warm, what speaks for its answer, and what"
    " speaks for the label. Warm spots beside the object mean that it learned the surroundings.",
    "suspects": "Images whose label the network contradicts with more confidence than it has on that class as a whole."
    " Look at each: some are hard images with the right label. All of them are in suspects.csv.",
    "reliability": "Of the answers with a probability of 0.8, 80 % should be right: on the dotted line the"
    " probabilities are true, below it the network is too sure.",
    "fitted": " The second line is measured on the very images that its temperature was fitted on, which makes its ECE"
    " better than it is on others.",
    "coverage": "How many answers are right if only the surest are given and the other images are left to a human."
    " It begins with ten images, or a twentieth of them.",
}


def write_report(
    answers: Answers,
    images: Split | None,
    folder: str | os.PathLike,
    *,
    network=None,
    processor=None,
    reading: Reading | None = None,
    facts: Mapping[str, Any],
    figures: Figures | None = None,
    top_k: int = 5,
    title: str = "What the model knows",
    overwrite: bool = False,
    ours: bool = False,
) -> dict[str, Any]:
    """Writes a report into a folder: report.html, its figures as JSON and CSV, its pictures as PNG.

    Args:
        images: the split that `answers.index` counts in; None where its images cannot be read again (a stream,
            synthetic ones), and then the page shows none.
        network, processor: with both, heat maps on the worst mistakes.
        reading: how the images were read.
        facts: for the last section, in this order: words to words or numbers. No file names, no secrets.
        figures: of the answers; measured here by default.
        overwrite: also replace another folder, all of which was written here. A report is replaced without, if nobody
            has put a file into it or edited one.
        ours: the folder is a part of a run that is locked.

    Returns:
        What a model card says of it: `page`, `never_found`, `suspects` and `classes` (how many there are), `worst` (of
        the 20 classes with the lowest recall: name, n, precision, recall, F1, in percent), `averages` (likewise), and
        `plots` (names of files without an image of the data).

    Raises:
        UserError: the folder holds something else, or cannot be written.
    """
    target = Path(folder)
    figures = measure(answers, top_k) if figures is None else figures
    source = Source(answers, images, reading or Reading())
    if ours or is_report(target):
        refuse_foreign(target, edited=True)
    with atomic_folder(target, overwrite=overwrite or is_report(target), ours=ours) as place:
        pictures: dict[str, bytes] = {}
        told = _in_words(figures)
        page = {
            **_first_screen(told),
            **_tables(told),
            **_plots(told, pictures),
            **sheets(told, source, pictures),
            **suspects(told, source),
            **looks(told, source, network, processor, pictures),
            "title": printable(title),
            "subtitle": f"{figures.n:,} images, {datetime.now().astimezone():%d %B %Y, %H:%M}",
            "how": _HOW | {"confusion": _how_confusion(figures)},
            "facts": [(what, printable(value)) for what, value in facts.items() if value not in (None, "")],
            "nonce": secrets.token_hex(8),
        }
        for name, content in pictures.items():
            (place / name).write_bytes(content)
        (place / FIGURES).write_text(json.dumps(figures.to_dict(), indent=1, allow_nan=False) + "\n", "utf-8")
        names = [source.name(position) for position in range(len(answers))]
        tables = write_tables(place, answers, figures, names)
        page["files"] = [(name, _FILES[name]) for name in (FIGURES, *tables)]
        page["notes"] = _notes(figures, source)
        page["contents"] = _contents(page)
        (place / PAGE).write_text(_render(page), "utf-8")
    return {
        "page": target / PAGE,
        "never_found": figures.never_found,
        "suspects": figures.num_suspects,
        "classes": len(figures.classes),
        "worst": [
            (each.name, each.n, *_percents(each.precision, each.recall, each.f1)) for each in figures.classes[:20]
        ],
        "averages": [
            (name, figures.n, *_percents(*average))
            for name, average in (("macro average", figures.macro), ("weighted average", figures.weighted))
        ],
        "plots": [name for name in ("confusion.png", "reliability.png", "coverage.png") if name in pictures],
    }


def require_report_folder(folder: str | os.PathLike, overwrite: bool, sources: dict[str, str | None]) -> None:
    """Raises `UserError` where `write_report` would refuse the folder, or would remove one of `sources`, by their
    flags; before the images are looked at."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise UserError(f"--report {printable(folder)} is a file; name a folder to write to.")
    if target.is_dir() and any(target.iterdir()) and not overwrite and not is_report(target):
        raise UserError(
            f"--report {printable(folder)} is not empty and no report; name another folder, or add --overwrite."
        )
    refuse_to_remove(target, sources)
    if is_report(target):
        refuse_foreign(target, edited=True)
    require_place(target, overwrite or is_report(target))


def is_report(folder: Path) -> bool:
    """Whether it is a report, written here."""
    try:
        return {PAGE, FIGURES} <= read_manifest(folder).keys()
    except ValueError:
        return False


def _render(page: dict) -> str:
    from jinja2 import Environment

    # Names of classes and files are words of others: whatever they hold is text.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = drawings.short
    text = environment.from_string(TEMPLATE.read_text("utf-8")).render(page)
    return text.encode("utf-8", "backslashreplace").decode("utf-8")  # half a character in a file's name


def _in_words(figures: Figures) -> Figures:
    """With names for a reader; the tables beside the page have the data's own."""
    names = in_words(figures.class_names)
    word = dict(zip(figures.class_names, names))
    return replace(
        figures,
        class_names=names,
        never_found=[word[name] for name in figures.never_found],
        classes=[each._replace(name=word[each.name]) for each in figures.classes],
    )


def _first_screen(figures: Figures) -> dict:
    headline: list[dict] = []
    if figures.accuracy is not None:
        # The k likeliest are no news where there are no more classes.
        among = figures.top_k_accuracy if 1 < (figures.top_k or 1) < len(figures.class_names) else None
        top = "" if among is None else f"top-{figures.top_k} {_cell(among)['text']}\u00a0%"
        headline.append(_tile("accuracy", figures.accuracy, top))
    else:
        precision = Estimate(figures.mean_average_precision or 0.0, np.nan, np.nan)
        headline.append(_tile("mAP", precision, "mean of the classes"))
    headline += [_tile("macro recall", figures.macro.recall), _tile("macro F1", figures.macro.f1)]
    known = len(figures.class_names)
    classes = f"of {known:,}" if len(figures.classes) < known else ""
    headline.append({"what": "images", "value": f"{figures.n:,}", "note": f"{figures.num_mistakes:,} wrong"})
    headline.append({"what": "classes", "value": f"{len(figures.classes):,}", "note": classes})
    never = [each for each in figures.classes if each.name in set(figures.never_found)]
    never.sort(key=lambda each: -each.n)
    found = [each for each in figures.classes if each not in never] or never
    names = figures.class_names
    images = {each.number: each.n for each in figures.classes}
    pairs = [
        {"label": printable(names[pair.label]), "answer": printable(names[pair.prediction]), "count": pair.count,
         "n": images[pair.label], "share": 100 * pair.share}
        for pair in figures.confusions[:_PAIRS]
    ]  # fmt: skip
    return {
        "headline": headline,
        "never": {
            "shown": [{"name": drawings.short(each.name, 60), "n": each.n} for each in never[:_NAMED]],
            "more": max(0, len(never) - _NAMED),
        }
        if never
        else None,
        "unseen": _unseen(figures),
        "worst_title": "Worst of the other classes" if never and found is not never else "Worst classes",
        "worst": [
            {
                "name": printable(each.name),
                "n": each.n,
                "recall": _cell(each.recall),
                "precision": _cell(each.precision),
            }
            for each in found[:_WORST]
        ],
        "pairs": pairs[:_WORST],
        "all_pairs": pairs if len(pairs) > _WORST else [],
        "sentences": _sentences(figures),
    }


def _unseen(figures: Figures) -> str:
    missing = len(figures.class_names) - len(figures.classes)
    if not missing:
        return ""
    answered = f"; {len(figures.answered_only):,} of them were given as an answer" if figures.answered_only else ""
    return f"{missing:,} classes that the network knows have no image here{answered}. Averages are over the others."


def _sentences(figures: Figures) -> list[str]:
    found, left_out = figures.num_suspects, figures.suspects_left_out
    words = f"{found:,} label{'s' * (found > 1)} may be wrong, worth a look" if found else "No label looks wrong"
    if left_out:
        words += f"; {left_out:,} more, in classes that are never found or have fewer than {FEW} images,"
        words += (
            " are left out: of these nothing can be said" if left_out > 1 else " is left out: of it nothing can be said"
        )
    said = [words + "."]
    if (calibration := figures.calibration) is not None:
        now = calibration.now
        filled = now.counts > 0
        gap = float((now.counts * (now.confidence - now.accuracy))[filled].sum() / now.counts.sum())
        sure = "too sure" if gap > 0 else "not sure enough"
        text = f"The network is {sure}: its probabilities are {'above' if gap > 0 else 'below'} the truth by"
        text = f"{text} {100 * abs(gap):.1f} points on average" if abs(gap) > 0.005 else (
            "The network's probabilities are right on average")  # fmt: skip
        text += f", with an expected calibration error (ECE) of {100 * now.ece:.1f} %"
        if _is_stored(calibration):
            text += f"; its temperature {calibration.temperature:.2f} is stored"
        elif calibration.fitted is not None and calibration.ece_held_out is not None:
            # Neither figure is of images that its temperature was fitted on.
            text += (
                f"; with a temperature of {calibration.fitted:.2f}, which validate --calibrate stores, it is"
                f" {100 * calibration.ece_held_out:.1f} % (fitted on one half of the images, measured on the other)"
                if calibration.ece_held_out < now.ece
                else "; a temperature would not make it smaller"
            )
        said.append(text + ".")
    return said


def _is_stored(calibration: Calibration) -> bool:
    """Whether the network has the best temperature for these images already."""
    now, fitted = calibration.temperature, calibration.fitted
    return now != 1 and fitted is not None and abs(fitted / now - 1) <= 0.01


def _tables(figures: Figures) -> dict:
    several = figures.mean_average_precision is not None
    columns = ["class", "n", "predicted", "precision, %", "recall, %", "F1, %"]
    rows = []
    for each in figures.classes:
        cells = [_count(each.n), _count(each.predicted), *map(_cell, (each.precision, each.recall, each.f1))]
        if several:
            cells.append(_cell(Estimate(each.average_precision or 0.0, np.nan, np.nan)))
        rows.append({"name": printable(each.name), "never": not each.recall.value, "cells": cells})
    averages = [
        {"name": name, "cells": [_cell(each) for each in average]}
        for name, average in (
            ("macro: each class counts the same", figures.macro),
            ("weighted by the images of a class", figures.weighted),
        )
    ]
    return {"columns": columns + ["AP, %"] * several, "classes": rows, "averages": averages}


def _plots(figures: Figures, pictures: dict[str, bytes]) -> dict:
    matrix, zoom = None, 0
    if (chosen := _of_matrix(figures)) is not None:
        place = np.full(len(figures.class_names), -1)
        place[chosen] = np.arange(len(chosen))
        cells = figures.cells[(place[figures.cells[:, :2]] >= 0).all(1)]
        counts = np.zeros((len(chosen), len(chosen)), np.int64)
        counts[place[cells[:, 0]], place[cells[:, 1]]] = cells[:, 2]
        order = drawings.order_of(counts)
        names = [figures.class_names[number] for number in chosen[order]]
        pictures["confusion.png"] = drawings.confusion(counts[np.ix_(order, order)], names)
        matrix = uri(pictures["confusion.png"])
        zoom = int(1.5 * Image.open(io.BytesIO(pictures["confusion.png"])).width)
    plots = []
    if (calibration := figures.calibration) is not None:
        own, fitted = calibration.temperature, calibration.after
        curves = [("as it is" if own == 1 else f"with its temperature {own:.2f}", calibration.now)]
        if fitted is not None and not _is_stored(calibration):
            curves.append((f"with {calibration.fitted:.2f}, fitted on these images", fitted))
        pictures["reliability.png"] = drawings.reliability(
            [
                (f"{name}: ECE {100 * each.ece:.1f} %", each.confidence, each.accuracy, each.counts)
                for name, each in curves
            ]
        )
        how = _HOW["reliability"] + _HOW["fitted"] * (len(curves) > 1)
        plots.append({"title": "Reliability", "how": how, "picture": uri(pictures["reliability.png"])})
    # Of the first few images each one makes the line jump.
    coverage = figures.coverage[figures.coverage[:, 0] * figures.n >= max(10, 0.05 * figures.n) - 1e-6]
    if len(coverage):
        pictures["coverage.png"] = drawings.coverage(coverage[:, 0], coverage[:, 1])
        plots.append({"title": "Coverage", "how": _HOW["coverage"], "picture": uri(pictures["coverage.png"])})
    return {"matrix": matrix, "zoom": zoom, "plots": plots}


def _of_matrix(figures: Figures) -> np.ndarray | None:
    """Numbers of the classes that a matrix shows: all, or those that are confused most; None where there is none."""
    involved = np.unique(figures.cells[:, :2])
    if not len(involved):
        return None
    if len(involved) <= drawings.ORDERED:
        return involved
    worst: dict[int, None] = {}
    for pair in figures.confusions:
        if len(worst.keys() | {pair.label, pair.prediction}) <= _MATRIX:
            worst |= dict.fromkeys((pair.label, pair.prediction))
    return np.array(sorted(worst)) if worst else None


def _how_confusion(figures: Figures) -> str:
    chosen, involved = _of_matrix(figures), np.unique(figures.cells[:, :2])
    some = ""
    if chosen is not None and len(chosen) < len(involved):
        some = f" The {len(chosen)} of {len(involved):,} classes that are confused most; all are in confusion.csv."
    return (
        "A row holds the images of one label, a column those that were given one answer: blue is right, red is wrong,"
        f" the stronger the larger its share of the row. Classes that are confused stand side by side.{some} A click"
        " enlarges it."
    )


def _notes(figures: Figures, source: Source) -> list[str]:
    notes = ["Intervals hold for other images of the same kind: 95 of 100 such intervals hold the true figure."]
    if source.images is None:
        notes.append("The images cannot be read a second time (they are streamed, or synthetic), so none are shown.")
    if figures.per_image is None:
        notes.append("An image may have several labels: each class is decided by itself, at its own threshold.")
    return notes


def _contents(page: dict) -> list[tuple[str, str]]:
    parts = [("classes", "classes")]
    parts += [("confusion", "confusions")] if page["matrix"] else []
    parts += [(sheet["anchor"], sheet["title"].lower()) for sheet in page["sheets"]]
    parts += [("attention", "what it looks at")] if page["looks"] else []
    parts += [("suspects", "likely label errors")] if page["suspects"] else []
    parts += [("calibration", "calibration")] if page["plots"] else []
    return [*parts, ("facts", "how it was measured")]


def _tile(what: str, estimate: Estimate, note: str = "") -> dict:
    cell = _cell(estimate)
    return {"what": what, "value": f"{cell['text']} %", "note": ", ".join(filter(None, (cell["range"], note)))}


def _cell(estimate: Estimate) -> dict:
    """Percent; what is no number (precision of what was never an answer) has no text."""
    value, low, high = estimate
    if not np.isfinite(value):
        return {"value": None, "key": -1, "text": "–", "range": ""}
    range_ = f"{100 * low:.1f}–{100 * high:.1f}" if np.isfinite(low) and np.isfinite(high) else ""
    return {"value": value, "key": round(value, 6), "text": f"{100 * value:.2f}", "range": range_}


def _count(number: int) -> dict:
    return {"value": number, "key": number, "text": f"{number:,}", "range": ""}


def _percents(*estimates: Estimate) -> tuple[str, ...]:
    return tuple(_cell(each)["text"] for each in estimates)
