"""Latency and throughput of inference: python benchmark.py inference --model runs/b0 --runtime torch,compile

    torch         the model as from_pretrained gives it, eager
    folded        batch norm folded into the convolutions (`effnet_hf.tuning.fold_batchnorm`), eager
    compile       folded and compiled as one graph
    graphs        folded, replayed as one CUDA graph                                        (CUDA)
    compile-graphs  compiled and replayed as CUDA graphs                                     (CUDA)
    onnxruntime, openvino  as `load_for_inference` has them: of a file's graph, batch norm folded    (CPU)

Of the peers also, by what their pages or torch's offer:

    fused         torch.fx.experimental.optimization.fuse, where it finds anything to fuse
    frozen        torch.compile with the weights frozen into the graph, as ours has them

Per batch size all runtimes and peers take turns; percentiles are over single batches, each waited for.
"""

import copy
import io
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch._inductor import config
from torch.fx.experimental import optimization
from torch.nn import functional

from effnet_hf.checkpoint import open_checkpoint
from effnet_hf.cli import above_zero, path
from effnet_hf.configuration import VARIANTS, EfficientNetNVConfig
from effnet_hf.errors import UserError
from effnet_hf.export.engines import Place, make_engine, obstacle
from effnet_hf.export.runners import onnxruntime_session, openvino_compiled
from effnet_hf.modeling_efficientnet_nv import EfficientNetNVForImageClassification
from effnet_hf.training import keep_freed_memory
from effnet_hf.tuning import CudaGraph, compile_for_inference, fold_batchnorm, use_onednn

from .contenders import AUTOCAST, OURS, build, has, images, logits_of, placed, set_precision
from .environment import environment, resolve_device
from .flags import common_parser, numbers, settings, words
from .report import print_rows, write_figures
from .timing import ratios, release, take_turns


RUNTIMES = ("torch", "folded", "compile", "graphs", "compile-graphs", "onnxruntime", "openvino")
PEER_RUNTIMES = ("torch", "fused", "compile", "frozen", "graphs", "compile-graphs", "onnxruntime", "openvino")
COMPILED = ("compile", "frozen", "compile-graphs")
# Which of a peer's stands beside ours, the first that was measured.
SAME_MODE = {"folded": ("fused", "torch"), "compile": ("frozen", "compile")}
FILES = ("onnxruntime", "openvino")
Runner = Callable[[torch.Tensor], torch.Tensor]


def main(argv: list[str] | None = None) -> int:
    parser = common_parser("inference", __doc__.splitlines()[0], "peers", "precisions", "rounds", "budget")
    parser.add_argument("--model", type=path, help="checkpoint folder or Hub id instead of fresh --variants")
    parser.add_argument("--runtime", type=words(*RUNTIMES), default=["torch", "folded"], help="comma-separated")
    parser.add_argument("--peer_runtime", type=words(*PEER_RUNTIMES), default=["torch"], help="of the peers")
    parser.add_argument("--batch_sizes", type=numbers, default=[1, 8, 64], help="comma-separated")
    parser.add_argument("--layout", choices=["channels_last", "nchw"], default="channels_last", help="memory format")
    parser.add_argument("--compile_only", action="store_true", help="fill the compile cache, and measure nothing")
    parser.add_argument("--seconds", type=above_zero, default=20.0, help="for the rounds of one batch size, at most")
    arguments = parser.parse_args(argv)
    device = resolve_device(arguments.device, arguments.num_threads)
    keep_freed_memory()
    figures = {"kind": "inference", **environment(device), "settings": settings(arguments), "rows": [], "left_out": []}
    started = time.monotonic()
    for label in [arguments.model] if arguments.model else arguments.variants:
        for precision in arguments.precisions:
            if arguments.budget and time.monotonic() - started > arguments.budget:
                figures["left_out"].append(f"{label} {precision}: no time left")
                continue
            set_precision(precision, device)
            rows, failures = measure(arguments, device, label, precision)
            figures["rows"] += rows
            figures["left_out"] += failures
            if arguments.output:  # after every cell: a run that is cut off leaves what it has
                write_figures(figures, arguments.output)
    for line in figures["left_out"]:
        print(f"left out: {line}")
    return 0


