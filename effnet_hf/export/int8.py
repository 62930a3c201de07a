"""Two INT8 files from one quantized checkpoint.

`tensorrt` is the checkpoint's graph as it is: quantize/dequantize pairs where NVIDIA puts them, weights stored as int8.
TensorRT and OpenVINO fuse them into integer kernels; ONNX Runtime's CPU kernels do not (SiLU stands between a
convolution and the next pair) and run it slower than float.

`ort-cpu` is made for those kernels: unsigned activations, signed weights, a pair behind every convolution. Scales that
training learned are kept; the tensors it gave none get ranges from pictures (`ranges.py`). SiLU is one operator of ONNX
Runtime's own, so that its input is dequantized once. The stem stays float: of three input channels an integer kernel
makes no use, and its output is the network's widest.
"""

import logging
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from .qdq import Scales, take_out
from .ranges import identity, search_ranges, silu


MICROSOFT = "com.microsoft"
_RESHAPES = ["Reshape", "Flatten", "Unsqueeze"]
_KINDS = ["Conv", "Gemm", "Add", "Mul", "Sigmoid", "GlobalAveragePool", *_RESHAPES]


def for_ort_cpu(model: onnx.ModelProto, batches: Iterable[np.ndarray]) -> onnx.ModelProto:
    """A graph with NVIDIA's pairs, rebuilt for ONNX Runtime's integer kernels.

    Args:
        batches: `pixel_values` to take the missing ranges from.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    scales = take_out(model)
    for node in reversed(model.graph.node):  # what only changes shape has the same scale on both sides
        if node.op_type in _RESHAPES and node.output[0] in scales.activations:
            scales.activations.setdefault(node.input[0], scales.activations[node.output[0]])
    model = onnx.shape_inference.infer_shapes(model)  # before an operator that ONNX's inference does not know
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


class _quiet_quantizer:
    """Without its advice to preprocess the model, which has been."""

    def __enter__(self):
        self.level = logging.root.level
        logging.root.setLevel(logging.ERROR)

    def __exit__(self, *exception):
        logging.root.setLevel(self.level)
