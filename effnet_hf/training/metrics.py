"""Accuracy on the device, latency percentiles, and an `evaluate` metric that needs no network."""

import time

import datasets
import evaluate
import numpy as np
import torch
from torch.nn import functional

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..multi_label import choose_thresholds, macro_f1, mean_average_precision, thresholds_of


def topk_correct(logits: torch.Tensor, labels: torch.Tensor, ks: tuple[int, ...]) -> torch.Tensor:
    """How many labels (N,) are among the k best of logits (N, classes), for each k. Of equal ones the first is best, as
    in `argmax` and in a report; `topk` takes any."""
    label = labels[:, None]
    own = logits.gather(-1, label)
    later = torch.arange(logits.shape[-1], device=logits.device) > label
    beaten = (own > logits) | (own == logits) & later  # by the label; NaN is not
    rank = logits.shape[-1] - beaten.sum(-1, dtype=torch.int32)
    return torch.stack([(rank <= k).sum() for k in ks])


class Accuracy:
    """Top-1, top-k and the means of recall and F1 over the classes that have an image, of a validation, percent.

    Accuracies are summed on the device; label and answer of every image are kept, for the means.
    """

    def __init__(self, top_k: int, device: torch.device):
        self.top_k = top_k
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-k, images
        self.pairs = [torch.empty((0, 2), dtype=torch.int64, device=device)]  # label, answer

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Counts a batch, (N, classes) and (N,), and returns the sum of its losses."""
        self.sums[:2] += topk_correct(logits, labels, (1, self.top_k))
        self.sums[2] += len(labels)
        self.pairs.append(torch.stack([labels, logits.argmax(-1)], 1))
        return functional.cross_entropy(logits, labels, reduction="sum")

    def figures(self, accelerator, choose: bool) -> dict[str, float]:
        """Of all processes; a collective call."""
        from sklearn.metrics import f1_score, recall_score

        right, among, images = accelerator.reduce(self.sums, reduction="sum").tolist()
        pairs = accelerator.gather(accelerator.pad_across_processes(torch.cat(self.pairs), pad_index=-1)).cpu().numpy()
        labels, answers = pairs[pairs[:, 0] >= 0].T
        over = {"labels": np.unique(labels), "average": "macro", "zero_division": 0}
        return {
            "top1": 100 * right / images,
            f"top{self.top_k}": 100 * among / images,
            "macro_recall": 100 * float(recall_score(labels, answers, **over)),
            "macro_f1": 100 * float(f1_score(labels, answers, **over)),
        }


def deciding_figure(select_best: str | None, several: bool) -> str:
    """The figure of a validation that decides which model is best: `--select_best`, or top-1 or mAP.

    Args:
        several: whether the data has several labels per image.

    Raises:
        UserError: that data has no such figure.
    """
    allowed = ("map", "f1", "loss") if several else ("top1", "macro_recall", "macro_f1", "loss")
    if select_best is not None and select_best not in allowed:
        kind = "several labels per image" if several else "one label per image"
        raise UserError(f"--select_best {select_best}: the data has {kind}; choose one of {', '.join(allowed)}.")
    return select_best or allowed[0]


class SeveralLabels:
    """mAP and F1 of a validation, percent. They are no sums: the answers to all images are kept, 8 bytes a class.

    Args:
        config: its `thresholds` are used, and changed by `figures(choose=True)`.
    """

    def __init__(self, config: EfficientNetNVConfig, device: torch.device):
        self.config = config
        self.rows = [torch.empty((0, 2 * config.num_labels), device=device)]  # logits and targets, on the device

    def add(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Keeps a batch, both float (N, classes), and returns the sum of its images' losses."""
        self.rows.append(torch.cat([logits, targets], 1))
        return functional.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1).sum()

    def figures(self, accelerator, choose: bool) -> dict[str, float]:
        """Of all processes; a collective call.

        Args:
            choose: the thresholds that are best for these images, instead of the network's own.

        Raises:
            UserError: no image has a label.
        """
        rows = accelerator.pad_across_processes(torch.cat(self.rows), pad_index=float("nan"))
        rows = accelerator.gather(rows)
        logits, targets = rows[~rows[:, 0].isnan()].double().cpu().chunk(2, dim=1)
        scores, found = logits.sigmoid().numpy(), targets.numpy().astype(np.int64)
        precision = mean_average_precision(logits.numpy(), found)
        if choose:
            self.config.thresholds = choose_thresholds(scores, found)
        return {"map": precision, "f1": macro_f1(scores, found, thresholds_of(self.config))}


