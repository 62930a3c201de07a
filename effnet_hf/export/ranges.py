"""Ranges for the tensors that training gave none: 8 bits spent where the error after the activation is smallest.

A convolution's output goes through SiLU, which is nearly 0 below -6: steps are wasted on a long negative tail, and a
range from the smallest to the largest value costs points of accuracy. Per tensor, low and high are searched for the
least squared error *after* the activation, over a histogram of what the calibration pictures gave.
"""

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx

from ..errors import UserError
from .runners import onnxruntime_session


BINS = 4096
Activation = Callable[[np.ndarray], np.ndarray]


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x.clip(-80)))


def identity(x: np.ndarray) -> np.ndarray:
    return x


def search_ranges(
    model: onnx.ModelProto, tensors: Mapping[str, Activation], batches: Iterable[np.ndarray]
) -> dict[str, tuple[float, int]]:
    """Scale and zero point (uint8) of each tensor.

    Args:
        model: the float graph.
        tensors: names in it, with the function that follows each.
        batches: `pixel_values`; read twice.

    Raises:
        UserError: a tensor is not finite, as those of a diverged training.
    """
    if not tensors:
        return {}
    observed = onnx.ModelProto()
    observed.CopyFrom(model)
    names = list(tensors)
    observed.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime_session(observed.SerializeToString())
    fed, batches = session.get_inputs()[0].name, list(batches)
    lows, highs = np.full(len(names), np.inf), np.full(len(names), -np.inf)
    for batch in batches:
        for i, values in enumerate(session.run(names, {fed: batch})):
            if not np.isfinite(values).all():
                raise UserError(f"the network gives NaN or infinity at {names[i]}: its training has diverged.")
            lows[i], highs[i] = min(lows[i], values.min()), max(highs[i], values.max())
    counts = np.zeros((len(names), BINS))
    for batch in batches:
        for i, values in enumerate(session.run(names, {fed: batch})):
            counts[i] += np.histogram(values, BINS, (lows[i], highs[i]))[0]
    found = {}
    for name, low, high, count in zip(names, lows, highs, counts):
        edges = np.linspace(low, high, BINS + 1)
        found[name] = _best((edges[1:] + edges[:-1]) / 2, count, tensors[name])
    return found


def _best(values: np.ndarray, counts: np.ndarray, activation: Activation) -> tuple[float, int]:
    wanted = activation(values)
    low, high = min(values[0], 0.0), max(values[-1], 0.0)
    near = -np.arange(0.25, 8.25, 0.25)  # where SiLU's minimum and its way back to 0 lie, however long the tail
    lows = np.concatenate([low * np.linspace(0.3, 1, 24), near[near > low]])
    best = np.inf, 1.0, 0
    for least in lows:
        for most in high * np.linspace(0.3, 1, 36):
            scale = max((most - least) / 255, 1e-12)
            zero = int(np.clip(np.rint(-least / scale), 0, 255))
            rounded = ((np.rint(values / scale) + zero).clip(0, 255) - zero) * scale
            error = float(counts @ np.square(activation(rounded) - wanted))
            best = min(best, (error, scale, zero))
    return best[1:]
