"""What can run a checkpoint on this machine: one callable per runtime, logits out, made from the network in memory.

An engine takes `pixel_values` (N, 3, height, width) on any device, of the size it was made for, and gives float32
logits (N, classes) on its own. Its weights are copies: what becomes of the network's afterwards it does not see.
"""

import copy
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..tuning import CudaGraph, compile_for_inference, fold_batchnorm
from .options import ExportOptions, installed


# The names that benchmark.py has for them.
RUNTIMES = ("torch", "folded", "compile", "graphs", "onnxruntime", "openvino")
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "int8": None}
_PACKAGES = {"onnxruntime": ("onnx", "onnxscript", "onnxruntime"), "openvino": ("onnx", "onnxscript", "openvino")}
Engine = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where and how a network is to run.

    Attributes:
        precision: of `PRECISIONS`; `"int8"` of a quantized network.
        size: (height, width) of its images.
        batch_size: images in the usual call; others are possible.
    """

    device: torch.device
    precision: str
    size: tuple[int, int]
    batch_size: int

    @property
    def on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def pixels(self, batch_size: int) -> torch.Tensor:
        return torch.zeros(batch_size, 3, *self.size)


def obstacle(runtime: str, place: Place) -> str | None:
    """Why a runtime cannot run there, as the end of a sentence; None where it can."""
    missing = [package for package in _PACKAGES.get(runtime, ()) if not installed(package)]
    if missing:
        return f"needs {', '.join(missing)}: pip install {' '.join(missing)}"
    if runtime == "graphs" and place.device.type != "cuda":
        return "needs a CUDA device"
    if runtime in _PACKAGES and not place.on_cpu:
        return "runs on a CPU here; use --device cpu"
    if place.precision == "int8" and runtime not in ("torch", *_PACKAGES):
        return "runs no quantized network; use openvino, onnxruntime or torch"
    if place.precision == "fp16" and place.on_cpu:
        return "has no fp16 on a CPU; use fp32 or bf16"
    if place.precision == "bf16" and runtime == "onnxruntime":
        return "has no bfloat16 convolution on a CPU"
    if place.precision == "bf16" and runtime == "openvino" and "BF16" not in _openvino_capabilities():
        return "has no bfloat16 on this processor"
    return None


def make_engine(runtime: str, network: EfficientNetNVForImageClassification, place: Place) -> Engine:
    """Of a network in evaluation mode, float32; takes seconds for a file's runtimes, a minute or two for `compile`."""
    return _MAKERS[runtime](network, place)


def name_of(runtime: str) -> str:
    """For a sentence."""
    if runtime == "onnxruntime":
        import onnxruntime

        return f"ONNX Runtime {onnxruntime.__version__}"
    if runtime == "openvino":
        import openvino

        return f"OpenVINO {openvino.__version__.split('-')[0]}"
    how = {"torch": "", "folded": ", folded", "compile": ", folded and compiled", "graphs": ", folded, as a CUDA graph"}
    return f"torch {torch.__version__}{how[runtime]}"


def _in_torch(network: nn.Module, place: Place) -> tuple[nn.Module, Callable[[torch.Tensor], torch.Tensor]]:
    """A copy there, and what brings images to it."""
    dtype = PRECISIONS[place.precision] or torch.float32
    # CUDA's fp32 kernels prefer the channels first.
    channels_last = place.on_cpu or place.precision != "fp32"
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    moved = copy.deepcopy(network).to(place.device, dtype, memory_format=memory_format)
    return moved, lambda pixels: pixels.to(place.device, dtype).contiguous(memory_format=memory_format)


def _torch(network: nn.Module, place: Place) -> Engine:
    if place.precision == "int8":  # ranges stay as precise as they are
        moved, bring = copy.deepcopy(network).to(place.device), lambda pixels: pixels.to(place.device, torch.float32)
    else:
        moved, bring = _in_torch(network, place)
    return lambda pixels: moved(bring(pixels)).logits.float()


def _folded(network: nn.Module, place: Place) -> Engine:
    return _torch(fold_batchnorm(network), place)


def _compile(network: nn.Module, place: Place) -> Engine:
    moved, bring = _in_torch(fold_batchnorm(network), place)
    compiled = compile_for_inference(moved)
    return lambda pixels: compiled(bring(pixels)).logits.float()


def _graphs(network: nn.Module, place: Place) -> Engine:
    moved, bring = _in_torch(fold_batchnorm(network), place)
    recorded: list[CudaGraph] = []
    alone = threading.Lock()  # a graph has one place for its images and answers

    def run(pixels: torch.Tensor) -> torch.Tensor:
        pixels = bring(pixels)
        if len(pixels) != place.batch_size:  # a last, smaller batch is not worth a recording
            return moved(pixels).logits.float()
        with alone:
            if not recorded:
                recorded.append(CudaGraph(moved, pixels))
            return recorded[0](pixels).float().clone()  # the next call overwrites its own

    return run


def _onnxruntime(network: EfficientNetNVForImageClassification, place: Place) -> Engine:
    from .ort_int8 import fold_weights
    from .runners import onnxruntime_session

    graph = _graph(network, place)
    if place.precision == "int8":
        fold_weights(graph)
    session = onnxruntime_session(graph.SerializeToString(), torch.get_num_threads())
    return lambda pixels: torch.from_numpy(session.run(None, {"pixel_values": _array(pixels)})[0])


def _openvino(network: EfficientNetNVForImageClassification, place: Place) -> Engine:
    import io

    import openvino

    from .runners import openvino_compiled

    graph = _graph(network, place)
    if place.precision == "int8":
        from .openvino_int8 import from_pairs, overflows

        model = from_pairs(graph, reduce_range=overflows())
    else:
        model = openvino.convert_model(io.BytesIO(graph.SerializeToString()))
    compiled: dict[int, Callable] = {}
    alone = threading.Lock()  # a compiled model has one place for its answers, which threads would share

    def run(pixels: torch.Tensor) -> torch.Tensor:
        # A fixed batch is up to a twelfth faster; all others share one model.
        batch = len(pixels) if len(pixels) == place.batch_size else -1
        with alone:
            if batch not in compiled:
                own = model.clone()
                own.reshape([batch, 3, *place.size])
                compiled[batch] = openvino_compiled(own, torch.get_num_threads(), bf16=place.precision == "bf16")
            return torch.from_numpy(compiled[batch](_array(pixels))[0].copy())

    return run


def _array(pixels: torch.Tensor):
    return pixels.detach().float().cpu().contiguous().numpy()


def _graph(network: EfficientNetNVForImageClassification, place: Place):
    from .graph import draw_graph
    from .network import ExportedNetwork

    options = ExportOptions()
    return draw_graph(ExportedNetwork(network, options), place.size, options)


def _openvino_capabilities() -> list[str]:
    from .runners import openvino_core

    return openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


_MAKERS: dict[str, Callable[..., Engine]] = {
    "torch": _torch,
    "folded": _folded,
    "compile": _compile,
    "graphs": _graphs,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
