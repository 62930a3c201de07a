"""Kernels for training on a GPU, as far as a machine without one can say, and beside torch's own way on one."""

import copy
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.fused import fuse_for_gpu_training, layers

from .gpu_device import DEVICE, exact_products  # noqa: F401


triton = pytest.importorskip("triton")
kernels = pytest.importorskip("effnet_hf.fused.kernels")
pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
ROOT = Path(__file__).parents[1]
KERNELS = {name: kernel for name, kernel in vars(kernels).items() if name.endswith("_kernel")}


@pytest.mark.slow  # over a minute of the interpreter, for kernels that nothing uses yet
def test_all_of_it_in_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "tests/interpreted_kernels.py"],
        cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and re.search(r"\d\d passed", done.stdout), done.stdout[-6000:] + done.stderr[-2000:]


CHOSEN = {"ROWS": 32, "CHANNELS": 64, "SPLITS": 2, "SUMS": 5, "GATED": True, "KERNEL": 5, "STRIDE": 2}
MAPS = ("x", "y", "gradient", "output")  # in half precision; the depthwise weight, too
FLOATS = ("momentum", "eps")


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_kernels_compile_for_a_card(name, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, signature = KERNELS[name], {}
    pointers = {"partial", "moments", "weight", "bias", "gate", "of_pooled", "of_bias", "of_weight", "running_mean",
                "running_var", *MAPS}  # fmt: skip
    for argument in kernel.arg_names:
        half = argument in MAPS or (argument == "weight" and name == "depthwise_kernel")
        signature[argument] = (
            "constexpr" if argument in CHOSEN
            else ("*bf16" if half else "*fp32") if argument in pointers
            else "fp32" if argument in FLOATS
            else "i32"
        )  # fmt: skip
    chosen = {argument: CHOSEN[argument] for argument in kernel.arg_names if argument in CHOSEN}
    source = ASTSource(fn=kernel, signature=signature, constexprs=chosen)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert ".target sm_90" in compiled.asm["ptx"]
    assert not re.search(r"\.local\b", compiled.asm["ptx"]), "registers are spilled"


@pytest.fixture
def pretended_card(monkeypatch):
    """torch.compile believes in a GPU, far enough to trace kernels and to see what they write."""
    from triton.backends.compiler import GPUTarget

    torch._dynamo.reset()
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda *_, **__: True)
    monkeypatch.setattr(layers, "_is_reached", lambda x: True)
    card = SimpleNamespace(get_current_target=lambda: GPUTarget("cuda", 90, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", card)
    yield
    torch._dynamo.reset()


def test_a_compiled_step_is_one_graph_with_our_kernels_in_it(tiny_config, pretended_card):
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example):
        """Runs nothing: a CPU cannot. Zeros in the right shapes."""
        graphs.append([str(node.target) for node in graph.graph.nodes])
        *_, last = graph.graph.nodes
        values = [node and node.meta["val"] for node in last.args[0]]
        return make_boxed_func(
            lambda *_: [torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in values]
        )

    config = tiny_config(kernel_sizes=[5], strides=[2], num_block_repeats=[1], expand_ratios=[2], out_channels=[24])
    model = EfficientNetNVForImageClassification(config).train().to(memory_format=torch.channels_last)
    fuse_for_gpu_training(model)

    def loss_of(pixels, labels):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(pixels, labels=labels).loss

    step = torch.compile(loss_of, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))
    step(torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last), torch.tensor([0, 1])).backward()
    forward, backward = ([name for name in names if "triton" in name] for names in graphs)
    assert len(forward) == 3 * 4 + 1  # statistics or depthwise, merging, applying; squeeze-excite also its mean
    assert len(backward) == 4 * 2
    assert sum("batch_norm" in name for name in graphs[0]) == 1  # the projection's, which has no activation


@pytest.mark.gpu
@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_of_b0_is_that_of_the_plain_network(precision, compiled):
    torch.manual_seed(0)
    config = EfficientNetNVConfig.from_variant("b0", num_labels=10, survival_prob=1.0, dropout_rate=0.0)
    plain = EfficientNetNVForImageClassification(config).train().to(DEVICE, memory_format=torch.channels_last)
    exact, fused = copy.deepcopy(plain).double(), fuse_for_gpu_training(copy.deepcopy(plain))
    size = 32 if DEVICE == "cpu" else 96
    pixels = torch.randn(8, 3, size, size, device=DEVICE).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8, device=DEVICE)
    if DEVICE == "cuda":
        torch._dynamo.reset()
        assert layers._may_fuse(fused.efficientnet.encoder.stem, pixels)
    losses, gradients = [], []
    for model in (exact, plain, fused):
        call = torch.compile(model, fullgraph=True) if compiled and model is fused and DEVICE == "cuda" else model
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=precision == "bf16" and model is not exact):
            loss = call(pixels.double() if model is exact else pixels, labels=labels).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append(torch.cat([p.grad.flatten().double() for p in model.parameters()]))
    right = gradients[0].norm()
    errors = [((gradient - gradients[0]).norm() / right).item() for gradient in gradients[1:]]
    bound = 1e-4 if precision == "fp32" else 1e-2
    assert abs(losses[2] - losses[0]) < max(bound, 2 * abs(losses[1] - losses[0])), losses
    assert errors[1] < max(bound, 1.5 * errors[0]), errors
    for (name, expected), found in zip(exact.named_buffers(), fused.buffers()):
        torch.testing.assert_close(found.double(), expected.double(), rtol=5 * bound, atol=5 * bound, msg=name)
