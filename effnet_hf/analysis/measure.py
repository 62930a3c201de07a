"""From the answers of a validation to its figures.

The arithmetic is scikit-learn's and torchmetrics'; what is done here is to ask them in an order that 50,000 images of
1,000 classes do not notice.
"""

from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .answers import Answers
from .calibration import calibration, chunks, expected_calibration_error
from .figures import MOST_CASES, Averages, Case, ClassFigures, Confusion, Estimate, Figures, PerImage


RESAMPLES = 1000  # of the bootstrap, whose seed is fixed
SURE = 0.8  # an answer of this probability contradicts a label, however sure the network usually is
FEW = 5  # images; what fewer have on average says little of their class
_Z = 1.959963984540054  # so many standard deviations around its mean hold 95 % of a normal distribution


def measure(answers: Answers, top_k: int = 5) -> Figures:
    """Every number of a report.

    Intervals are of 95 %: Wilson's for shares of counts (accuracy, precision, recall; F1 by way of the share of true
    positives among all that are said or answered to be in a class), for averages over classes those of 1,000 resamples
    of the images.

    Raises:
        UserError: there is no image, or with several labels per image none that has one.
    """
    if not len(answers):
        raise UserError("there is no image to measure.")
    return _of_several_labels(answers) if answers.several else _of_one_label(answers, top_k)


def summary(answers: Answers) -> dict[str, Any]:
    """The figures that a validation prints beside its own, of one label per image: `weighted_f1` (percent), `ece` (0 to
    1), and `never_found`; the same as `measure` has, and quick."""
    if answers.several:
        return {}
    from sklearn.metrics import f1_score

    columns, labels = _look(answers), answers.labels
    found, counts = np.unique(labels[columns.correct]), np.bincount(labels, minlength=len(answers.class_names))
    never = np.setdiff1d(np.flatnonzero(counts), found)
    never = never[np.lexsort((never, -counts[never]))]
    over = {"labels": np.flatnonzero(counts), "average": "weighted", "zero_division": 0}
    return {
        "weighted_f1": 100 * float(f1_score(labels, columns.prediction, **over)),
        "ece": expected_calibration_error(columns.probability, columns.correct),
        "never_found": [answers.class_names[number] for number in never],
    }


def _of_one_label(answers: Answers, top_k: int) -> Figures:
    from sklearn.metrics import accuracy_score, precision_recall_fscore_support

    labels, names = answers.labels, answers.class_names
    columns = _look(answers)
    counts = np.bincount(labels, minlength=len(names))
    present = np.flatnonzero(counts)
    places, sizes = np.unique(labels * len(names) + columns.prediction, return_counts=True)
    cells = np.stack([*np.divmod(places, len(names)), sizes], 1)
    shares = precision_recall_fscore_support(labels, columns.prediction, labels=present, zero_division=0)[:3]
    classes, macro, weighted = _of_classes(names, present, _Rows.of_cells(cells, len(names)), *shares)
    correct, n = columns.correct, len(labels)
    order = np.argsort(-columns.probability, kind="stable")
    suspects, left_out = _suspects(answers, columns, counts)
    wrong = cells[cells[:, 0] != cells[:, 1]]
    wrong = wrong[np.lexsort((wrong[:, 1], wrong[:, 0], -wrong[:, 2]))]

    def cases(places: np.ndarray) -> list[Case]:
        rows = zip(
            places.tolist(), labels[places].tolist(), columns.prediction[places].tolist(),
            columns.probability[places].tolist(), columns.label_probability[places].tolist(),
        )  # fmt: skip
        return [Case(*row) for row in rows]

    return Figures(
        n=n,
        class_names=names,
        accuracy=_wilson(int(correct.sum()), n)._replace(value=float(accuracy_score(labels, columns.prediction))),
        top_k=top_k,
        top_k_accuracy=_wilson(int((columns.rank <= top_k).sum()), n),
        macro=macro,
        weighted=weighted,
        classes=classes,
        never_found=_never_found(classes),
        answered_only=[names[number] for number in np.setdiff1d(cells[:, 1], present)],
        cells=cells,
        confusions=[Confusion(i, j, count, count / int(counts[i])) for i, j, count in wrong.tolist()],
        mistakes=cases(order[~correct[order]][:MOST_CASES]),
        hits=cases(order[correct[order]][::-1][:MOST_CASES]),
        suspects=suspects[:MOST_CASES],
        num_mistakes=int((~correct).sum()),
        num_suspects=len(suspects),
        suspects_left_out=left_out,
        per_image=columns,
        calibration=calibration(answers),
        coverage=_coverage(columns.probability[order], correct[order]),
    )


