"""The Accelerator of a recipe: precision, accumulation, compilation, trackers."""

import contextlib
import ctypes
import os
import shutil
import sys
import warnings

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    LoggerType,
    ProjectConfiguration,
    TorchDynamoPlugin,
)

from ..errors import UserError
from ..recipes import Recipe


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Builds the Accelerator; `--precision` wins over what `accelerate launch` was configured with.

    fp32 means fp32: TF32 is off unless asked for (torch would use it in convolutions by default). The fp16 loss scale
    starts at 128 and, unless `dynamic_loss_scale`, only ever shrinks, as in the original's recipe.

    Raises:
        UserError: a precision or compiler that this machine lacks.
    """
    _check_trackers(recipe.report_to)
    mixed = {None: None, "fp32": "no", "tf32": "no"}.get(recipe.precision, recipe.precision)
    handlers = [
        GradScalerKwargs(init_scale=recipe.loss_scale, growth_interval=100 if recipe.dynamic_loss_scale else 10**9),
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    compilation = None
    if recipe.compile != "none":
        # `blocks` compiles the seven stages as variants of one function, each for training and validation.
        torch._dynamo.config.cache_size_limit = 64
        compilation = TorchDynamoPlugin(backend="inductor", use_regional_compilation=recipe.compile == "blocks")
    try:
        accelerator = Accelerator(
            # Said aloud, because Accelerate otherwise takes `torchrun` on a machine without a GPU for single processes.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=mixed,
            kwargs_handlers=handlers,
            dynamo_plugin=compilation,
            log_with=recipe.report_to or None,
            project_config=ProjectConfiguration(project_dir=recipe.output_dir, logging_dir=f"{recipe.output_dir}/logs"),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        raise UserError(f"Accelerate refuses this set-up: {' '.join(str(error).split())}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16.")
    if recipe.precision == "tf32" and not _has_tf32(accelerator.device):
        raise UserError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or newer; use fp32 here.")
    if recipe.sync_batch_norm and accelerator.device.type != "cuda":
        raise UserError("--sync_batch_norm needs GPUs: torch has no synchronised batch norm on a CPU.")
    if recipe.compile != "none":
        _require_compiler(recipe.compile, accelerator.device.type)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    allow_tf32(recipe.precision == "tf32")
    torch.backends.cudnn.benchmark = True
    return accelerator


def _check_trackers(names: list[str]) -> None:
    installed, known = [tracker.value for tracker in get_available_trackers()], [t.value for t in LoggerType]
    for name in names:
        if name not in known:
            raise UserError(f"--report_to {name} is no tracker of Accelerate; there are {', '.join(known)}.")
        if name not in installed and name != "all":
            raise UserError(f"--report_to {name}: that tracker is not installed; pip install {name}.")


def _require_compiler(mode: str, device_type: str) -> None:
    """torch.compile writes C++ for a CPU and, by way of Triton, C for a GPU; it finds out late that it cannot."""
    if device_type == "cpu":
        language, names = "C++", [os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")]
    else:
        language, names = "C", [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, names)):
        raise UserError(
            f"--compile {mode} needs a {language} compiler and there is no {' or '.join(names)} here; install one, e.g."
            " `apt install g++`, or leave out --compile."
        )


def keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks instead of giving them back to the kernel after every step.

    Otherwise each training step on a CPU faults all its activations in again: a quarter of a B0 step's time at 128
    pixels went into 100,000 to 180,000 page faults, and none does with this (benchmarks/2026-11-24-imagenette-cpu.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def allow_tf32(allowed: bool) -> None:
    """Switches TF32 in convolutions and matrix products."""
    # By the older switches: they set the newer ones too, and torch.export raises where only the newer ones were set.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _has_tf32(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def precision_name(recipe: Recipe, accelerator: Accelerator) -> str:
    """fp32, tf32, fp16 or bf16: what the recipe asks for, or else `accelerate launch`."""
    return recipe.precision or accelerator.mixed_precision.replace("no", "fp32")


def wants_channels_last(recipe: Recipe, accelerator: Accelerator) -> bool:
    """The recipe's choice; by default on, except for fp32 and TF32 on CUDA, where the original stays with NCHW."""
    if recipe.channels_last is not None:
        return recipe.channels_last
    return accelerator.device.type != "cuda" or accelerator.mixed_precision != "no"
