"""A global batch is divided exactly or refused with the numbers."""

import pytest

from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training.batches import plan_batches


@pytest.mark.parametrize(  # nvidia_original 3.1: accumulation on 8 GPUs
    "per_device, steps", [(128, 4), (64, 8), (32, 16), (16, 32), (256, 2)]
)
def test_published_accumulation_on_eight_gpus(per_device, steps):
    plan = plan_batches(Recipe(per_device_batch_size=per_device), 8, "cuda", 224)
    assert plan.accumulation_steps == steps and plan.global_batch_size == 4096
    assert str(plan) == f"4096 = {per_device} per device x 8 processes x {steps} accumulated"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [24, 48, 96, 4104])
@pytest.mark.parametrize("device, size", [("cpu", 224), ("cuda", 224), ("cuda", 600)])
def test_derived_division_is_exact_and_bounded(world, total, device, size):
    plan = plan_batches(Recipe(global_batch_size=total), world, device, size)
    assert plan.per_device * world * plan.accumulation_steps == total
    assert plan.per_device <= (32 if device == "cpu" else 256)


def test_a_batch_that_divides_into_crumbs_only_is_refused():
    with pytest.raises(UserError, match="1433 divides into batches of 1 per device only.*; 1432 divides better"):
        plan_batches(Recipe(global_batch_size=1433), 1, "cpu", 224)
    assert plan_batches(Recipe(global_batch_size=5), 1, "cpu", 224).per_device == 5
    assert plan_batches(Recipe(global_batch_size=1433, per_device_batch_size=1), 1, "cpu", 224).per_device == 1


def test_uneven_division_names_a_batch_that_works():
    with pytest.raises(UserError, match="--global_batch_size 100 cannot be shared evenly by 3 processes; 99 can"):
        plan_batches(Recipe(global_batch_size=100), 3, "cpu", 224)
    with pytest.raises(UserError, match="not a multiple of --per_device_batch_size 48 x 2 processes; 96 is"):
        plan_batches(Recipe(global_batch_size=100, per_device_batch_size=48), 2, "cpu", 224)