def measure(arguments, device: torch.device, label: str, precision: str) -> tuple[list[dict], list[str]]:
    """Rows of one network in one precision over all batch sizes, and a sentence for each runner that failed."""
    model, variant = open_model(label, arguments.image_size)
    size = arguments.image_size or model.config.image_size
    channels_last = arguments.layout == "channels_last"
    rows: list[dict] = []
    failures: list[str] = []
    for batch in arguments.batch_sizes:
        pixels = images(batch, size, device, channels_last)
        if precision in AUTOCAST:
            pixels = pixels.to(AUTOCAST[precision])
        makers = {
            (OURS, runtime): partial(our_runner, runtime, model, pixels)
            for runtime in arguments.runtime
            if runtime in COMPILED or not arguments.compile_only
        }
        makers |= {
            (peer, runtime): partial(peer_runner, peer, variant, runtime, size, pixels, model.config.num_labels)
            for peer in arguments.peers
            if has(peer, variant)
            for runtime in arguments.peer_runtime
            if runtime in COMPILED or not arguments.compile_only
        }
        steps, reference = {}, None
        for (name, runtime), make in makers.items():
            where = f"{variant} {precision} batch {batch}, {name} {runtime}"
            try:
                run = make()
                with torch.inference_mode():
                    logits = run(pixels).float()
            except (ImportError, RuntimeError, UserError, ValueError) as error:
                failures.append(f"{where}: {str(error).strip().splitlines()[0]}")
                continue
            if arguments.compile_only:
                release(device)
                continue
            if name == OURS:
                reference = logits.clone() if reference is None else reference
                failures += [] if agree(logits, reference) else [f"{where}: its logits differ from {OURS}'s"]
            steps[name, runtime] = partial(run, pixels)
        deadline = time.monotonic() + arguments.seconds
        with torch.inference_mode():
            samples = take_turns(steps, device, arguments.rounds, warmup=2, deadline=deadline)
        for (name, runtime), own in samples.items():
            row: dict[str, Any] = {"variant": variant, "by": name, "runtime": runtime, "precision": precision}
            row |= {"layout": arguments.layout, "batch": batch, "image_size": size, **own.summary(batch)}
            same = SAME_MODE.get(runtime, (runtime,))
            rows.append(row | ratios(own, samples, arguments.peers, same, "torch", device))
        print_rows(
            rows[len(rows) - len(samples) :],
            ("variant", "by", "runtime", "precision", "batch", "p50_ms", "cpu_ms", "ips"),
        )
        steps.clear()
        release(device)
    return rows, failures


def agree(logits: torch.Tensor, reference: torch.Tensor) -> bool:
    """Within what 8 bits of mantissa leave after a hundred layers; a wrong graph is far outside."""
    return bool((logits - reference).abs().max() <= 0.1 * reference.abs().max() + 1e-6)


def open_model(label: str, image_size: int | None) -> tuple[EfficientNetNVForImageClassification, str]:
    """A fresh variant, or a checkpoint, in evaluation mode; and the variant that peers are measured as."""
    if label in VARIANTS:
        torch.manual_seed(0)
        return EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(label)).eval(), label
    checkpoint = open_checkpoint(label)
    return checkpoint.load().eval(), checkpoint.config.variant or "custom"


def our_runner(runtime: str, model, pixels: torch.Tensor) -> Runner:
    """Logits of images like `pixels`.

    Raises:
        UserError: the runtime needs another device, or is not installed.
    """
    device = pixels.device
    if runtime in FILES:
        place = Place(device, "fp32", (pixels.shape[-2], pixels.shape[-1]), len(pixels))
        if fault := obstacle(runtime, place) or ("is measured in fp32" if pixels.dtype != torch.float32 else None):
            raise UserError(f"--runtime {runtime} {fault}.")
        return make_engine(runtime, model, place)
    if runtime in ("graphs", "compile-graphs") and device.type != "cuda":
        raise UserError(f"--runtime {runtime} needs a GPU.")
    if runtime == "torch":
        network = placed(copy.deepcopy(model), pixels)
        return lambda pixels: network(pixels).logits
    network = placed(fold_batchnorm(model), pixels)
    if runtime == "graphs":
        return CudaGraph(network, pixels)
    if runtime == "folded":
        if device.type == "cpu" and 1 < len(pixels) < 16:
            use_onednn(network, pixels.shape[-1])
        return lambda pixels: network(pixels).logits
    compiled = compile_for_inference(network, **({"mode": "reduce-overhead"} if runtime == "compile-graphs" else {}))

    def run(pixels):
        if runtime == "compile-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        return compiled(pixels).logits

    return run