def _look(answers: Answers) -> PerImage:
    """What is kept of every image."""
    found = []
    for part, logits in chunks(answers.logits):
        label = torch.from_numpy(answers.labels[part])[:, None]
        own, normalizer = logits.gather(1, label), logits.logsumexp(1, keepdim=True)
        earlier = torch.arange(logits.shape[1]) < label  # the first of equal ones is the answer
        rank = 1 + ((logits > own) | ((logits == own) & earlier)).sum(1, keepdim=True)
        first = logits.argmax(1, keepdim=True)
        highest = logits.gather(1, first)
        second = logits.scatter(1, first, -torch.inf).argmax(1, keepdim=True) if logits.shape[1] > 1 else first
        p = (torch.cat([highest, logits.gather(1, second), own], 1) - normalizer).exp()
        found.append((first, p[:, :1], second, p[:, 1:2], p[:, 2:], rank))
    return PerImage(*(torch.cat(column)[:, 0].numpy() for column in zip(*found)))


def _suspects(answers: Answers, columns: PerImage, counts: np.ndarray) -> tuple[list[Case], int]:
    """Labels that confident learning (arXiv:1911.00068) takes for wrong, the widest margin first; how many are left
    out.

    A label is suspect where the answer is another class, with at least the probability that images of that class have
    on average, or `SURE` where they have more: a third of the good images of a class may lie below a mean of 0.98. The
    probabilities are those without the temperature, which is not to change what is found.

    Left out are labels and answers of a class that is never found, or has few images: their averages say nothing.
    """
    raw = columns
    if answers.temperature != 1:
        wanted = torch.from_numpy(np.stack([columns.prediction, answers.labels], 1))
        p = [
            (logits * answers.temperature).softmax(1).gather(1, wanted[part]) for part, logits in chunks(answers.logits)
        ]
        raw = raw._replace(**dict(zip(("probability", "label_probability"), torch.cat(p).numpy().T)))
    labels, given = answers.labels, columns.prediction
    usual = np.bincount(labels, raw.label_probability, len(counts)) / np.maximum(counts, 1)
    known = _known(counts, np.bincount(labels[columns.correct], minlength=len(counts)))
    suspect = ~columns.correct & (counts[given] > 0) & (raw.probability >= np.minimum(usual, SURE)[given])
    certain = suspect & known[labels] & known[given]
    places = np.flatnonzero(certain)
    places = places[np.argsort((raw.label_probability - raw.probability)[places], kind="stable")]
    rows = zip(*(each[places].tolist() for each in (labels, given, columns.probability, columns.label_probability)))
    return [Case(place, *row) for place, row in zip(places.tolist(), rows)], int((suspect & ~certain).sum())


