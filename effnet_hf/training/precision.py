"""The Accelerator of a recipe: precision, determinism, trackers."""

import contextlib
import ctypes
import os
import warnings
from collections.abc import Iterator
from inspect import signature

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradScalerKwargs,
    LoggerType,
    ProjectConfiguration,
)
from torch.nn.parallel import DistributedDataParallel

from ..configuration import EfficientNetNVConfig
from ..errors import UserError
from ..recipes import Recipe
from ..run_folder import RunFolder
from .compilation import require_compiler
from .launcher import launcher_precision
from .resume import precision_of_resumed


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def settle_precision(recipe: Recipe, default: str | None = None, resumed: str | None = None) -> tuple[Recipe, str]:
    """The recipe with a precision, and a sentence for the console where nobody typed one on a GPU.

    The recipe's own (`--precision`, `--hardware`, a line of its file) wins over what `accelerate launch` was told, that
    over what the `resumed` run was trained in, and that over `default`, by default the fastest that this GPU trains
    well in: bf16 from compute capability 8.0 on, fp16 on older tensor cores. Quantization-aware training stays in
    fp32, as the original's.
    """
    if recipe.precision is not None:
        with contextlib.suppress(UserError):  # what the launcher was told does not matter then
            told, reason = launcher_precision()
            if told not in (None, recipe.precision):
                return recipe, f"precision {recipe.precision}, as the recipe or a flag says; not {told}, {reason}"
        return recipe, ""
    name, reason = launcher_precision()
    if name is None and resumed is not None:
        name, reason = resumed, "as before"
    elif name is None:
        name = default or ("fp32" if recipe.placement != "none" else fastest_precision())
        reason = "the default for int8" if recipe.placement != "none" else "the default on this GPU"
    settled = recipe.replace(precision=name)
    if not torch.cuda.is_available() or default is not None:
        return settled, ""
    other = "bf16 and fp16 are usually faster" if name == "fp32" else "--precision fp32 is exact, and slower"
    return settled, f"precision {name}, {reason}; {other}"


