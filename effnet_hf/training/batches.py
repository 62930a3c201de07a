"""From a global batch to what each device handles at once."""

import math
from dataclasses import dataclass

from ..errors import UserError
from ..recipes import Recipe


LEAST = 8  # pictures at once that batch norm's statistics may be of, when the division is ours to choose


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch_size = per_device * world_size * accumulation_steps`, always exactly."""

    per_device: int
    world_size: int
    accumulation_steps: int

    @property
    def global_batch_size(self) -> int:
        return self.per_device * self.world_size * self.accumulation_steps

    def __str__(self) -> str:
        devices = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        parts = f"{self.per_device} per device x {devices} x {self.accumulation_steps} accumulated"
        return f"{self.global_batch_size} = {parts}"


def plan_batches(recipe: Recipe, world_size: int, device_type: str, image_size: int) -> BatchPlan:
    """How a step's pictures are divided.

    Without `per_device_batch_size` the largest even division that a device surely holds is taken: 32 pictures on a
    CPU; on an accelerator 256 pictures of 224 x 224 pixels (NVIDIA's figure for B0 on 32 GB), fewer if they are larger.

    Raises:
        UserError: the numbers do not divide, or into tiny batches only; the sentence names the nearest
            global batch that does better.
    """
    total = recipe.global_batch_size
    if total % world_size:
        raise UserError(
            f"--global_batch_size {total} cannot be shared evenly by {world_size} processes;"
            f" {_nearest_multiple(total, world_size)} can."
        )
    share = total // world_size
    per_device = recipe.per_device_batch_size
    if per_device is None:
        most = 32 if device_type == "cpu" else max(1, int(256 * (224 / image_size) ** 2))
        per_device = max(size for size in range(1, min(share, most) + 1) if share % size == 0)
        if per_device < min(share, most, LEAST):
            better = _nearest_multiple(total, min(most, LEAST) * world_size)
            raise UserError(
                f"--global_batch_size {total} divides into batches of {per_device} per device only, and batch norm"
                f" wants more pictures at once; {better} divides better."
            )
    if share % per_device:
        raise UserError(
            f"--global_batch_size {total} is not a multiple of --per_device_batch_size {per_device} x {world_size}"
            f" processes; {_nearest_multiple(total, per_device * world_size)} is."
        )
    return BatchPlan(per_device, world_size, share // per_device)


def _nearest_multiple(value: int, factor: int) -> int:
    return max(1, math.floor(value / factor + 0.5)) * factor
