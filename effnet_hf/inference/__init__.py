"""Images in, class names and probabilities out: one by one through transformers' pipeline, or whole folders into a file
of predictions through the loaders of training."""

from .classifier import Classifier, Prediction, find_device, told
from .drawing import PLOT_FORMATS, draw_predictions
from .predictions import PREDICTION_FORMATS, Predicted, write_predictions


__all__ = [
    "PLOT_FORMATS",
    "PREDICTION_FORMATS",
    "Classifier",
    "Predicted",
    "Prediction",
    "draw_predictions",
    "find_device",
    "told",
    "write_predictions",
]
