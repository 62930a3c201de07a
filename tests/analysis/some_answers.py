"""Answers of a network that there is not: right for most images, of classes of unequal sizes, one never found."""

import numpy as np

from effnet_hf.analysis import Answers


NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]


def one_label(seed: int = 0, surer: float = 1.0) -> Answers:
    """Of 240 images: no eel has an image, and each of the 6 foxes is taken for something else.

    Args:
        surer: multiplies all logits.
    """
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1, 2, 3, 5], [120, 60, 40, 14, 6])
    logits = rng.normal(size=(len(labels), len(NAMES))).astype(np.float32)
    logits[np.arange(len(labels)), labels] += 2
    logits[labels == 5, 5] = -9
    return Answers(surer * logits, labels, np.arange(len(labels)), NAMES)


def several_labels(seed: int = 0) -> Answers:
    """Of 80 images, no eel among them."""
    rng = np.random.default_rng(seed)
    labels = (rng.random((80, len(NAMES))) < [0.5, 0.3, 0.2, 0.4, 0.0, 0.1]).astype(np.uint8)
    logits = (rng.normal(size=labels.shape) + 3 * labels - 1.5).astype(np.float32)
    return Answers(logits, labels, np.arange(80), NAMES, np.array([0.5, 0.4, 0.6, 0.5, 0.5, 0.3]))
