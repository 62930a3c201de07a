"""INT8 for OpenVINO's kernels on a CPU: from a quantized checkpoint's own pairs, or from a float network by NNCF.

OpenVINO fuses either graph alike: a convolution takes uint8 and int8 and runs with its batch norm, SiLU, residual sum
and the next rounding as one integer kernel, and so do products with gates and means. Moving single layers to float or
taking roundings out made no file faster, so a checkpoint's roundings all stay where training had them. Only the
arithmetic of the stem is float in both ways, on rounded values where the checkpoint rounds: with three input channels
an integer kernel gains nothing, and it is where sums of 16 bits overflow most.

On an x86 CPU without VNNI kernels add two products of uint8 and int8 in 16 bits, which overflow without a sound.
[`spare_pairs`] takes each output channel's weights so far back that no two neighbours can; [`overflows`] tries it out.
"""

import io
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import numpy as np
import onnx

from .ort_int8 import fold_weights, spare_pairs
from .runners import openvino_compiled


def from_pairs(graph: onnx.ModelProto, reduce_range: bool = False):
    """`openvino.Model` of a quantized checkpoint's graph, on its own grids.

    Args:
        graph: quantize/dequantize pairs as the checkpoint has them; changed.
        reduce_range: coarser grids for the weights that could overflow, see [`spare_pairs`].
    """
    import openvino

    fold_weights(graph)
    model = openvino.convert_model(io.BytesIO(graph.SerializeToString()))
    stem = _stem(model)
    for layer, integers, scale in list(_layers(model)):
        if layer.get_name() == stem.get_name():
            _put(layer.input_value(1), _data(integers) * _data(scale))
    return _reduced(model) if reduce_range else model


def from_float(graph: onnx.ModelProto, batches, reduce_range: bool = False):
    """`openvino.Model` of a float network that NNCF quantizes: ranges from `batches`, biases corrected by them.

    Args:
        graph: the float network.
        batches: a list, or what is read and counted like one, of `pixel_values` (1, 3, H, W).
    """
    import openvino

    model = openvino.convert_model(io.BytesIO(graph.SerializeToString()))
    with _quiet_nncf():
        import nncf
        from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix

        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(batches),
            ignored_scope=nncf.IgnoredScope(names=[_stem(model).get_friendly_name()]),
            # Its own fix gives up half the range of every weight, depthwise ones too, which cannot overflow.
            advanced_parameters=AdvancedQuantizationParameters(overflow_fix=OverflowFix.DISABLE),
        )
    return _reduced(quantized) if reduce_range else quantized


def _reduced(model):
    for layer, integers, scale in list(_layers(model)):
        # Where inputs are the first axis, (inputs, outputs), as a matrix product may have them.
        turned = layer.get_type_name() == "MatMul" and not layer.get_attributes()["transpose_b"]
        weights, scales = _data(integers), _data(scale)
        factors = spare_pairs(weights.T if turned else weights)
        factors = factors.reshape([1, -1] if turned else [-1, *[1] * (weights.ndim - 1)])
        _put(integers.output(0), np.rint(weights / factors).astype(np.int8))
        _put(scale.output(0), (scales * factors).astype(np.float32))
    return model


def _layers(model) -> Iterator[tuple]:
    """Convolutions and matrix products, each with the constants of its int8 weights and of their scale. Depthwise
    convolutions are other operations: they add no two products."""
    for layer in model.get_ordered_ops():
        if layer.get_type_name() not in ("Convolution", "MatMul"):
            continue
        scaled = layer.input_value(1).get_node()
        if scaled.get_type_name() != "Multiply":
            continue
        widened, scale = (value.get_node() for value in scaled.input_values())
        integers = widened.input_value(0).get_node()
        if integers.get_type_name() == "Constant" and integers.get_element_type().get_type_name() == "i8":
            yield layer, integers, scale


def _stem(model):
    channels = model.input(0).get_partial_shape()[1].get_length()
    convolutions = (layer for layer in model.get_ordered_ops() if layer.get_type_name() == "Convolution")
    return next(layer for layer in convolutions if layer.input_value(1).get_shape()[1] == channels)


def _data(constant) -> np.ndarray:
    return np.array(constant.data)


def _put(output, values: np.ndarray) -> None:
    """A constant for all who read an output."""
    from openvino import opset13

    constant = opset13.constant(values).output(0)
    for reader in output.get_target_inputs():
        reader.replace_source_output(constant)


def kernels(compiled) -> Counter:
    """How many layers of a compiled model run as what: `("Convolution", "u8")`, `("Convolution", "f32")`, …"""
    found: Counter = Counter()
    for layer in compiled.get_runtime_model().get_ordered_ops():
        facts = layer.get_rt_info()
        kind, precision = (str(facts[name].value) for name in ("layerType", "runtimePrecision"))
        found[kind, precision] += 1
    return found


def overflows() -> bool:
    """Whether OpenVINO's sums of uint8 times int8 overflow on this machine: a convolution of large values says."""
    import openvino
    from openvino import opset13

    channels = 16
    pixels = opset13.parameter([1, channels, 4, 4], np.float32)
    low, high = (opset13.constant(np.float32(value)) for value in (0, 255))
    rounded = opset13.fake_quantize(pixels, low, high, low, high, 256)
    weights = opset13.convert(opset13.constant(np.full((channels, channels, 1, 1), 127, np.int8)), "f32")
    weights = opset13.multiply(weights, opset13.constant(np.ones((channels, 1, 1, 1), np.float32)))
    sums = opset13.convolution(rounded, weights, [1, 1], [0, 0], [0, 0], [1, 1])
    compiled = openvino_compiled(openvino.Model([sums], [pixels]))
    found = compiled(np.full((1, channels, 4, 4), 255, np.float32))[0]
    return not np.allclose(found, channels * 255 * 127, rtol=1e-3)


@contextmanager
def _quiet_nncf() -> Iterator[None]:
    """Without its bars and its advice, and torch's to it; messages of level ERROR stay."""
    loggers = [logging.getLogger(name) for name in ("nncf", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)
