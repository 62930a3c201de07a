"""Several labels per image: what a network's answers mean, and the figures that say how good they are.

The arithmetic is scikit-learn's. Targets are 0 and 1, (images, classes); scores are logits or probabilities.
"""

import numpy as np
import torch

from .configuration import EfficientNetNVConfig
from .errors import UserError


MULTI_LABEL = "multi_label_classification"
LEAST_POSITIVES = 5  # a class with fewer validation images says too little of where its threshold should be


def is_multi_label(config: EfficientNetNVConfig) -> bool:
    """Whether the classes do not exclude each other: each has a probability of its own, by a sigmoid."""
    return config.problem_type == MULTI_LABEL


def probabilities(logits: torch.Tensor, config: EfficientNetNVConfig) -> torch.Tensor:
    """Of logits (N, classes): by sigmoid for several labels per image, else by softmax."""
    return logits.sigmoid() if is_multi_label(config) else logits.softmax(-1)


def thresholds_of(config: EfficientNetNVConfig) -> np.ndarray:
    """Float64, one per class; 0.5 where none were chosen."""
    return np.full(config.num_labels, 0.5) if config.thresholds is None else np.asarray(config.thresholds, np.float64)


def figure_names(config: EfficientNetNVConfig, top_k: int) -> tuple[str, str]:
    """The two figures of a validation beside its loss, in percent. The first decides which model is best, unless
    `--select_best` names another."""
    return ("map", "f1") if is_multi_label(config) else ("top1", f"top{top_k}")


def shown(figure: str) -> str:
    """A figure's name as it is printed."""
    return {"map": "mAP", "f1": "F1", "macro_recall": "macro recall", "macro_f1": "macro F1"}.get(figure, figure)


def require_same_task(config: EfficientNetNVConfig, several: bool, where: str) -> None:
    """Refuses to measure a network on data of another kind.

    Args:
        several: whether the data has several labels per image.
        where: what names the network, e.g. "--model runs/a".

    Raises:
        UserError: one of them has one label per image, the other several.
    """
    if is_multi_label(config) and not several:
        raise UserError(
            f"{where} was trained with several labels per image, and the data has one; to take it for images with that"
            f" label only, add --problem_type {MULTI_LABEL}."
        )
    if several and not is_multi_label(config):
        raise UserError(
            f"{where} was trained with one label per image, and the data has several; fine-tune it on such data first."
        )


def mean_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """Percent: the mean of the average precision of the classes that have an image; the others have none.

    Raises:
        UserError: no image has a label.
    """
    from sklearn.metrics import average_precision_score

    return 100 * float(average_precision_score(*_measured(targets, scores)))


def macro_f1(probabilities: np.ndarray, targets: np.ndarray, thresholds: np.ndarray) -> float:
    """Percent: the mean of F1 at the thresholds, over the classes that have an image.

    Raises:
        UserError: no image has a label.
    """
    from sklearn.metrics import f1_score

    truth, answers = _measured(targets, (probabilities >= thresholds).astype(targets.dtype))
    return 100 * float(f1_score(truth, answers, average="macro" if truth.ndim == 2 else "binary", zero_division=0))


def _measured(targets: np.ndarray, answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The columns of the classes that have an image; a single one as a list, or scikit-learn would take 0 and 1 for two
    classes."""
    columns = np.flatnonzero(targets.any(0))
    if not len(columns):
        raise UserError("none of the validation images has a label, so there is nothing to measure.")
    one = columns[0] if len(columns) == 1 else columns
    return targets[:, one], answers[:, one]


def choose_thresholds(probabilities: np.ndarray, targets: np.ndarray) -> list[float]:
    """For each class the threshold with the best F1 on these images.

    Of all that give the same answers it is 0.5, or the middle between two images' probabilities; of several that are as
    good, the nearest to 0.5. A class with fewer than `LEAST_POSITIVES` images keeps 0.5.
    """
    from sklearn.metrics import precision_recall_curve

    chosen = np.full(targets.shape[1], 0.5)
    for i in np.flatnonzero(targets.sum(0) >= LEAST_POSITIVES):
        precision, recall, edges = precision_recall_curve(targets[:, i], probabilities[:, i])
        harmonic = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        below = np.concatenate([[0.0], edges[:-1]])
        candidates = np.where((below < 0.5) & (edges >= 0.5), 0.5, (below + edges) / 2)
        best = np.flatnonzero(harmonic[: len(edges)] >= harmonic[: len(edges)].max() - 1e-12)
        chosen[i] = candidates[best[np.abs(candidates[best] - 0.5).argmin()]]
    return chosen.tolist()
