"""A bfloat16 model for runtimes without bfloat16 arithmetic, ONNX Runtime's CPU among them."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper


def float_twin(path: str | Path) -> bytes:
    """The same graph with the same (rounded) weights, every bfloat16 tensor as float32."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        _widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model.SerializeToString()


def _widen(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.BFLOAT16:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
