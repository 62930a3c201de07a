"""One callable per runtime, arrays in and arrays out, so that everything that can run a model is checked alike."""

import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import probabilities
from .options import ExportOptions


Runner = Callable[[np.ndarray], np.ndarray]


def torch_runner(model: EfficientNetNVForImageClassification, as_probabilities: bool = False) -> Runner:
    """The checkpoint itself in PyTorch, float32."""
    model.eval()

    @torch.inference_mode()
    def run(pixel_values: np.ndarray) -> np.ndarray:
        logits = model(torch.from_numpy(pixel_values)).logits
        return (probabilities(logits, model.config) if as_probabilities else logits).numpy()

    return run


def onnxruntime_runner(path: str | Path, threads: int | None = None) -> Runner:
    """ONNX Runtime on the CPU.

    Args:
        threads: by default what ONNX Runtime chooses, or OMP_NUM_THREADS.
    """
    session = onnxruntime_session(path, threads)
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})[0]


def onnxruntime_session(model: str | Path | bytes, threads: int | None = None, providers=("CPUExecutionProvider",)):
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors; it warns about every initializer that it folds away
    # Where an x86 CPU has no VNNI, sums of INT8 products overflow 16 bits without this; elsewhere it changes nothing.
    settings.add_session_config_entry("session.x64quantprecision", "1")
    if threads or torch.get_num_threads() == 1:
        settings.intra_op_num_threads = threads or 1
    source = model if isinstance(model, bytes) else str(model)
    return onnxruntime.InferenceSession(source, settings, providers=list(providers))


def openvino_runner(path: str | Path, threads: int | None = None) -> Runner:
    """OpenVINO on the CPU, float32 where the file does not say otherwise; opens its own IR and ONNX files."""
    compiled = openvino_compiled(str(path), threads)
    return lambda array: compiled(array)[0]


def openvino_compiled(model, threads: int | None = None, bf16: bool = False):
    """`openvino.CompiledModel` of a file's path or an `openvino.Model`, with [`openvino_runner`]'s settings."""
    settings: dict = {"INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads or torch.get_num_threads() == 1:
        settings["INFERENCE_NUM_THREADS"] = threads or 1
    return openvino_core().compile_model(model, "CPU", settings)


@functools.cache
def openvino_core():
    """One for the whole process, and never destroyed: every Core's CPU plugin gives the main thread an alternate signal
    stack (AVX-512 machines), and of two that are destroyed the second puts back the first one's, which is freed. The
    next signal, a Ctrl-C or the end of a child process, is then a segmentation fault (OpenVINO 2026.4.1)."""
    import openvino

    return openvino.Core()


def pt2_runner(path: str | Path) -> Runner:
    """A saved `torch.export` program."""
    with warnings.catch_warnings():
        # torch 2.11 makes tensors of bytes that nothing may write to, which nothing here does.
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        module = torch.export.load(str(path)).module()

    @torch.inference_mode()
    def run(pixel_values: np.ndarray) -> np.ndarray:
        return module(torch.from_numpy(pixel_values)).numpy()

    return run


def runtime_of(options: ExportOptions) -> str:
    """The name and version of what runs a format here, for a sentence."""
    if options.format == "pt2":
        return f"torch {torch.__version__}"
    if options.format == "openvino":
        import openvino

        return f"OpenVINO {openvino.__version__.split('-')[0]}"
    import onnxruntime

    return f"ONNX Runtime {onnxruntime.__version__}"


def runner_for(path: Path, options: ExportOptions) -> tuple[str, Runner]:
    """What runs a written file here: its name for a sentence, and the callable."""
    name = runtime_of(options)
    if options.format == "pt2":
        return name, pt2_runner(path)
    if options.format == "openvino":
        return name, openvino_runner(path)
    if options.dtype == "bf16":
        twin = onnxruntime_session(float_twin(path))
        return f"{name} in float32 arithmetic", lambda array: twin.run(None, {twin.get_inputs()[0].name: array})[0]
    return name, onnxruntime_runner(path)


def float_twin(path: str | Path) -> bytes:
    """A bfloat16 graph with its rounded weights as float32, for runtimes without bfloat16 arithmetic."""
    import onnx

    def widen(tensor) -> None:
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            values = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))

    model = onnx.load(path)
    for tensor in model.graph.initializer:
        widen(tensor)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                widen(attribute.t)
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
    del model.graph.value_info[:]
    return model.SerializeToString()
