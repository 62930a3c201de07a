"""Accuracy, speed and latency figures mean what their names say."""

import csv
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.metrics import average_precision_score, f1_score, recall_score

from effnet_hf import EfficientNetNVConfig
from effnet_hf.analysis import Answers, measure
from effnet_hf.analysis.tables import write_tables
from effnet_hf.errors import UserError
from effnet_hf.training import TopKAccuracy
from effnet_hf.training.metrics import (
    Accuracy,
    LatencyMeter,
    SeveralLabels,
    Speed,
    deciding_figure,
    percentiles,
    topk_correct,
)


def test_topk_counts_by_hand():
    logits = torch.tensor([[0.1, 0.5, 0.4], [0.9, 0.05, 0.05], [0.2, 0.3, 0.5]])
    labels = torch.tensor([2, 0, 0])
    assert topk_correct(logits, labels, (1, 2, 5)).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    "logits",
    [
        torch.zeros(64, 7),
        torch.full((64, 7), -3.5),
        torch.randn(64, 7, generator=torch.Generator().manual_seed(0)).mul(0.01).add(1).bfloat16(),  # 7 of 256 values
        torch.randn(64, 7, generator=torch.Generator().manual_seed(0)),  # no two are equal
    ],
    ids=["zeros", "constant", "bf16", "distinct"],
)
def test_of_equal_answers_the_first_is_best_everywhere(logits, tmp_path):
    labels = torch.arange(64) % 7
    answers = Answers(logits.float().numpy(), labels.numpy(), np.arange(64), list("abcdefg"))
    figures, report = Accuracy(3, torch.device("cpu")), measure(answers, top_k=3)
    write_tables(tmp_path, answers, report, list("x" * 64))
    with open(tmp_path / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    figures.add(logits, labels)
    right, among, _ = figures.sums.tolist()
    assert right == sum(int(row["correct"]) for row in rows) == (logits.argmax(1) == labels).sum()
    assert (right / 64, among / 64) == (report.accuracy.value, report.top_k_accuracy.value)
    assert topk_correct(logits, labels, (2, 9)).tolist() == [sum(int(row["rank"]) <= 2 for row in rows), 64]
    if logits.unique().numel() == logits.numel():
        assert among == (logits.topk(3).indices == labels[:, None]).sum()


def test_a_label_without_a_number_is_not_right():
    logits = torch.tensor([[torch.nan, torch.nan], [torch.nan, 1.0]])
    assert topk_correct(logits, torch.tensor([0, 1]), (1,)).tolist() == [0]


def test_evaluate_metric_agrees_with_scikit_learn_offline():
    from sklearn.metrics import top_k_accuracy_score

    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(50, 7)), rng.integers(0, 7, 50)
    for k in (1, 3):
        expected = top_k_accuracy_score(labels, scores, k=k, labels=range(7))
        assert TopKAccuracy().compute(predictions=scores, references=labels, k=k) == {
            f"top{k}": pytest.approx(expected)
        }


def test_latency_meter_leaves_warm_up_out():
    meter = LatencyMeter(torch.device("cpu"))
    for pause in (0.05, 0.001, 0.001):
        with meter:
            time.sleep(pause)
    assert len(meter.milliseconds()) == 3 and meter.milliseconds(warmup=1).max() < 40 < meter.milliseconds().max()
    assert len(meter.milliseconds(warmup=9)) == 3


def test_percentiles_are_ordered_and_in_the_series():
    figures = percentiles(np.arange(1.0, 102.0))
    assert figures == {"p50": 51, "p95": 96, "p99": 100, "mean": 51, "max": 101}


def test_speed_separates_waiting_from_computing():
    def loader():
        for _ in range(6):
            time.sleep(0.02)
            yield object()

    speed = Speed(10, torch.device("cpu"))
    for _ in speed.watch(loader()):
        time.sleep(0.01)
        speed.count_update()
    figures = speed.figures()
    assert 0.018 < figures["train.data_time"] < 0.04 and 0.008 < figures["train.compute_time"] < 0.02
    assert figures["train.total_ips"] < figures["train.compute_ips"]
    assert speed.figures() == {}


def test_speed_adds_windows_up_to_the_epoch():
    speed = Speed(1, torch.device("cpu"))
    windows = []
    for step, _ in enumerate(speed.watch(range(8))):
        time.sleep(0.001)
        speed.count_update()
        if step in (4, 7):
            windows.append(speed.figures())
    counted = 3 * windows[0]["train.data_time"] + 3 * windows[1]["train.data_time"]
    assert speed.epoch_waited == pytest.approx(counted) and 0 < speed.epoch_waited < speed.epoch_elapsed