class TopKAccuracy(evaluate.Metric):
    """Top-k accuracy for the `evaluate` library, offline: `evaluate.load("accuracy")` asks the Hub even when cached.

    >>> metric = TopKAccuracy()
    >>> metric.compute(predictions=[[0.1, 0.7, 0.2]], references=[2], k=2)
    {'top2': 1.0}
    """

    def _info(self):
        features = {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description="Share of references among the k highest-scoring classes.",
            citation="",
            inputs_description="predictions: logits or probabilities (N, classes); references: class indices (N,).",
            features=datasets.Features(features),
        )

    def _compute(self, predictions, references, k: int = 1):
        logits, labels = torch.as_tensor(np.asarray(predictions)), torch.as_tensor(np.asarray(references))
        return {f"top{k}": topk_correct(logits, labels, (k,)).item() / len(labels)}


class LatencyMeter:
    """Times steps without stopping the device: CUDA events on a GPU, the clock elsewhere. Milliseconds."""

    def __init__(self, device: torch.device):
        self.on_cuda = device.type == "cuda"
        self.marks: list[tuple] = []

    def _now(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self):
        self.start = self._now()

    def __exit__(self, *_):
        self.marks.append((self.start, self._now()))

    def milliseconds(self, warmup: int = 0) -> np.ndarray:
        """One figure per step, the first `warmup` left out where at least one remains."""
        marks = self.marks[warmup:] or self.marks
        if self.on_cuda:
            torch.cuda.synchronize()
            return np.array([start.elapsed_time(end) for start, end in marks])
        return np.array([1e3 * (end - start) for start, end in marks])


def percentiles(milliseconds: np.ndarray) -> dict[str, float]:
    """Mean, p50, p95, p99 and maximum of a latency series, in milliseconds."""
    figures = np.percentile(milliseconds, [50, 95, 99]) if len(milliseconds) else [float("nan")] * 3
    names = ("p50", "p95", "p99")
    extremes = {"mean": float(np.mean(milliseconds)), "max": float(np.max(milliseconds))} if len(milliseconds) else {}
    return {**{name: float(value) for name, value in zip(names, figures)}, **extremes}


class LossMeter:
    """Mean loss of an epoch and since the last look, summed on the device so that no step waits for the host."""

    def __init__(self, accelerator, total: float = 0.0, count: int = 0, seen: tuple[float, int] = (0.0, 0)):
        self.accelerator = accelerator
        self.sum = torch.tensor(total, dtype=torch.float64, device=accelerator.device)
        self.count, self.seen = count, seen

    def add(self, loss: torch.Tensor) -> None:
        self.sum += loss.detach()
        self.count += 1

    def spoil(self, flaw: torch.Tensor) -> None:
        """Adds 0, or NaN, which every process then sees in `total`."""
        self.sum += flaw

    def total(self) -> float:
        """The sum so far, averaged over processes. Waits for the device; a collective call."""
        return self.accelerator.reduce(self.sum.clone(), reduction="mean").item()

    def recent(self) -> float:
        """Mean since the last call of `recent`."""
        total, (before, count) = self.total(), self.seen
        self.seen = (total, self.count)
        return (total - before) / max(self.count - count, 1)


class Speed:
    """Images per second and where the time goes, without stopping the device; the first steps are not counted.

    The wait for data is the device's: from the end of one step's work to the arrival of the next batch. The host would
    be no witness on CUDA: it runs ahead of the device and waits for every batch of a loader that is fast enough.
    """

    WARMUP = 2

    def __init__(self, images_per_update: int, device: torch.device):
        self.images = images_per_update
        self.waits = LatencyMeter(device)
        self.updates, self.started = -self.WARMUP, time.perf_counter()
        self.epoch_waited, self.epoch_elapsed = 0.0, 0.0

    def watch(self, batches):
        """Passes batches through and adds up the time spent waiting for them."""
        iterator = iter(batches)
        while True:
            with self.waits:
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def count_update(self) -> None:
        self.updates += 1
        if self.updates == 0:
            self._restart()

    def figures(self) -> dict[str, float]:
        """Per optimizer step since the last call; empty while warming up."""
        if self.updates <= 0:
            return {}
        waited = self.waits.milliseconds().sum() / 1e3
        elapsed = time.perf_counter() - self.started
        computing = max(elapsed - waited, 1e-9)
        figures = {
            "train.total_ips": self.images * self.updates / elapsed,
            "train.compute_ips": self.images * self.updates / computing,
            "train.data_time": waited / self.updates,
            "train.compute_time": computing / self.updates,
        }
        self.epoch_waited += waited
        self.epoch_elapsed += elapsed
        self._restart()
        return figures

    def _restart(self) -> None:
        self.waits.marks.clear()
        self.updates, self.started = 0, time.perf_counter()
