"""A Core ML program computed in PyTorch, float32, operation by operation as it lies in the saved package.

Core ML itself runs on macOS only, and coremltools has no other way to compute a program. These are the operations that
our networks become; another one is an error, not a guess.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from coremltools.converters.mil.frontend.milproto.load import load


def _tensor(value) -> torch.Tensor:
    return torch.from_numpy(np.array(value, np.float32))


def _conv(x, weight, bias=None, strides=(1, 1), dilations=(1, 1), groups=1, pad_type="valid", pad=(0, 0, 0, 0)):
    if pad_type == "custom":  # top, bottom, left, right
        x = F.pad(x, (pad[2], pad[3], pad[0], pad[1]))
    elif pad_type != "valid":
        raise NotImplementedError(f"a convolution with pad_type {pad_type}")
    return F.conv2d(x, weight, bias, tuple(strides), 0, tuple(dilations), int(groups))


def _pad(x, pad, mode="constant", constant_val=0.0):
    if mode != "constant":
        raise NotImplementedError(f"a pad with mode {mode}")
    pairs = np.array(pad).reshape(-1, 2)[::-1].ravel()  # the last axis comes first in torch
    return F.pad(x, tuple(map(int, pairs)), value=float(constant_val))


def _batch_norm(x, mean, variance, gamma=None, beta=None, epsilon=1e-5):
    return F.batch_norm(x, mean, variance, gamma, beta, eps=float(epsilon))


def _reduce_mean(x, axes, keep_dims=False):
    return x.mean(tuple(map(int, axes)), keepdim=bool(keep_dims))


def _expand_dims(x, axes):
    for axis in sorted(map(int, axes)):
        x = x.unsqueeze(axis)
    return x


def _squeeze(x, axes):
    return x.squeeze(tuple(map(int, axes)))


def _dequantize(quantized_data, zero_point, scale, axis=0):
    """Of `constexpr_affine_dequantize`; `axis` is that of the scales."""
    data = np.array(quantized_data, np.float32)
    shape = [-1 if place == int(axis) else 1 for place in range(data.ndim)]
    scales, zeros = (np.array(value, np.float32) for value in (scale, zero_point))
    scales, zeros = (value.reshape(shape) if value.ndim else value for value in (scales, zeros))
    return torch.from_numpy((data - zeros) * scales)


_OPERATIONS: dict[str, Callable] = {
    "conv": _conv,
    "pad": _pad,
    "linear": lambda x, weight, bias=None: F.linear(x, weight, bias),
    "matmul": lambda x, y, transpose_x=False, transpose_y=False: (
        (x.mT if transpose_x else x) @ (y.mT if transpose_y else y)
    ),
    "batch_norm": _batch_norm,
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "mul": lambda x, y: x * y,
    "real_div": lambda x, y: x / y,
    "silu": lambda x: F.silu(x),
    "sigmoid": lambda x: torch.sigmoid(x),
    "relu": lambda x: F.relu(x),
    "relu6": lambda x: F.relu6(x),
    "tanh": lambda x: torch.tanh(x),
    "clip": lambda x, alpha, beta: x.clamp(float(alpha), float(beta)),
    "softmax": lambda x, axis: x.softmax(int(axis)),
    "reduce_mean": _reduce_mean,
    "reshape": lambda x, shape: x.reshape(tuple(map(int, shape))),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "cast": lambda x, dtype: x,  # everything is float32 here
    "constexpr_affine_dequantize": _dequantize,
}
# Operands that are tensors wherever they are known from the start; all else stays as it is written.
_TENSORS = {"x", "y", "weight", "bias", "mean", "variance", "gamma", "beta"}


class Program:
    """The main function of a package.

    Args:
        spec: the package's protocol buffer.
        weights: the folder of its weights.

    Attributes:
        classes: labels of a classifier in order; else empty.
        sides: (height, width) of its image.
    """

    def __init__(self, spec, weights: str):
        loaded = load(spec, specification_version=spec.specificationVersion, file_weights_dir=weights)
        function = loaded.functions["main"]
        ((self._image, shape),) = ((name, tuple(value.shape)) for name, value in function.inputs.items())
        self.sides = shape[2:]
        self.classes: list[str] = []
        self._steps: list[tuple[str, str, dict]] = []
        self._known: dict[str, torch.Tensor] = {}
        self._last = ""
        for operation in function.operations:
            self._add(operation)
        if not self.classes:
            (output,) = function.outputs
            self._last = output.name
        self._probabilities = self._without_casts(self._last)

    def _add(self, operation) -> None:
        kind = operation.op_type
        if kind == "const":
            return
        if kind == "classify":
            self.classes = [_word(entry) for entry in operation.classes.val]
            self._last = operation.probabilities.name
            return
        if kind not in _OPERATIONS:
            raise NotImplementedError(f"the program has an operation {kind}, which cannot be computed here")
        taken = {}
        for name, value in operation.inputs.items():
            if value is None:
                continue
            known = getattr(value, "val", None)
            if value.name in self._known or known is None:
                taken[name] = value.name
            else:
                taken[name] = _tensor(known) if name in _TENSORS else known
        (result,) = operation.outputs
        if kind == "constexpr_affine_dequantize":
            self._known[result.name] = _dequantize(**taken)
        else:
            self._steps.append((kind, result.name, taken))

    def _step(self, name: str) -> tuple[str, dict]:
        return next((kind, taken) for kind, result, taken in self._steps if result == name)

    def _without_casts(self, name: str) -> str:
        kind, taken = self._step(name)
        return self._without_casts(taken["x"]) if kind == "cast" else name

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """What goes into the last operation, whose name must be softmax or sigmoid."""
        kind, last = self._step(self._probabilities)
        if kind not in ("softmax", "sigmoid") or (kind == "softmax" and int(last["axis"]) not in (-1, 1)):
            raise NotImplementedError(f"the program ends with {kind}, not with a softmax or sigmoid")
        values = self._known | {self._image: image}
        for operation, result, taken in self._steps:
            given = {name: values[value] if isinstance(value, str) and value in values else value
                     for name, value in taken.items()}  # fmt: skip
            values[result] = _OPERATIONS[operation](**given)
        return values[last["x"]]


def _word(entry) -> str:
    return str(getattr(entry, "val", entry))
