"""The figures as CSV, one file per question; numbers are written in full: whoever reads them computes the same."""

import csv
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace

from .answers import Answers
from .figures import Case, Figures


def write_tables(folder: Path, answers: Answers, figures: Figures, images: list[str]) -> list[str]:
    """Writes classes.csv, predictions.csv, suspects.csv and, for one label per image, confusion.csv; gives their names.

    Args:
        images: the name of every image, in the order of the answers.
    """
    tables = {"classes.csv": _classes(figures), "predictions.csv": _predictions(answers, figures, images)}
    tables["suspects.csv"] = _suspects(figures, images)
    if not answers.several:
        names = figures.class_names
        filled = ((names[label], names[answer], count) for label, answer, count in figures.cells.tolist())
        tables["confusion.csv"] = [("label", "prediction", "count"), *filled]
    for name, rows in tables.items():
        write_csv(folder / name, rows)
    return list(tables)


def write_csv(path: Path, rows: Iterable[Iterable]) -> None:
    """Every line ends in a newline; names are quoted where a reader could take a part of them for anything else."""
    with open(path, "w", encoding="utf-8", newline="", errors="surrogateescape") as file:
        # Python quotes the characters of a line's end alone, and readers take each "\r" for one.
        lines = SimpleNamespace(write=lambda line: file.write(line.removesuffix("\r\n") + "\n"))
        csv.writer(lines, lineterminator="\r\n").writerows(rows)


def _classes(figures: Figures) -> Iterable[tuple]:
    shares = ("precision", "recall", "f1")
    ranked = figures.mean_average_precision is not None
    columns = [f"{share}{end}" for share in shares for end in ("", "_low", "_high")]
    yield "class", "n", "predicted", *columns, *(["average_precision"] if ranked else [])
    for each in figures.classes:
        numbers = [number for share in shares for number in getattr(each, share)]
        yield each.name, each.n, each.predicted, *numbers, *([each.average_precision] if ranked else [])


def _predictions(answers: Answers, figures: Figures, images: list[str]) -> Iterable[tuple]:
    """A row per image; of several labels per image with two columns per class."""
    names, one = figures.class_names, figures.per_image
    if one is not None:
        yield (
            *("image", "label", "prediction", "probability", "second", "second_probability", "label_probability"),
            *("rank", "correct"),
        )
        columns = (column.tolist() for column in (answers.labels, *one, one.correct))
        for image, (label, first, p, second, p_second, p_label, rank, correct) in zip(images, zip(*columns)):
            yield image, names[label], names[first], p, names[second], p_second, p_label, rank, int(correct)
        return
    from .measure import sigmoid

    yield "image", *(f"{kind} {name}" for name in names for kind in ("label", "probability"))
    p = sigmoid(answers.logits)
    for image, said, shares in zip(images, answers.labels, p):
        yield image, *(value for pair in zip(said.tolist(), shares.tolist()) for value in pair)


def _suspects(figures: Figures, images: list[str]) -> Iterable[tuple]:
    def said(number: int, case: Case) -> str:
        """Where an image does not have the label cat, "not cat"."""
        return (
            figures.class_names[number] if number >= 0 else f"not {figures.class_names[case.label + case.answer + 1]}"
        )

    yield "image", "label", "suggestion", "label_probability", "suggestion_probability"
    for case in figures.suspects:
        labels = said(case.label, case), said(case.answer, case)
        yield images[case.position], *labels, case.label_probability, case.probability
