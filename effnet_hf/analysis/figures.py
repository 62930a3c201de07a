"""Every number of a report; `measure` takes them from the answers of a validation.

On the predictions.csv of a report scikit-learn gives the same numbers to the last digit.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from .calibration import Calibration


MOST_CASES = 1000  # of a kind: nobody looks at more


class Estimate(NamedTuple):
    """A share from 0 to 1, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


class ClassFigures(NamedTuple):
    """What is known of one class.

    Attributes:
        number: its label.
        n: images that have it.
        predicted: images that the network gives it.
        average_precision: of its probability as a ranking; None for one label per image.
    """

    name: str
    number: int
    n: int
    predicted: int
    precision: Estimate
    recall: Estimate
    f1: Estimate
    average_precision: float | None = None


class Averages(NamedTuple):
    """Means over the classes that have an image."""

    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True)
class Confusion:
    """How many images of the class number `label` were taken for number `prediction`, and their share of its images."""

    label: int
    prediction: int
    count: int
    share: float


class Case(NamedTuple):
    """An image worth looking at.

    Attributes:
        position: in `Answers`; `answers.index[position]` is its number in the split.
        label: the number of the class that it is said to have. With several labels per image a case is about one class,
            and -1 says that the image is said not to have it.
        answer: the class that the network says it has, for a suspect the one that it should probably have; -1 for
            "does not have `label`".
        probability: of the answer.
        label_probability: of what it is said to have.
    """

    position: int
    label: int
    answer: int
    probability: float
    label_probability: float


class PerImage(NamedTuple):
    """Columns with one row per image, of one label per image.

    Attributes:
        prediction, second: int64, the two likeliest classes (the same one where there is only one).
        probability, second_probability, label_probability: float64.
        rank: int64, place of the label among the answers; 1 is right.
    """

    prediction: np.ndarray
    probability: np.ndarray
    second: np.ndarray
    second_probability: np.ndarray
    label_probability: np.ndarray
    rank: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        return self.rank == 1


@dataclass(frozen=True)
class Figures:
    """All numbers of a report. Shares are 0 to 1, not percent.

    Attributes:
        n: images.
        class_names: of all classes that the network knows, in label order.
        accuracy: share of images whose likeliest class is their label; None with several labels per image.
        top_k, top_k_accuracy: the same for the k likeliest.
        macro, weighted: means over the classes that have an image, each counting the same, or as many times as it has
            images.
        mean_average_precision: over the classes that have an image; None with one label per image.
        classes: that have an image, the lowest recall first, then the most images.
        answered_only: names of classes without an image that some image was taken for.
        never_found: names of the classes that have images of which not one was found, the most images first.
        cells: int64 (M, 3), label, prediction and count of every filled place of the confusion matrix; empty with
            several labels per image.
        confusions: the wrong ones of them, the most frequent first.
        mistakes: the most confident ones first (at most `MOST_CASES`; so too the next two).
        hits: right answers, the least confident ones first.
        suspects: labels that are probably wrong, the surest first.
        num_mistakes: in all.
        num_suspects: in all.
        suspects_left_out: how many more there would be, but for classes that are never found or have fewer than five
            images, of whose labels nothing can be said.
        per_image: None with several labels per image.
        calibration: how far the probabilities are true; None with several labels per image.
        coverage: float64 (P, 3): share of the images answered when only those of at least a probability are, accuracy
            on them, that probability; from few images to all. Empty with several labels per image.
    """

    n: int
    class_names: list[str]
    macro: Averages
    weighted: Averages
    classes: list[ClassFigures]
    never_found: list[str]
    answered_only: list[str]
    mistakes: list[Case]
    hits: list[Case]
    suspects: list[Case]
    num_mistakes: int
    num_suspects: int
    suspects_left_out: int
    accuracy: Estimate | None = None
    top_k: int | None = None
    top_k_accuracy: Estimate | None = None
    mean_average_precision: float | None = None
    cells: np.ndarray = field(default_factory=lambda: np.empty((0, 3), np.int64))
    confusions: list[Confusion] = field(default_factory=list)
    per_image: PerImage | None = None
    calibration: Calibration | None = None
    coverage: np.ndarray = field(default_factory=lambda: np.empty((0, 3)))

    def to_dict(self) -> dict[str, Any]:
        """What figures.json holds: names instead of numbers of classes, nothing per image but the cases."""

        def named(number: int) -> str | None:
            return None if number < 0 else self.class_names[number]

        def cases(found: list[Case]) -> list[dict]:
            return [case._asdict() | {"label": named(case.label), "answer": named(case.answer)} for case in found]

        def estimate(found: Estimate | None) -> dict | None:
            return None if found is None else found._asdict()

        def estimates(found: ClassFigures | Averages) -> dict:
            return {name: estimate(getattr(found, name)) for name in ("precision", "recall", "f1")}

        return {
            "n": self.n,
            "num_classes": len(self.class_names),
            "accuracy": estimate(self.accuracy),
            "top_k": self.top_k,
            "top_k_accuracy": estimate(self.top_k_accuracy),
            "mean_average_precision": self.mean_average_precision,
            "macro": estimates(self.macro),
            "weighted": estimates(self.weighted),
            "never_found": self.never_found,
            "answered_only": self.answered_only,
            "classes": [each._asdict() | estimates(each) for each in self.classes],
            "confusions": [
                vars(each) | {"label": named(each.label), "prediction": named(each.prediction)}
                for each in self.confusions[:MOST_CASES]
            ],
            "num_mistakes": self.num_mistakes,
            "num_suspects": self.num_suspects,
            "suspects_left_out": self.suspects_left_out,
            "mistakes": cases(self.mistakes),
            "hits": cases(self.hits),
            "suspects": cases(self.suspects),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "coverage": self.coverage.tolist(),
        }
