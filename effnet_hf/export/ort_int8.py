"""Quantize/dequantize pairs of an ONNX graph, and the graph rebuilt for ONNX Runtime's integer kernels on a CPU.

`tensorrt` is the checkpoint's graph as it is: pairs where NVIDIA puts them, weights stored as int8 ([`fold_weights`]).
TensorRT and OpenVINO fuse them into integer kernels. ONNX Runtime's CPU kernels do not, because SiLU stands between a
convolution and the next pair, and run such a file slower than float.

`ort-cpu` is made for those kernels ([`for_ort_cpu`]): unsigned activations, signed weights, a pair behind every
convolution. Scales that training learned are kept; tensors without one get a range from images ([`search_ranges`]).
SiLU becomes one operator of ONNX Runtime's own, so that its input is dequantized once. The stem stays float: it has
three input channels, too few for an integer kernel to be faster, and its output is the network's largest tensor.
"""

import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ..errors import UserError
from .runners import onnxruntime_session


MICROSOFT = "com.microsoft"
_RESHAPES = ["Reshape", "Flatten", "Unsqueeze"]
_KINDS = ["Conv", "Gemm", "Add", "Mul", "Sigmoid", "GlobalAveragePool", *_RESHAPES]
BINS = 4096
# Two weights of one sign and this sum, times 255, are the largest that 16 bits hold; rounding may add one.
_LARGEST_PAIR = 32767 // 255 - 1
Activation = Callable[[np.ndarray], np.ndarray]


@dataclass
class Scales:
    """What the pairs of a graph said, by the name of the tensor that they stood on; zero points are 0.

    Attributes:
        activations: one scale each.
        weights: (axis, one scale per channel) each.
    """

    activations: dict[str, float] = field(default_factory=dict)
    weights: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)


def fold_weights(model: onnx.ModelProto) -> None:
    """Stores quantized weights as int8: initializer, quantize, dequantize becomes int8 initializer, dequantize."""
    graph, initializers = model.graph, _initializers(model)
    folded = []
    readers = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in initializers:
            continue
        weight, scale = (numpy_helper.to_array(initializers[name]) for name in node.input[:2])
        integers = np.rint(weight / _along(scale, weight.ndim, _axis(node))).clip(-128, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(integers, f"{node.input[0]}_int8"))
        # One that layers share cannot be opened by ONNX Runtime's mode for x86 CPUs without VNNI.
        zero = numpy_helper.to_array(initializers[readers[node.output[0]].input[2]])
        graph.initializer.append(numpy_helper.from_array(zero, f"{node.input[0]}_zero_point"))
        readers[node.output[0]].input[2] = f"{node.input[0]}_zero_point"
        _rename_inputs(graph, {node.output[0]: f"{node.input[0]}_int8"})
        folded.append(node)
    for node in folded:
        graph.node.remove(node)
    _drop_unused(graph)


def take_out(model: onnx.ModelProto) -> Scales:
    """Removes every pair, in place; weights stay on the grid that their pairs put them on."""
    graph, initializers, scales = model.graph, _initializers(model), Scales()
    quantizes = {node.output[0]: node for node in graph.node if node.op_type == "QuantizeLinear"}
    around: dict = {}
    gone: list = []
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        quantize = quantizes[node.input[0]]
        source, scale = quantize.input[0], numpy_helper.to_array(initializers[quantize.input[1]])
        source = around.get(source, source)  # a pair right behind a pair stood on the same tensor; the first one counts
        around[node.output[0]] = source
        gone.append(node)
        if source not in initializers:
            scales.activations.setdefault(source, float(scale))
        else:
            axis, weight = _axis(quantize), numpy_helper.to_array(initializers[source])
            wide = _along(scale, weight.ndim, axis)
            snapped = (np.rint(weight / wide).clip(-128, 127) * wide).astype(np.float32)
            initializers[source].CopyFrom(numpy_helper.from_array(snapped, source))
            scales.weights[source] = axis, np.atleast_1d(scale)
    _rename_inputs(graph, around)
    for node in (*gone, *quantizes.values()):
        graph.node.remove(node)
    _drop_unused(graph)
    return scales


def spare_pairs(integers: np.ndarray) -> np.ndarray:
    """By how much the scale of each output channel must grow for uint8 times these weights to add up in 16 bits.

    Kernels add products of neighbouring input channels, at one position of the kernel, before they widen the sum.

    Args:
        integers: int8 weights (outputs, inputs, …).

    Returns:
        Factors (outputs,), 1 where nothing can overflow, at most 2.
    """
    if integers.shape[1] == 1:  # depthwise: products are not added
        return np.ones(len(integers))
    wide = integers.astype(np.int32).reshape(*integers.shape[:2], -1)
    wide = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2), (0, 0)))
    pairs = wide.reshape(wide.shape[0], -1, 2, wide.shape[2])
    sums = [np.maximum(sign * pairs, 0).sum(2).max((1, 2)) for sign in (1, -1)]
    return np.maximum(1, np.maximum(*sums) / _LARGEST_PAIR)


