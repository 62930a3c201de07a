"""How far a network's probabilities are true, and the temperature that makes them so (arXiv:1706.04599)."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .answers import Answers


BINS = 15
LEAST, MOST = 0.05, 20.0  # temperatures; one beyond them says that something else is wrong
_VALUES = 1 << 18  # logits looked at together: they stay in a core's cache


@dataclass(frozen=True)
class Reliability:
    """Of the probabilities that answers are given with.

    Attributes:
        counts: int64 (BINS,), images whose answer has a probability in each of `BINS` equal steps from 0 to 1.
        confidence, accuracy: float64 (BINS,), their mean probability, and the share that is right; NaN where there is
            none.
        ece: expected calibration error, the mean distance of the two, 0 to 1.
        nll: negative log likelihood of the labels, nats.
        brier: mean squared distance of the probabilities from the label's, 0 to 2.
    """

    counts: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    ece: float
    nll: float
    brier: float

    def to_dict(self) -> dict[str, Any]:
        filled: dict[str, list] = {"counts": self.counts.tolist()}
        for name in ("confidence", "accuracy"):
            filled[name] = [None if math.isnan(share) else share for share in getattr(self, name).tolist()]
        return {"ece": self.ece, "nll": self.nll, "brier": self.brier, "bins": filled}


@dataclass(frozen=True)
class Calibration:
    """Of one label per image.

    Attributes:
        temperature: what the network divides its logits by now; 1 where it has none.
        now: with that.
        fitted: the temperature with the least negative log likelihood on these images; None where there is none.
        after: with that one, on the images that it was fitted on; None as above.
        ece_held_out: each half of the images with the temperature fitted on the other half; None as above.
        none_as: why there is no fitted one, as a clause.
    """

    temperature: float
    now: Reliability
    fitted: float | None
    after: Reliability | None
    ece_held_out: float | None
    none_as: str = ""

    def without_fitted(self, reason: str) -> "Calibration":
        """The same without a temperature, which `reason` forbids to advise."""
        return replace(self, fitted=None, after=None, ece_held_out=None, none_as=reason)

    def to_dict(self) -> dict[str, Any]:
        after = None if self.after is None else self.after.to_dict()
        return vars(self) | {"now": self.now.to_dict(), "after": after}


def calibration(answers: Answers) -> Calibration:
    """What the probabilities are worth now, and what they would be with the best temperature."""
    logits, labels, own = answers.logits, answers.labels, answers.temperature
    now = reliability(logits, labels)
    halves = slice(0, None, 2), slice(1, None, 2)  # a split is sorted by class: each half has every other image of one
    # `best` is relative to what the network does already, so that fitting twice comes to the same.
    ends = LEAST / own, MOST / own
    best = _best(logits, labels, ends)
    if not 0 < best < math.inf:
        return Calibration(own, now, None, None, None, _why_none(logits, labels, best))
    fitted = round(own * best, 4)  # the likelihood does not notice a fifth digit
    held_out = None
    found = [(part, _best(logits[other], labels[other], ends, best, 0.05)) for part, other in (halves, halves[::-1])]
    answered = [_answered(logits[part], labels[part], of) for part, of in found if 0 < of < math.inf]
    if len(answered) == 2:
        confidence, correct, *_ = map(np.concatenate, zip(*answered))
        held_out = expected_calibration_error(confidence, correct)
    return Calibration(own, now, fitted, reliability(logits, labels, fitted / own), held_out)


def _why_none(logits: np.ndarray, labels: np.ndarray, best: float) -> str:
    if (logits.argmax(1) == labels).all():
        return (
            f"the answers to these {len(labels):,} images are all right; calibrate on images that the network was not"
            " trained on and gets some of wrong"
        )
    if best:
        return (
            f"the best one is above {MOST:g}: the logits are far too large, or the answers no better than guesses; look"
            " whether the model and these labels belong together"
        )
    return f"the best one is below {LEAST:g}: the logits are far too small"


def reliability(logits: np.ndarray, labels: np.ndarray, temperature: float = 1.0) -> Reliability:
    """Of logits (N, classes) divided by a temperature, and labels (N,)."""
    confidence, correct, nll, brier = _answered(logits, labels, temperature)
    places = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)
    counts = np.bincount(places, minlength=BINS)
    with np.errstate(invalid="ignore"):
        mean, right = (np.bincount(places, column, BINS) / counts for column in (confidence, correct))
    ece = expected_calibration_error(confidence, correct)
    return Reliability(counts, mean, right, ece, float(nll.mean()), float(brier.mean()))


def chunks(logits: np.ndarray) -> Iterator[tuple[slice, torch.Tensor]]:
    """Float64 logits of a few images at a time, and which; finite: a class that is ruled out has -infinity."""
    for part in _parts(logits):
        yield part, torch.from_numpy(logits[part]).double().clamp_(min=-1e30)


def _parts(logits: np.ndarray) -> Iterator[slice]:
    rows = max(1, _VALUES // logits.shape[1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _answered(logits: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, ...]:
    """Of every image: probability of the answer, whether it is right, negative log likelihood, Brier score."""
    found = []
    for part, raw in chunks(logits):
        target = torch.from_numpy(labels[part])[:, None]
        scaled = raw / temperature
        likeliest = scaled.argmax(1, keepdim=True)
        highest, own = scaled.gather(1, likeliest), scaled.gather(1, target)
        shares = scaled.sub_(highest).exp_()  # of `total`
        total = shares.sum(1, keepdim=True)
        own = own - highest - total.log()
        brier = shares.square_().sum(1, keepdim=True) / total.square() - 2 * own.exp() + 1
        found.append(torch.cat([1 / total, (likeliest == target).double(), -own, brier], 1))
    return tuple(torch.cat(found).numpy().T)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray) -> float:
    """Of the probabilities of answers, and whether they are right, both (N,)."""
    # Of several classes it is that of the answers being right, which needs no (N, classes).
    from torchmetrics.functional.classification import binary_calibration_error

    given, right = torch.from_numpy(np.ascontiguousarray(confidence)), torch.from_numpy(correct).long()
    return float(binary_calibration_error(given, right, n_bins=BINS, norm="l1"))


def _best(
    logits: np.ndarray, labels: np.ndarray, ends: tuple[float, float], near: float = 1.0, width: float = 0.5
) -> float:
    """The temperature with the least negative log likelihood, which is convex in its inverse; 0 where it is below the
    ends, infinity where it is above them.

    Args:
        near, width: where to look first, and how far around its logarithm.
    """
    from scipy.optimize import brentq

    # float32: a slope does not need more, and takes a third of the time.
    whole = torch.from_numpy(logits)
    highest = whole.amax(1, keepdim=True)
    own = whole.gather(1, torch.from_numpy(labels)[:, None]) - highest
    own_total = float(own.clamp_(min=-1e4).sum(dtype=torch.float64))  # -infinity where a class is ruled out

    @functools.cache  # the search asks for its ends again
    def slope(log_temperature: float) -> float:
        inverse, total = math.exp(-log_temperature), 0.0
        for part in _parts(logits):
            below = (whole[part] - highest[part]).mul_(inverse).clamp_(min=-60)  # less counts nothing, and is slow
            shares = below.exp()
            total += float((torch.linalg.vecdot(shares, below) / shares.sum(1)).sum(dtype=torch.float64))
        return (own_total - total / inverse) / len(labels)

    if not len(labels):
        return math.inf
    least, most = map(math.log, ends)
    middle = math.log(near)
    # A look nearby costs half as much.
    for low, high in ((max(least, middle - width), min(most, middle + width)), (least, most)):
        if low < high and slope(low) < 0 < slope(high):
            return math.exp(brentq(slope, low, high, xtol=1e-7))
    return math.inf if slope(most) <= 0 else 0.0