def _known(counts: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Of which classes an average says something: of so many images, some are found."""
    return (counts >= FEW) & (found > 0)


def _coverage(probability: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """At every hundredth of the images, the most probable answers first; equal probabilities go together."""
    n = len(probability)
    wanted = np.unique(np.ceil(np.arange(1, 101) / 100 * n).astype(np.int64)) - 1
    ends = np.unique(np.searchsorted(-probability, -probability[wanted], side="right"))
    return np.stack([ends / n, np.cumsum(correct)[ends - 1] / ends, probability[ends - 1]], 1)


def _of_several_labels(answers: Answers) -> Figures:
    from sklearn.metrics import average_precision_score, precision_recall_fscore_support

    assert answers.thresholds is not None
    truth, names = answers.labels.astype(bool), answers.class_names
    p = sigmoid(answers.logits)
    given = p >= answers.thresholds
    counts = truth.sum(0)
    present = np.flatnonzero(counts)
    if not len(present):
        raise UserError("none of the validation images has a label, so there is nothing to measure.")
    one = len(present) == 1  # which scikit-learn would take for the classes 0 and 1
    taken = present[0] if one else present
    shares = precision_recall_fscore_support(
        truth[:, taken], given[:, taken], labels=[1] if one else None, average=None, zero_division=0
    )[:3]
    classes, macro, weighted = _of_classes(names, present, _Rows.of_images(truth, given), *shares)
    precisions = {number: float(average_precision_score(truth[:, number], p[:, number])) for number in present.tolist()}
    answered = np.where(given, p, 1 - p)

    def cases(which: np.ndarray, confidence: np.ndarray) -> list[Case]:
        """Of the places (image, class), the highest confidence first."""
        places = np.flatnonzero(which)
        best = places[np.argsort(-confidence.ravel()[places], kind="stable")][:MOST_CASES]
        return [case(*divmod(place, len(names))) for place in best.tolist()]

    def case(image: int, number: int, answer: bool | None = None) -> Case:
        has, said = bool(truth[image, number]), bool(given[image, number]) if answer is None else answer
        of_has = float(p[image, number])
        probability, label_probability = (of_has if yes else 1 - of_has for yes in (said, has))
        return Case(image, number if has else -1, number if said else -1, probability, label_probability)

    wrong = truth != given
    # A label is suspect where its class is as probable as it usually is of images that are said to have the other one.
    with np.errstate(invalid="ignore"):
        with_it, without = (np.where(which, p, 0).sum(0) / which.sum(0) for which in (truth, ~truth))
        suspect = np.where(truth, p <= without, p >= with_it) & wrong
    certain = suspect & _known(np.minimum(counts, len(truth) - counts), (truth & given).sum(0))
    places = np.flatnonzero(certain)
    places = places[np.argsort(-np.abs(p - truth).ravel()[places], kind="stable")]
    return Figures(
        n=len(truth),
        class_names=names,
        mean_average_precision=float(np.mean(list(precisions.values()))),
        macro=macro,
        weighted=weighted,
        classes=[each._replace(average_precision=precisions[each.number]) for each in classes],
        never_found=_never_found(classes),
        answered_only=[names[number] for number in np.setdiff1d(np.flatnonzero(given.any(0)), present)],
        mistakes=cases(wrong, answered),
        hits=cases(truth & given, 1 - answered),
        suspects=[case(*divmod(place, len(names))) for place in places[:MOST_CASES].tolist()],
        num_mistakes=int(wrong.sum()),
        num_suspects=len(places),
        suspects_left_out=int((suspect & ~certain).sum()),
    )


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Probabilities of several labels per image, float64."""
    return torch.from_numpy(logits).double().sigmoid().numpy()


class _Rows(NamedTuple):
    """What is resampled: rows of `sizes` images each, and sparse (rows, classes) of 0 and 1: whether they are said to
    have a class, are answered to have it, and both."""

    sizes: np.ndarray
    said: "scipy.sparse.csr_array"  # type: ignore[name-defined]  # noqa: F821
    answered: "scipy.sparse.csr_array"  # type: ignore[name-defined]  # noqa: F821
    both: "scipy.sparse.csr_array"  # type: ignore[name-defined]  # noqa: F821

    @classmethod
    def of_cells(cls, cells: np.ndarray, classes: int) -> "_Rows":
        """All images of a place in the confusion matrix are alike."""
        from scipy.sparse import csr_array

        rows, ones = np.arange(len(cells)), np.ones(len(cells))
        said, answered = (csr_array((ones, (rows, column)), (len(cells), classes)) for column in cells.T[:2])
        return cls(cells[:, 2], said, answered, said.multiply(answered).tocsr())

    @classmethod
    def of_images(cls, truth: np.ndarray, given: np.ndarray) -> "_Rows":
        from scipy.sparse import csr_array

        tables = (csr_array(table.astype(np.float64)) for table in (truth, given, truth & given))
        return cls(np.ones(len(truth), np.int64), *tables)

    def counts(self, weights: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, ...]:
        """For each row of weights (resamples, rows), of each class: both, said, answered."""
        return tuple((table.T @ weights.T).T[..., present] for table in (self.both, self.said, self.answered))


def _of_classes(
    names: list[str], present: np.ndarray, rows: _Rows, precision: np.ndarray, recall: np.ndarray, f1: np.ndarray
) -> tuple[list[ClassFigures], Averages, Averages]:
    """The figures of every class that has an image, and their averages `macro` and `weighted`."""
    both, said, answered = (count[0].astype(np.int64) for count in rows.counts(rows.sizes[None], present))
    classes = [
        ClassFigures(
            names[number], int(number), int(n), int(predicted),
            _wilson(tp, predicted)._replace(value=float(precision[i])),
            _wilson(tp, n)._replace(value=float(recall[i])),
            # F1 = 2 J / (1 + J), where J is a share of counts: that of what is both among what is one or the other.
            Estimate(float(f1[i]), *(2 * j / (1 + j) for j in _wilson(tp, n + predicted - tp)[1:])),
        )
        for i, (number, tp, n, predicted) in enumerate(zip(present, both, said, answered))
    ]  # fmt: skip
    found = {"precision": precision, "recall": recall, "f1": f1}
    resampled = _resampled(rows, present)
    averages = {}
    for kind, weights in (("macro", None), ("weighted", said)):
        ends = (np.quantile(resampled[kind, name], [0.025, 0.975]).tolist() for name in found)
        means = (float(np.average(shares, weights=weights)) for shares in found.values())
        averages[kind] = Averages(*(Estimate(mean, *pair) for mean, pair in zip(means, ends)))
    classes.sort(key=lambda each: (each.recall.value, -each.n, each.number))
    return classes, averages["macro"], averages["weighted"]


def _resampled(rows: _Rows, present: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """The averages of many draws of as many images, with replacement."""
    generator, images = np.random.default_rng(0), int(rows.sizes.sum())
    parts: dict[tuple[str, str], list[np.ndarray]] = {}
    step = max(1, min(RESAMPLES, (1 << 22) // len(rows.sizes)))
    for start in range(0, RESAMPLES, step):
        drawn = generator.multinomial(images, rows.sizes / images, min(step, RESAMPLES - start)).astype(np.float64)
        both, said, answered = rows.counts(drawn, present)
        there = said > 0  # a class that was not drawn is in no average, as a class without images is not
        for name, below in (("precision", answered), ("recall", said), ("f1", (said + answered) / 2)):
            shares = both / np.where(below > 0, below, 1)
            macro = (shares * there).sum(1) / np.maximum(there.sum(1), 1)
            weighted = (shares * said).sum(1) / np.maximum(said.sum(1), 1)
            parts.setdefault(("macro", name), []).append(macro)
            parts.setdefault(("weighted", name), []).append(weighted)
    return {key: np.concatenate(found) for key, found in parts.items()}


def _wilson(hits: int, n: int) -> Estimate:
    """A share of counts and Wilson's interval; of nothing, 0 and everything from 0 to 1."""
    if not n:
        return Estimate(0.0, 0.0, 1.0)
    share, extra = hits / n, _Z**2 / n
    centre = (share + extra / 2) / (1 + extra)
    half = _Z * np.sqrt(share * (1 - share) / n + extra / (4 * n)) / (1 + extra)
    return Estimate(
        float(share), float(max(0.0, min(share, centre - half))), float(min(1.0, max(share, centre + half)))
    )


def _never_found(classes: list[ClassFigures]) -> list[str]:
    return [each.name for each in classes if each.recall.value == 0]