def fastest_precision() -> str:
    """`bf16`, `fp16` or `fp32`, by the tensor cores of all GPUs that this process sees."""
    if not torch.cuda.is_available():
        return "fp32"
    oldest = min(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    return "bf16" if oldest >= (8, 0) or torch.version.hip else "fp16" if oldest >= (7, 0) else "fp32"


def start_accelerator(recipe: Recipe, default: str | None = None) -> tuple[Recipe, Accelerator, str]:
    """The recipe with its precision settled, its Accelerator, and a sentence for the console; see the two functions.

    Raises:
        UserError: see [`make_accelerator`].
    """
    recipe, chosen = settle_precision(recipe, default, resumed=precision_of_resumed(recipe))
    return recipe, make_accelerator(recipe), chosen


def make_accelerator(recipe: Recipe) -> Accelerator:
    """Builds the Accelerator of a recipe whose precision is settled.

    fp32 means fp32: TF32 is off unless asked for (torch would use it in convolutions by default). The fp16 loss scale
    starts at 128 and, unless `dynamic_loss_scale`, only ever shrinks, as in the original's recipe.

    Raises:
        UserError: a precision or compiler that this machine lacks.
    """
    _check_trackers(recipe.report_to)
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise UserError(
            f"accelerate launch asks for --dynamo_backend {backend}; leave that out and give --compile full, blocks or"
            " graphs instead."
        )
    # Before the first product: cuBLAS reads it once.
    if recipe.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    handlers = [
        GradScalerKwargs(init_scale=recipe.loss_scale, growth_interval=100 if recipe.dynamic_loss_scale else 10**9),
        _ddp_settings(),
    ]
    try:
        accelerator = Accelerator(
            # Said aloud, because Accelerate otherwise takes `torchrun` on a machine without a GPU for single processes.
            cpu=not torch.accelerator.is_available(),
            mixed_precision=recipe.precision if recipe.precision in ("fp16", "bf16") else "no",
            kwargs_handlers=handlers,
            log_with=recipe.report_to or None,
            project_config=ProjectConfiguration(
                project_dir=recipe.output_dir, logging_dir=str(RunFolder(recipe.output_dir).logs)
            ),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        if AcceleratorState._shared_state and "already been initialized" in str(error):
            raise UserError(
                f"this process has an Accelerator of its own, in {AcceleratorState().mixed_precision}, and Accelerate"
                f" keeps to one precision per process; this run wants {recipe.precision}: run it before that one is"
                " made, or in another process."
            ) from None
        raise UserError(f"Accelerate refuses this set-up: {' '.join(str(error).split())}") from error
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16.")
    if recipe.precision == "tf32" and not _has_tf32(accelerator.device):
        raise UserError("--precision tf32 needs an NVIDIA GPU of the Ampere generation or newer; use fp32 here.")
    if recipe.sync_batch_norm and accelerator.device.type != "cuda":
        raise UserError("--sync_batch_norm needs GPUs: torch has no synchronised batch norm on a CPU.")
    if recipe.compile != "none":
        require_compiler(recipe.compile, accelerator.device.type)
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    allow_tf32(recipe.precision == "tf32")
    make_deterministic(recipe.deterministic)
    return accelerator


@contextlib.contextmanager
def leaving_as_found() -> Iterator[None]:
    """Around a run in somebody's process, such as a notebook's: torch's switches are what they were before, and the
    next Accelerator may have another precision, which Accelerate otherwise keeps for the life of a process."""
    cudnn, of_another = torch.backends.cudnn, bool(AcceleratorState._shared_state)
    found = {name: getattr(cudnn, name) for name in ("benchmark", "deterministic")}
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    tf32 = _tf32()
    try:
        yield
    finally:
        for name, value in found.items():
            setattr(cudnn, name, value)
        torch.use_deterministic_algorithms(strict, warn_only=warns)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        if tf32 is not None:
            allow_tf32(*tf32)
        if not of_another:
            AcceleratorState._reset_state()


def _ddp_settings() -> DistributedDataParallelKwargs:
    """Batch norm's statistics need no broadcast in every step: they are shared before they are used (`Run`)."""
    settings = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    names = signature(DistributedDataParallel.__init__).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # before torch 2.15
    # Not as a field: Accelerate knows the older name only, at which torch warns.
    settings.to_kwargs = lambda: {"gradient_as_bucket_view": True, name: False}
    return settings


def make_deterministic(wanted: bool) -> None:
    """Kernels that give the same bits in every run, or (False) the fastest that cuDNN finds by trying."""
    torch.backends.cudnn.benchmark = not wanted
    torch.backends.cudnn.deterministic = wanted
    torch.use_deterministic_algorithms(wanted)
    # Filling fresh memory shows who reads it uninitialised; it costs a pass over memory and changes no result of ours.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def _check_trackers(names: list[str]) -> None:
    installed, known = [tracker.value for tracker in get_available_trackers()], [t.value for t in LoggerType]
    for name in names:
        if name not in known:
            raise UserError(
                f"--report_to {name} is not a tracker that Accelerate knows; choose from {', '.join(known)}."
            )
        if name not in installed and name != "all":
            raise UserError(f"--report_to {name}: that tracker is not installed; pip install {name}.")


def keep_freed_memory() -> None:
    """Lets glibc keep large freed blocks instead of giving them back to the kernel after every step.

    Otherwise each training step on a CPU faults all its activations in again: a quarter of a B0 step's time at 128
    pixels went into 100,000 to 180,000 page faults, and none does with this (benchmarks/2026-11-24-imagenette-cpu.md).
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library: nothing to tune
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def allow_tf32(allowed: bool, in_products: bool | None = None) -> None:
    """Switches TF32 in convolutions, and as these (or as `in_products` says) in matrix products."""
    # By the older switches: they set the newer ones too, and torch.export raises where only the newer ones were set.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.backends.cudnn.allow_tf32 = allowed
        torch.backends.cuda.matmul.allow_tf32 = allowed if in_products is None else in_products


def _tf32() -> tuple[bool, bool] | None:
    """Whether TF32 is on in convolutions, and in products; None where only torch's newer switches can say."""
    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    return None


def _has_tf32(device: torch.device) -> bool:
    return (
        device.type == "cuda" and torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def refuse_unwritten_gradients(config: EfficientNetNVConfig, image_size: int) -> None:
    """Of bf16 on a CPU: where a strided depthwise convolution sees a map of one position, oneDNN's gradient of its
    weight is partly memory that nobody wrote (seen in torch 2.11 and 2.15).

    Raises:
        UserError: this network at this size has such a map.
    """
    side = -(-image_size // 2)
    for stride in config.strides:
        if stride > 1 and side == 1:
            raise UserError(
                f"--precision bf16 on a CPU cannot train on images of {image_size} px: oneDNN's gradients are wrong"
                " where a strided convolution sees a single position; use --precision fp32 or larger images."
            )
        side = -(-side // stride)


def wants_channels_last(recipe: Recipe, accelerator: Accelerator) -> bool:
    """The recipe's choice; by default on, except for fp32 and TF32 on CUDA, where the original stays with NCHW."""
    if recipe.channels_last is not None:
        return recipe.channels_last
    return accelerator.device.type != "cuda" or accelerator.mixed_precision != "no"