def _initializers(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def _axis(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _along(scale: np.ndarray, ndim: int, axis: int) -> np.ndarray:
    return scale if scale.ndim == 0 else scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


def _rename_inputs(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]


def _drop_unused(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def for_ort_cpu(
    model: onnx.ModelProto, scales: Scales, batches: Iterable[np.ndarray], reduce_range: bool = False
) -> onnx.ModelProto:
    """A network rebuilt for ONNX Runtime's integer kernels.

    Args:
        model: its graph without pairs.
        scales: what the pairs said, from [`take_out`].
        batches: `pixel_values` to take the missing ranges from.
        reduce_range: coarser scales for the weights that could overflow, see [`spare_pairs`].
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    for node in reversed(model.graph.node):  # what only changes shape has the same scale on both sides
        if node.op_type in _RESHAPES and node.output[0] in scales.activations:
            scales.activations.setdefault(node.input[0], scales.activations[node.output[0]])
    model = onnx.shape_inference.infer_shapes(model)  # before an operator that ONNX's inference does not know
    if reduce_range:
        scales = _reduced(model, scales)
    activations_of = fuse_silu(model)
    missing = {
        node.output[0]: activations_of.get(node.output[0], identity)
        for node in model.graph.node
        if node.op_type == "Conv" and node.output[0] not in scales.activations
    }
    batches = list(batches)
    ranges = search_ranges(model, missing, batches)

    class Batches(CalibrationDataReader):
        def __init__(self):
            self.left = iter(batches)

        def get_next(self):
            batch = next(self.left, None)
            return None if batch is None else {model.graph.input[0].name: batch}

    stem = next(node.name for node in model.graph.node if node.op_type == "Conv")
    with tempfile.TemporaryDirectory() as folder, _quiet_quantizer():
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(model, source)
        quantize_static(
            source,
            target,
            Batches(),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=_KINDS,
            nodes_to_exclude=[stem],
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "TensorQuantOverrides": _overrides(model, scales, ranges),
                # Of linear layers nothing is gained by rounding the output: logits, and two small vectors a block.
                "OpTypesToExcludeOutputQuantization": ["Gemm"],
            },
        )
        return onnx.load(target)


def _reduced(model: onnx.ModelProto, scales: Scales) -> Scales:
    initializers, weights = _initializers(model), {}
    for name, (axis, scale) in scales.weights.items():
        weight = numpy_helper.to_array(initializers[name])
        integers = np.rint(weight / _along(scale, weight.ndim, axis)).clip(-128, 127)
        weights[name] = axis, scale * spare_pairs(np.moveaxis(integers, axis, 0))
    return Scales(scales.activations, weights)


def fuse_silu(model: onnx.ModelProto) -> dict:
    """Replaces x * sigmoid(x) by ONNX Runtime's `QuickGelu`, in place; returns what follows each x: `silu`."""
    graph = model.graph
    producers = {name: node for node in graph.node for name in node.output}
    followed, nodes = {}, []
    for node in graph.node:
        sigmoid = next((producers[name] for name in node.input if _is_sigmoid(producers.get(name))), None)
        if node.op_type == "Mul" and sigmoid is not None and sigmoid.input[0] in node.input:
            x = sigmoid.input[0]
            followed[x] = silu
            node = helper.make_node("QuickGelu", [x], node.output, f"{node.name}/silu", domain=MICROSOFT, alpha=1.0)
        nodes.append(node)
    used = {name for node in nodes for name in node.input} | {value.name for value in graph.output}
    del graph.node[:]
    graph.node.extend(node for node in nodes if used.intersection(node.output))
    model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return followed


def _is_sigmoid(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "Sigmoid"


def _overrides(model: onnx.ModelProto, scales: Scales, ranges: dict[str, tuple[float, int]]) -> dict[str, list[dict]]:
    """Scales in `quantize_static`'s words; a symmetric int8 scale is a uint8 one with zero point 128."""
    from onnxruntime.quantization import QuantType

    def entry(kind, scale, zero):
        return {"quant_type": kind, "scale": np.array(scale, np.float32), "zero_point": zero}

    names = {name for node in model.graph.node for name in (*node.input, *node.output)}
    found = {name: (scale, 128) for name, scale in scales.activations.items()} | ranges
    overrides = {
        name: [entry(QuantType.QUInt8, scale, np.array(zero, np.uint8))]
        for name, (scale, zero) in found.items()
        if name in names
    }
    for name, (axis, channels) in scales.weights.items():
        overrides[name] = [entry(QuantType.QInt8, scale, np.array(0, np.int8)) for scale in channels]
        overrides[name][0]["axis"] = axis
    return overrides


@contextmanager
def _quiet_quantizer() -> Iterator[None]:
    """Without its advice to preprocess the model, which has been."""
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.root.setLevel(level)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x.clip(-80)))


def identity(x: np.ndarray) -> np.ndarray:
    return x


def search_ranges(
    model: onnx.ModelProto, tensors: Mapping[str, Activation], batches: Iterable[np.ndarray]
) -> dict[str, tuple[float, int]]:
    """Scale and zero point (uint8) of each tensor: 8 bits spent where the error after the activation is smallest.

    A convolution's output goes through SiLU, which is nearly 0 below -6: a range from the smallest to the largest value
    spends its steps on a long negative tail and costs points of accuracy. Per tensor, low and high are searched for the
    least squared error *after* the activation, over a histogram of what the calibration images gave.

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
