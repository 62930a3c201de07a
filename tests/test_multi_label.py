"""The figures of several labels per image are scikit-learn's, and thresholds are the best there are."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score

from effnet_hf import EfficientNetNVConfig
from effnet_hf.errors import UserError
from effnet_hf.multi_label import (
    LEAST_POSITIVES,
    choose_thresholds,
    figure_names,
    macro_f1,
    mean_average_precision,
    require_same_task,
)


def answers(images=60, classes=5, seed=0):
    """Probabilities with ties, and targets that follow them loosely; the last class has no image."""
    rng = np.random.default_rng(seed)
    scores = rng.random((images, classes)).round(2)
    targets = (scores + rng.normal(0, 0.3, scores.shape) > 0.6).astype(int)
    targets[:, -1] = 0
    return scores, targets


def test_figures_are_the_means_over_the_classes_that_have_an_image():
    scores, targets = answers()
    thresholds = np.array([0.3, 0.4, 0.5, 0.6, 0.5])
    with_images = targets[:, :-1], scores[:, :-1]
    assert mean_average_precision(scores, targets) == pytest.approx(100 * average_precision_score(*with_images))
    expected = f1_score(targets[:, :-1], scores[:, :-1] >= thresholds[:-1], average="macro")
    assert macro_f1(scores, targets, thresholds) == pytest.approx(100 * expected)


def test_a_single_class_is_one_class_and_not_two():
    scores, targets = answers(classes=2)
    scores, targets = scores[:, :1], targets[:, :1]
    assert mean_average_precision(scores, targets) == pytest.approx(100 * average_precision_score(targets, scores))
    assert macro_f1(scores, targets, np.array([0.5])) == pytest.approx(
        100 * f1_score(targets[:, 0], scores[:, 0] >= 0.5)
    )


def test_nothing_to_measure_is_one_sentence():
    with pytest.raises(UserError, match="none of the validation images has a label"):
        mean_average_precision(np.zeros((3, 2)), np.zeros((3, 2), int))


def f1(target, found):
    return 2 * (target * found).sum() / max(target.sum() + found.sum(), 1)


def test_no_threshold_is_better_than_the_chosen_one():
    scores, targets = answers(images=80)
    chosen = choose_thresholds(scores, targets)
    for target, column, threshold in zip(targets.T[:4], scores.T, chosen):
        best = max(f1(target, column >= edge) for edge in np.linspace(0, 1, 401))
        assert f1(target, column >= threshold) == pytest.approx(best)
        assert threshold not in column  # rounding of another machine moves no image over it
    assert chosen[4] == 0.5


@pytest.mark.parametrize(
    ("scores", "targets", "expected"),
    [
        ([0.1] * 5 + [0.3] * 5, [0] * 5 + [1] * 5, 0.2),  # in the middle between both
        ([0.1] * 5 + [0.9] * 5, [0] * 5 + [1] * 5, 0.5),  # 0.5 does it
        ([0.1] * 5 + [0.3] * 4, [0] * 5 + [1] * 4, 0.5),  # too few images
        ([0.4] * 9, [1] * 9, 0.2),  # all have it: whatever is below
    ],
)
def test_thresholds_by_hand(scores, targets, expected):
    assert LEAST_POSITIVES == 5
    assert choose_thresholds(np.array([scores]).T, np.array([targets]).T) == [pytest.approx(expected)]


def test_each_kind_of_network_wants_its_own_kind_of_data():
    one = EfficientNetNVConfig(num_labels=3)
    several = EfficientNetNVConfig(num_labels=3, problem_type="multi_label_classification")
    assert figure_names(one, 3) == ("top1", "top3") and figure_names(several, 3) == ("map", "f1")
    require_same_task(one, False, "")
    require_same_task(several, True, "")
    with pytest.raises(UserError, match="^--model a was trained with one label per image, and the data has several"):
        require_same_task(one, True, "--model a")
    with pytest.raises(UserError, match="add --problem_type multi_label_classification"):
        require_same_task(several, False, "--model a")