def test_on_cuda_the_wait_for_data_is_the_devices(monkeypatch):
    """The host waits for every batch; the device computes for 4 units a step and each batch is there before that."""
    clock = {"device": 0.0, "batch": 0.0}

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            self.at = clock["device"] = max(clock["device"], clock["batch"])

        def elapsed_time(self, end):
            return end.at - self.at

    def loader(every):
        for number in range(8):
            clock["batch"] = every * number
            yield object()

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for every, expected in ((1.0, 0.0), (6.0, 0.002)):  # milliseconds a batch; the second loader is too slow
        clock.update(device=0.0, batch=0.0)
        speed = Speed(1, torch.device("cuda"))
        for _ in speed.watch(loader(every)):
            clock["device"] += 4.0
            speed.count_update()
        assert speed.figures()["train.data_time"] == pytest.approx(expected)


def test_answers_of_several_processes_are_counted_once_each():
    config = EfficientNetNVConfig(num_labels=2, problem_type="multi_label_classification", thresholds=[0.4, 0.6])
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 2, generator=generator), torch.tensor([[1, 0], [0, 1], [1, 1], *[[0, 0]] * 4])
    alone = SeveralLabels(config, torch.device("cpu"))
    parts = [SeveralLabels(config, torch.device("cpu")) for _ in range(3)]  # of 4, 3 and no images
    for start, stop, part in ((0, 4, 0), (4, 7, 1)):
        for meter in (alone, parts[part]):
            meter.add(logits[start:stop], targets[start:stop].float())
    rows = [torch.cat(part.rows) for part in parts]
    padded = [torch.nn.functional.pad(each, (0, 0, 0, 4 - len(each)), value=float("nan")) for each in rows]
    three = SimpleNamespace(
        pad_across_processes=lambda rows, pad_index: padded[0], gather=lambda rows: torch.cat(padded)
    )
    one = SimpleNamespace(pad_across_processes=lambda rows, pad_index: rows, gather=lambda rows: rows)
    figures = alone.figures(one, choose=False)
    assert parts[0].figures(three, choose=False) == figures
    assert figures["map"] == pytest.approx(100 * average_precision_score(targets, logits))
    found = logits.sigmoid() >= torch.tensor([0.4, 0.6])
    assert figures["f1"] == pytest.approx(100 * f1_score(targets, found, average="macro"))
    alone.figures(one, choose=True)
    assert config.thresholds == [0.5, 0.5]  # too few images


def test_means_over_classes_are_scikit_learns_over_the_classes_that_have_images():
    rng = np.random.default_rng(1)
    labels, logits = rng.choice([0, 2, 3], 200, p=[0.9, 0.08, 0.02]), rng.normal(size=(200, 5))
    logits[np.arange(200), labels] += 1.0
    answers = Accuracy(2, torch.device("cpu"))
    for rows in np.split(np.arange(200), [64, 128]):
        answers.add(torch.tensor(logits[rows]), torch.tensor(labels[rows]))
    figures = answers.figures(Accelerator(cpu=True), choose=False)
    found = logits.argmax(1)
    assert set(found) > {0, 2, 3}  # answers of absent classes cost recall, and are no classes of their own
    for name, score in (("macro_recall", recall_score), ("macro_f1", f1_score)):
        assert figures[name] == 100 * score(labels, found, labels=[0, 2, 3], average="macro", zero_division=0)
    assert list(figures) == ["top1", "top2", "macro_recall", "macro_f1"]


def test_a_class_that_is_never_found_shows():
    answers = Accuracy(1, torch.device("cpu"))
    answers.add(torch.tensor([[1.0, 0.0]]).expand(39, 2), torch.tensor([0] * 36 + [1] * 3))
    figures = answers.figures(Accelerator(cpu=True), choose=False)
    assert figures["top1"] == pytest.approx(92.3077) and figures["macro_recall"] == 50
    assert figures["macro_f1"] == pytest.approx(48)


@pytest.mark.parametrize(
    "several, default, wrong", [(False, "top1", ("map", "f1")), (True, "map", ("top1", "macro_f1"))]
)
def test_the_deciding_figure_is_one_that_the_data_has(several, default, wrong):
    assert deciding_figure(None, several) == default and deciding_figure("loss", several) == "loss"
    for name in wrong:
        with pytest.raises(UserError, match=f"--select_best {name}: the data has .*; choose one of {default}"):
            deciding_figure(name, several)
