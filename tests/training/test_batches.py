"""A global batch is divided exactly or refused with the numbers, and a device gets what its memory holds."""

import pytest

from effnet_hf import EfficientNetNVConfig
from effnet_hf.data import BatchPlan
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe, available_recipes, load_recipe
from effnet_hf.training.batches import plan_batches
from effnet_hf.training.memory import Need, training_need


GIB = 2**30
H100 = int(0.85 * 79.1 * GIB)  # what `usable_memory` says there


def need_of(recipe: Recipe, image_size: int, precision: str) -> Need:
    return training_need(recipe, recipe.model_config(), image_size, precision)


def fitted(recipe: Recipe, world: int, image_size: int, precision: str, memory: int) -> BatchPlan:
    return plan_batches(recipe, world, 0, memory, need_of(recipe, image_size, precision))


@pytest.mark.parametrize(  # nvidia_original 3.1: accumulation on 8 GPUs
    "per_device, steps", [(128, 4), (64, 8), (32, 16), (16, 32), (256, 2)]
)
def test_published_accumulation_on_eight_gpus(per_device, steps):
    plan = plan_batches(Recipe(per_device_batch_size=per_device), 8)
    assert plan.accumulation_steps == steps and plan.global_batch_size == 4096
    assert str(plan) == f"4096 = {per_device} per device x 8 processes x {steps} accumulated"


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("total", [24, 48, 96, 4104])
@pytest.mark.parametrize("memory, size", [(None, 224), (H100, 224), (H100, 600)])
def test_derived_division_is_exact_and_bounded(world, total, memory, size):
    recipe = Recipe(global_batch_size=total)
    plan = plan_batches(recipe, world, 0, memory, memory and need_of(recipe, size, "fp32"))
    assert plan.per_device * world * plan.accumulation_steps == total
    assert plan.per_device <= (32 if memory is None else 256)


@pytest.mark.parametrize("name", [name for name in available_recipes() if name[:2] in ("b0", "b4", "b7", "wi")])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("gib", [8, 16, 79])
def test_the_derived_batch_fits_and_the_next_larger_does_not(name, precision, gib):
    recipe, memory = load_recipe(name), gib * GIB
    size = recipe.model_config().image_size
    need = need_of(recipe, size, precision)
    plan = plan_batches(recipe, 8, 0, memory, need)
    assert need.fixed + plan.per_device * need.per_image <= memory
    twice = need.fixed + 2 * plan.per_device * need.per_image
    assert plan.per_device == 256 or twice > memory  # 4,096 halves evenly; nobody published more than 256
    assert bool(plan.reason) == (plan.per_device < 256)


def test_the_line_says_what_the_memory_decided():
    plan = fitted(load_recipe("b7", hardware="h100"), 8, 600, "bf16", H100)
    assert plan.per_device == 32
    assert str(plan).startswith("4096 = 32 per device x 8 processes x 16 accumulated (b7 at 600 px: 1,8")
    assert str(plan).endswith(" MiB an image in bf16, 67 GiB to use)")
    assert fitted(load_recipe("b0"), 8, 224, "bf16", H100).reason == ""


def test_checkpointing_lets_more_in_and_no_tensor_passes_what_kernels_count():
    recipe = load_recipe("b7", gradient_checkpointing=True)
    assert fitted(recipe, 8, 600, "bf16", H100).per_device == 64
    large = fitted(recipe, 8, 600, "bf16", 10 * H100)  # 256 x 192 x 300 x 300 elements would be over 2^31
    assert large.per_device == 64 and "2^31 elements" in large.reason


@pytest.mark.parametrize("averaged", [0.0, 0.9999])
def test_optimizer_and_moving_average_take_their_copies_of_the_weights(averaged):
    need = need_of(load_recipe("b4", ema_decay=averaged), 380, "bf16")
    # weights, gradients, autocast's casts and DDP's buckets, RMSprop's two
    assert need.fixed == 4 * 19_341_616 * (5 + bool(averaged))
    assert need_of(load_recipe("b4", optimizer="sgd"), 380, "bf16").fixed == 4 * 19_341_616 * 4


def test_a_teacher_and_quantizers_take_their_share():
    plain = need_of(load_recipe("b0"), 224, "bf16")
    recipe, teacher = load_recipe("b0", distillation_weight=0.5), EfficientNetNVConfig.from_variant("b4")
    taught = training_need(recipe, recipe.model_config(), 224, "bf16", teacher)
    assert taught.per_image > plain.per_image and taught.fixed > plain.fixed + 4 * 19_341_616
    quantized = load_recipe("quant-b0", optimizer="rmsprop")
    assert need_of(quantized, 224, "bf16").per_image == 2 * plain.per_image


def test_not_even_one_image_is_a_sentence():
    named = r"b7 at 4000 px: [\d,]+ MiB an image in fp32 .* has 8 GiB to use; lower --image_size or give --gradient_ch"
    with pytest.raises(UserError, match=named):
        fitted(load_recipe("b7"), 1, 4000, "fp32", 8 * GIB)


def test_a_batch_that_divides_into_crumbs_only_is_refused():
    with pytest.raises(UserError, match="1433 divides into batches of 1 per device only.*; 1432 divides better"):
        plan_batches(Recipe(global_batch_size=1433), 1)
    assert plan_batches(Recipe(global_batch_size=5), 1).per_device == 5
    few = fitted(load_recipe("b7"), 8, 600, "bf16", 15 * GIB)  # holds 7, of which 4 divide 4,096
    assert few.per_device == 4
    assert plan_batches(Recipe(global_batch_size=1433, per_device_batch_size=1), 1).per_device == 1


def test_uneven_division_names_a_batch_that_works():
    with pytest.raises(UserError, match="--global_batch_size 100 cannot be shared evenly by 3 processes; 99 can"):
        plan_batches(Recipe(global_batch_size=100), 3)
    with pytest.raises(UserError, match="not a multiple of --per_device_batch_size 48 x 2 processes; 96 is"):
        plan_batches(Recipe(global_batch_size=100, per_device_batch_size=48), 2)
