"""Quantize/dequantize pairs of an ONNX graph: folding weights into int8, and taking the pairs out again."""

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper


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
    for node in graph.node:
        if node.op_type != "QuantizeLinear" or node.input[0] not in initializers:
            continue
        weight, scale = (numpy_helper.to_array(initializers[name]) for name in node.input[:2])
        integers = np.rint(weight / _along(scale, weight.ndim, _axis(node))).clip(-128, 127).astype(np.int8)
        graph.initializer.append(numpy_helper.from_array(integers, f"{node.input[0]}_int8"))
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
