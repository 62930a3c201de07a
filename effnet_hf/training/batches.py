"""From a global batch to what each device handles at once."""

import math

from accelerate import Accelerator

from ..data import BatchPlan
from ..errors import UserError
from ..recipes import Recipe
from .memory import MIB, Need, training_need, usable_memory
from .model import Start


LEAST = 8  # images at once that batch norm's statistics may be of, when the division is ours to choose
# NVIDIA's largest batch per device: batch norm's statistics are per device, and beyond it nobody published an accuracy.
MOST = 256
MOST_ON_CPU = 32
_INDEXABLE = 2**31  # elements of a tensor that every CUDA kernel can count


def plan_for(recipe: Recipe, start: Start, accelerator: Accelerator) -> BatchPlan:
    """How this launch divides a step's images; the Accelerator is told, too. A collective call.

    Raises:
        UserError: see [`plan_batches`].
    """
    memory, need = usable_memory(accelerator), None
    if memory is not None and recipe.per_device_batch_size is None:
        teacher = start.teacher.config if start.teacher is not None else None
        need = training_need(recipe, start.config, start.image_size, recipe.precision or "fp32", teacher)
    plan = plan_batches(recipe, accelerator.num_processes, accelerator.process_index, memory, need)
    accelerator.gradient_accumulation_steps = plan.accumulation_steps
    return plan


def plan_batches(
    recipe: Recipe, world_size: int, rank: int = 0, memory: int | None = None, need: Need | None = None
) -> BatchPlan:
    """How a step's images are divided.

    Without `per_device_batch_size` the largest even division is taken that fits into the device's memory, of at most
    256 images; without a known memory (a CPU), of at most 32.

    Args:
        memory: bytes that training may take on each device, see [`usable_memory`]; the same on every process.
        need: what training takes of it, see [`training_need`].

    Raises:
        UserError: the numbers do not divide, or into tiny batches only (the sentence names the nearest global batch
            that does better), or the memory does not hold a single image.
    """
    total = recipe.global_batch_size
    if total % world_size:
        raise UserError(
            f"--global_batch_size {total} cannot be shared evenly by {world_size} processes;"
            f" {_nearest_multiple(total, world_size)} can."
        )
    share = total // world_size
    per_device, reason = recipe.per_device_batch_size, ""
    if per_device is None:
        most = MOST_ON_CPU
        if memory is not None and need is not None:
            most, reason = _fitting(need, memory, min(share, MOST))
        per_device = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
        least = min(LEAST, 2 ** (most.bit_length() - 1))  # a power of two is enough where the memory holds fewer
        if per_device < min(share, LEAST):
            reason += f"; batch norm sees {per_device} at once, --gradient_checkpointing true makes room for more"
        if per_device < min(share, least):
            better = _nearest_multiple(total, least * world_size)
            raise UserError(
                f"--global_batch_size {total} divides into batches of {per_device} per device only, and batch norm"
                f" wants more images at once; {better} divides better."
            )
    if share % per_device:
        raise UserError(
            f"--global_batch_size {total} is not a multiple of --per_device_batch_size {per_device} x {world_size}"
            f" processes; {_nearest_multiple(total, per_device * world_size)} is, or give --per_device_batch_size"
            f" {max(size for size in range(1, per_device + 1) if share % size == 0)}."
        )
    return BatchPlan(per_device, world_size, share // per_device, rank, reason)


def _fitting(need: Need, memory: int, wanted: int) -> tuple[int, str]:
    """The images that fit, at most `wanted`, and what limits them if they are fewer."""
    fitting = int((memory - need.fixed) / need.per_image)
    what = f"{need.what}: {need.per_image / MIB:,.0f} MiB an image in {need.precision}"
    limit = f"{memory / MIB / 1024:.0f} GiB to use"
    if fitting < 1:
        raise UserError(
            f"{what} and {need.fixed / MIB:,.0f} MiB besides, but a device has {limit};"
            " lower --image_size or give --gradient_checkpointing true."
        )
    countable = max(1, (_INDEXABLE - 1) // need.largest_map)
    if min(fitting, countable) >= wanted:
        return wanted, ""
    if countable < fitting:
        return countable, f"a larger batch of {need.what} has maps of over 2^31 elements"
    return fitting, f"{what}, {limit}"


def _nearest_multiple(value: int, factor: int) -> int:
    return max(1, math.floor(value / factor + 0.5)) * factor