def peer_runner(name: str, variant: str, runtime: str, size: int, pixels: torch.Tensor, num_labels: int) -> Runner:
    """As `our_runner`: the peer's own network eager, compiled, or recorded by the same `CudaGraph`."""
    if runtime in ("graphs", "compile-graphs") and pixels.device.type != "cuda":
        raise UserError(f"--peer_runtime {runtime} needs a GPU.")
    network = placed(build(name, variant, size, num_labels).eval(), pixels)
    if runtime == "graphs":
        return CudaGraph(_WithLogits(network), pixels)
    if runtime in FILES:
        return peer_file(runtime, _Logits(network), pixels)
    if runtime == "fused":
        network = fused(name, network)
    if runtime in COMPILED:
        mode = "reduce-overhead" if runtime == "compile-graphs" else "default"
        # As a function: dynamo keeps code by the code of what it compiles, and would give `frozen` that of `compile`.
        plain = network
        network = torch.compile(_called(plain) if runtime == "frozen" else plain, dynamic=False, mode=mode)

    def run(pixels):
        if runtime == "compile-graphs":
            torch.compiler.cudagraph_mark_step_begin()
        with config.patch(freezing=runtime == "frozen"):
            return logits_of(network(pixels))

    return run


def _called(network: torch.nn.Module) -> Runner:
    return lambda pixels: network(pixels)


def fused(name: str, network: torch.nn.Module) -> torch.nn.Module:
    """Convolutions and batch norms made one by torch, in evaluation mode.

    Raises:
        UserError: it finds nothing to fuse in that library's layers.
    """
    found, norm = optimization.fuse(network), torch.nn.BatchNorm2d
    layers = {name: isinstance(layer, norm) for name, layer in found.named_modules()}
    left = sum(node.target is functional.batch_norm or layers.get(node.target, False) for node in found.graph.nodes)
    if left == sum(isinstance(layer, norm) for layer in network.modules()):
        raise UserError(f"torch.fx.experimental.optimization.fuse finds nothing to fuse in {name}'s layers.")
    return found


def peer_file(runtime: str, network: torch.nn.Module, pixels: torch.Tensor) -> Runner:
    """A peer's network as ONNX by torch's exporter in ONNX Runtime, or converted by OpenVINO; settings as ours has."""
    if pixels.device.type != "cpu" or pixels.dtype != torch.float32:
        raise UserError(f"--peer_runtime {runtime} is measured on a CPU in fp32.")
    threads, pixels = torch.get_num_threads(), pixels.contiguous()
    if runtime == "openvino":
        import openvino

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it traces, and torch has newer ways
            model = openvino.convert_model(network, example_input=pixels, input=list(pixels.shape))
        compiled = openvino_compiled(model, threads)
        return lambda pixels: torch.from_numpy(compiled(pixels.contiguous().numpy())[0])
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (pixels,),
            buffer,  # type: ignore[arg-type]  # a file-like object will do, torch says so itself
            dynamo=False,
            opset_version=18,
            input_names=["pixels"],
        )
    session = onnxruntime_session(buffer.getvalue(), threads)
    return lambda pixels: torch.from_numpy(session.run(None, {"pixels": pixels.contiguous().numpy()})[0])


class _Logits(torch.nn.Module):
    """A network that answers with a tensor."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return logits_of(self.network(pixels))


class _WithLogits(torch.nn.Module):
    """A peer's network that answers as ours does."""

    def __init__(self, network: torch.nn.Module):
        super().__init__()
        self.network = network

    def forward(self, pixels: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits_of(self.network(pixels)))
