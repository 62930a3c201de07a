"""The figures of a report, against scikit-learn on the same answers, and against what was planted in them."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn import metrics

from effnet_hf.analysis import Answers, measure
from effnet_hf.analysis.measure import summary
from effnet_hf.analysis.tables import write_tables
from effnet_hf.errors import UserError

from .some_answers import NAMES, one_label, several_labels


def read(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_figures_are_scikit_learns_on_the_predictions_file_to_the_last_digit(tmp_path):
    answers = one_label()
    figures = measure(answers, top_k=2)
    write_tables(tmp_path, answers, figures, [f"{i}.png" for i in range(len(answers))])
    rows = read(tmp_path / "predictions.csv")
    truth, given = [row["label"] for row in rows], [row["prediction"] for row in rows]
    present = sorted(set(truth))
    for average, found in (("macro", figures.macro), ("weighted", figures.weighted)):
        shares = metrics.precision_recall_fscore_support(truth, given, labels=present, average=average, zero_division=0)
        assert shares[:3] == (found.precision.value, found.recall.value, found.f1.value)
    per_class = metrics.precision_recall_fscore_support(truth, given, labels=present, zero_division=0)
    of = {each.name: each for each in figures.classes}
    for name, precision, recall, f1, n in zip(present, *per_class):
        found = of[name]
        assert (precision, recall, f1, n) == (found.precision.value, found.recall.value, found.f1.value, found.n)
        assert found.predicted == given.count(name)
    assert metrics.accuracy_score(truth, given) == figures.accuracy.value
    assert metrics.accuracy_score(truth, given) == np.mean([row["correct"] == "1" for row in rows])
    assert np.mean([int(row["rank"]) <= 2 for row in rows]) == figures.top_k_accuracy.value
    assert figures.top_k_accuracy.value == metrics.top_k_accuracy_score(
        answers.labels, answers.logits, k=2, labels=range(len(NAMES))
    )
    logits = answers.logits.astype(np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert np.allclose([float(row["probability"]) for row in rows], p.max(1), rtol=1e-12)
    assert np.allclose([float(row["second_probability"]) for row in rows], np.sort(p)[:, -2], rtol=1e-12)
    assert [row["second"] for row in rows] == [NAMES[i] for i in np.argsort(p)[:, -2]]
    assert -np.mean(np.log([float(row["label_probability"]) for row in rows])) == pytest.approx(
        figures.calibration.now.nll, rel=1e-12
    )
    table = {(row["label"], row["prediction"]): int(row["count"]) for row in read(tmp_path / "confusion.csv")}
    matrix = metrics.confusion_matrix(truth, given, labels=NAMES)
    assert {(NAMES[i], NAMES[j]): count for (i, j), count in np.ndenumerate(matrix) if count} == table
    written = read(tmp_path / "classes.csv")
    assert [(row["class"], float(row["f1_low"])) for row in written] == [(e.name, e.f1.low) for e in figures.classes]


def test_what_is_wrong_stands_first():
    figures = measure(one_label())
    assert figures.never_found == ["fox"]
    assert figures.classes[0].name == "fox" and figures.classes[0].recall.value == 0
    assert [each.name for each in figures.classes].count("eel") == 0 and figures.answered_only == ["eel"]
    recalls = [each.recall.value for each in figures.classes]
    assert recalls == sorted(recalls)
    counts = [each.count for each in figures.confusions]
    assert counts == sorted(counts, reverse=True) and all(each.label != each.prediction for each in figures.confusions)
    assert sum(counts) == figures.num_mistakes == len(figures.mistakes)
    n = {each.number: each.n for each in figures.classes}
    assert all(each.share == each.count / n[each.label] for each in figures.confusions)
    confident = [case.probability for case in figures.mistakes]
    assert confident == sorted(confident, reverse=True)
    assert all(case.answer != case.label == one_label().labels[case.position] for case in figures.mistakes)
    hits = [case.probability for case in figures.hits]
    assert hits == sorted(hits) and all(case.answer == case.label for case in figures.hits)
    assert len(hits) + len(confident) == figures.n
    json.dumps(figures.to_dict(), allow_nan=False)
    assert figures.to_dict()["mistakes"][0]["answer"] in NAMES


def test_summary_says_the_same():
    figures, short = measure(one_label()), summary(one_label())
    assert short["weighted_f1"] == pytest.approx(100 * figures.weighted.f1.value, abs=1e-12)
    assert (short["ece"], short["never_found"]) == (figures.calibration.now.ece, ["fox"])
    assert summary(several_labels()) == {}


def test_intervals_of_shares_are_wilsons():
    figures = measure(one_label())
    right = int((one_label().logits.argmax(1) == one_label().labels).sum())
    expected = binomtest(right, figures.n).proportion_ci(method="wilson")
    assert tuple(figures.accuracy)[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)
    fox = figures.classes[0]
    expected = binomtest(0, 6).proportion_ci(method="wilson")
    assert tuple(fox.recall)[1:] == pytest.approx((expected.low, expected.high), abs=1e-12)
    for each in figures.classes:
        for share in (each.precision, each.recall, each.f1):
            assert 0 <= share.low <= share.value <= share.high <= 1


def test_intervals_of_averages_are_a_bootstrap_of_the_images():
    answers = one_label()
    figures = measure(answers)
    assert figures.macro == measure(answers).macro  # the seed is fixed
    given, rng, found = answers.logits.argmax(1), np.random.default_rng(1), []
    for _ in range(1000):
        rows = rng.integers(0, len(given), len(given))
        truth = answers.labels[rows]
        matrix = np.zeros((6, 6))
        np.add.at(matrix, (truth, given[rows]), 1)
        there = matrix.sum(1) > 0
        f1 = 2 * matrix.diagonal() / np.maximum(matrix.sum(0) + matrix.sum(1), 1)
        found.append((f1[there].mean(), (f1 * matrix.sum(1)).sum() / matrix.sum()))
    low, high = np.quantile(found, [0.025, 0.975], axis=0).T.tolist()
    assert (figures.macro.f1.low, figures.macro.f1.high) == pytest.approx(low, abs=0.01)
    assert (figures.weighted.f1.low, figures.weighted.f1.high) == pytest.approx(high, abs=0.01)
    assert figures.weighted.recall.value == figures.accuracy.value


def test_swapped_labels_are_suspects():
    answers = one_label()
    answers.logits[np.arange(240), answers.labels] += 3
    rng = np.random.default_rng(0)
    swapped = rng.choice(np.flatnonzero(answers.labels < 3), 10, replace=False)
    labels = answers.labels.copy()
    labels[swapped] = (labels[swapped] + 1) % 3
    figures = measure(replace(answers, labels=labels))
    first = [case.position for case in figures.suspects[:20]]
    assert len(set(first) & set(swapped.tolist())) >= 8
    case = next(case for case in figures.suspects if case.position in swapped)
    assert case.label == labels[case.position] and case.answer == answers.labels[case.position]
    assert figures.num_suspects == len(figures.suspects) < 40


def test_suspects_do_not_depend_on_a_temperature_and_are_of_classes_that_are_known():
    answers = one_label()
    figures = measure(answers)
    assert figures.suspects_left_out > 0 and figures.to_dict()["suspects_left_out"] == figures.suspects_left_out
    given = figures.per_image.prediction
    for case in figures.suspects:  # not of the 6 foxes, never found; the suggestion is the answer, which is likeliest
        assert NAMES.index("fox") not in (case.label, case.answer) and case.answer == given[case.position]
    for temperature in (0.2, 3.0):
        same = measure(replace(answers, logits=answers.logits / np.float32(temperature), temperature=temperature))
        assert [case[:3] for case in same.suspects] == [case[:3] for case in figures.suspects]
        assert same.suspects_left_out == figures.suspects_left_out
        case = same.suspects[0]  # what is said of it is the network's own
        assert case.probability == same.per_image.probability[case.position]
        assert case.label_probability == same.per_image.label_probability[case.position]


@pytest.mark.parametrize("images, left_out", [(4, 1), (5, 0)])
def test_few_images_say_nothing_of_their_labels(images, left_out):
    labels = np.repeat([0, 1], [20, images])
    logits = np.where(np.eye(2)[labels] > 0, 2, -2).astype(np.float32)
    logits[0] = -4, 4  # a zero that is a one
    figures = measure(Answers(logits, labels, np.arange(len(labels)), NAMES[:2]))
    assert (figures.num_suspects, figures.suspects_left_out) == (1 - left_out, left_out)


def test_few_answers_are_left_out_first_where_they_are_unsure():
    coverage = measure(one_label()).coverage
    assert coverage[-1, 0] == 1 and coverage[-1, 1] == measure(one_label()).accuracy.value
    assert (np.diff(coverage[:, 0]) > 0).all() and (np.diff(coverage[:, 2]) <= 0).all()
    assert coverage[coverage[:, 0] < 0.3, 1].mean() > coverage[-1, 1] + 0.05
    share, accuracy, least = coverage[49]
    answers = one_label()
    p = measure(answers).per_image.probability
    assert share == np.mean(p >= least) and accuracy == np.mean(measure(answers).per_image.correct[p >= least])


def test_ruled_out_classes_have_no_probability():
    answers = one_label()
    logits = answers.logits.copy()
    logits[:, 4] = -np.inf
    figures = measure(replace(answers, logits=logits))
    assert figures.answered_only == [] and np.isfinite(figures.calibration.now.nll)
    assert figures.calibration.fitted is not None and np.isneginf(logits[:, 4]).all()


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes_and_few_images(classes):
    answers = Answers(np.zeros((1, classes), np.float32), np.zeros(1, np.int64), np.zeros(1, np.int64), NAMES[:classes])
    figures = measure(answers)
    assert figures.accuracy.value == 1 and figures.accuracy.low == pytest.approx(0.2065, abs=1e-4)
    assert figures.calibration.fitted is None and figures.per_image.prediction.tolist() == [0]  # of equals the first
    json.dumps(figures.to_dict(), allow_nan=False)


def test_no_image_is_refused():
    with pytest.raises(UserError, match="no image to measure"):
        measure(Answers(np.zeros((0, 2), np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64), NAMES[:2]))


def test_several_labels_against_scikit_learn(tmp_path):
    answers = several_labels()
    figures = measure(answers)
    write_tables(tmp_path, answers, figures, [str(i) for i in range(80)])
    rows = read(tmp_path / "predictions.csv")
    truth = np.array([[int(row[f"label {name}"]) for name in NAMES] for row in rows])
    p = np.array([[float(row[f"probability {name}"]) for name in NAMES] for row in rows])
    given, there = (p >= answers.thresholds).astype(int), truth.any(0)
    for average, found in (("macro", figures.macro), ("weighted", figures.weighted)):
        shares = metrics.precision_recall_fscore_support(
            truth[:, there], given[:, there], average=average, zero_division=0
        )
        assert shares[:3] == (found.precision.value, found.recall.value, found.f1.value)
    precision = metrics.average_precision_score(truth[:, there], p[:, there], average=None)
    assert {each.name: each.average_precision for each in figures.classes} == dict(
        zip(np.array(NAMES)[there].tolist(), precision.tolist())
    )
    assert figures.mean_average_precision == pytest.approx(precision.mean(), abs=1e-15)
    assert figures.num_mistakes == (truth != given).sum() == len(figures.mistakes)
    for case in figures.mistakes:
        assert (case.label == -1) != (case.answer == -1)
        number = max(case.label, case.answer)
        assert truth[case.position, number] == (case.label >= 0) and given[case.position, number] == (case.answer >= 0)
        assert case.probability == pytest.approx(1 - case.label_probability)
    assert (figures.accuracy, figures.calibration, figures.confusions) == (None, None, [])
    assert not (tmp_path / "confusion.csv").exists()
    assert all(row["suggestion"].removeprefix("not ") in NAMES for row in read(tmp_path / "suspects.csv"))
    json.dumps(figures.to_dict(), allow_nan=False)


def test_several_labels_of_which_one_class_has_images():
    answers = several_labels()
    labels = answers.labels * np.array([1, 0, 0, 0, 0, 0], np.uint8)
    figures = measure(replace(answers, labels=labels))
    given = 1 / (1 + np.exp(-answers.logits[:, 0].astype(float))) >= 0.5
    assert figures.macro.f1.value == metrics.f1_score(labels[:, 0], given)
    with pytest.raises(UserError, match="none of the validation images has a label"):
        measure(replace(answers, labels=np.zeros_like(labels)))


def test_planted_faults_in_several_labels_are_suspects():
    answers = several_labels()
    logits = (40.0 * answers.labels - 20).astype(np.float32) + answers.logits
    labels = answers.labels.copy()
    for image, number in ((3, 0), (10, 1), (40, 3)):
        labels[image, number] ^= 1
    labels[5, 4], logits[5, 4] = 1, -40  # the only eel: nothing can be said of it
    figures = measure(replace(answers, logits=logits, labels=labels))
    assert {(case.position, max(case.label, case.answer)) for case in figures.suspects} == {(3, 0), (10, 1), (40, 3)}
    assert figures.suspects_left_out == 1
