"""`--compile`: the model compiled in place, under DDP and not around it.

Accelerate would compile what DDP has wrapped. Then nothing can be taken off again: validation, too, runs through DDP's
collective forward pass, and a process without a batch leaves the others waiting. In place the module stays itself:
DDP, `no_sync`, saving and validation see what they see without a compiler. The price is that gradients are reduced
when the compiled backward pass ends, not along the way; `blocks` keeps some of that overlap.
"""

import logging
import os
import shutil
import sys

import torch

from ..errors import UserError
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification


def compile_model(model: EfficientNetNVForImageClassification, mode: str, deterministic: bool = False) -> None:
    """Compiles `model` in place, at its first call: `full` as one graph, `blocks` stem, stages and head one by one,
    `graphs` as one graph that is recorded as CUDA graphs and replayed.

    Every shape is compiled for itself: the smaller last batch of a validation would otherwise turn all of them into
    slower code for any shape.
    """
    if mode == "none":
        return
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells everyone that there is no GPU
    # Each stage is a variant of one function, for training and validation, with and without a smaller last batch.
    torch._dynamo.config.cache_size_limit = 64
    if deterministic:
        from torch._inductor import config

        if not hasattr(config, "deterministic"):
            raise UserError(f"--deterministic with --compile needs torch 2.10 or newer, this is {torch.__version__}.")
        config.deterministic = True  # kernels are chosen by rule, not by a race between candidates
    network = model.efficientnet
    blocks = [network.encoder.stem, *network.encoder.stages, network.head]
    for part in blocks if mode == "blocks" else [model]:
        part.compile(dynamic=False, mode="reduce-overhead" if mode == "graphs" else None)


def require_compiler(mode: str, device_type: str) -> None:
    """torch.compile writes C++ for a CPU and, by way of Triton, C for a GPU; it finds out late that it cannot.

    Raises:
        UserError: there is no such compiler, or no GPU for CUDA graphs.
    """
    if mode == "graphs" and device_type != "cuda":
        raise UserError("--compile graphs records CUDA graphs and needs a GPU; use --compile full here.")
    if device_type == "cpu":
        language, names = "C++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    else:
        language, names = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--compile {mode} needs a {language} compiler and there is no {' or '.join(names)} here; install one, e.g."
            " `apt install g++`, or leave out --compile."
        )
