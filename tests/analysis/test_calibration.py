from dataclasses import replace

import numpy as np
import pytest
import torch
from torchmetrics.functional.classification import multiclass_calibration_error

from effnet_hf.analysis.answers import Answers
from effnet_hf.analysis.calibration import BINS, calibration, reliability

from .some_answers import one_label


def drawn(temperature: float, n: int = 4000) -> Answers:
    """Logits whose probabilities are true once they are divided by a temperature: labels are drawn from them."""
    rng = np.random.default_rng(0)
    true = 2 * rng.normal(size=(n, 5))
    p = np.exp(true) / np.exp(true).sum(1, keepdims=True)
    labels = (rng.random((n, 1)) > p.cumsum(1)).sum(1)
    return Answers((temperature * true).astype(np.float32), labels, np.arange(n), list("abcde"))


def test_error_is_that_of_torchmetrics():
    answers = one_label(surer=2)
    found = reliability(answers.logits, answers.labels)
    p = torch.from_numpy(answers.logits).double().softmax(1)
    expected = multiclass_calibration_error(p, torch.from_numpy(answers.labels), 6, n_bins=BINS)
    assert found.ece == pytest.approx(expected.item(), abs=1e-6)  # theirs is of float32
    assert found.counts.sum() == len(answers)
    filled = found.counts > 0
    distance = found.counts * np.abs(found.confidence - found.accuracy)
    assert distance[filled].sum() / len(answers) == pytest.approx(found.ece, abs=1e-12)
    assert found.nll == pytest.approx(
        torch.nn.functional.cross_entropy(torch.from_numpy(answers.logits), torch.from_numpy(answers.labels)).item()
    )
    one_hot = np.eye(6)[answers.labels]
    assert found.brier == pytest.approx(float(((p.numpy() - one_hot) ** 2).sum(1).mean()))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_temperature_that_made_the_logits_too_sure_is_found(temperature):
    found = calibration(drawn(temperature))
    assert found.fitted == pytest.approx(temperature, rel=0.05)
    assert found.after.ece < 0.02 and found.ece_held_out < 0.03
    if temperature != 1:
        assert found.now.ece > 0.06 and found.after.nll < found.now.nll
    # nothing near it is better
    answers = drawn(temperature)
    for factor in (0.97, 1.03):
        assert reliability(answers.logits, answers.labels, factor * found.fitted).nll > found.after.nll


def test_each_half_is_measured_at_the_temperature_of_the_other():
    """By hand, on halves that need different ones: every other image."""
    answers = drawn(1.0)
    logits = answers.logits.copy()
    logits[1::2] *= 4
    found = calibration(replace(answers, logits=logits))
    fitted = [calibration(replace(answers, logits=logits[half], labels=answers.labels[half])).fitted
              for half in (slice(0, None, 2), slice(1, None, 2))]  # fmt: skip
    assert fitted[1] == pytest.approx(4 * fitted[0], rel=0.1)
    logits[::2] /= fitted[1]
    logits[1::2] /= fitted[0]
    assert found.ece_held_out == pytest.approx(reliability(logits, answers.labels).ece, abs=1e-3)


def test_fitting_twice_comes_to_the_same():
    answers = drawn(3.0)
    first = calibration(answers)
    again = calibration(
        Answers(
            answers.logits / np.float32(first.fitted), answers.labels, answers.index, answers.class_names,
            temperature=first.fitted,
        )
    )  # fmt: skip
    assert again.fitted == first.fitted and again.temperature == first.fitted
    assert again.now.ece == pytest.approx(first.after.ece, abs=1e-6)


def test_images_that_are_all_right_tell_no_temperature():
    answers = one_label(surer=2)
    right = answers.logits.argmax(1) == answers.labels
    only = Answers(answers.logits[right], answers.labels[right], np.arange(right.sum()), answers.class_names)
    found = calibration(only)
    assert (found.fitted, found.after, found.ece_held_out) == (None, None, None) and found.now.ece >= 0
    assert found.none_as.startswith(f"the answers to these {right.sum()} images are all right")


@pytest.mark.parametrize(
    "factor, own, reason",
    [
        (-1, 1, "above 20: the logits are far too large, or the answers no better than guesses"),
        (50, 1, "above 20: the logits are far too large"),
        (0, 1, "above 20"),  # no answer is likelier than another
        (0.01, 1, "below 0.05: the logits are far too small"),
        (2, 15, "above 20"),  # of the logits before the temperature that the network has
        (0.25, 0.1, "below 0.05"),
    ],
)
def test_temperature_beyond_what_is_sensible_is_none(factor, own, reason):
    answers = drawn(1.0)
    logits = (factor * answers.logits).astype(np.float32)
    found = calibration(Answers(logits, answers.labels, answers.index, answers.class_names, temperature=own))
    assert (found.fitted, found.after, found.ece_held_out) == (None, None, None) and reason in found.none_as
