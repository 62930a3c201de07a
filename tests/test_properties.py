"""What must hold for any input, tried on a hundred drawn ones: configuration, sampler, schedule, converters."""

import json
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from effnet_hf import EfficientNetNVConfig
from effnet_hf.configuration import VARIANTS
from effnet_hf.conversion import DIALECTS
from effnet_hf.conversion.dialect import expected_shapes
from effnet_hf.data.sampler import TrainingPlan, ValidationPlan
from effnet_hf.errors import UserError
from effnet_hf.recipes import Recipe
from effnet_hf.training.optim import learning_rate, peak_learning_rate


settings.register_profile(
    "ours", derandomize=True, deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("ours")


# Configuration

FIELDS = {
    "image_size": st.integers(1, 2000),
    "num_channels": st.integers(1, 8),
    "width_coefficient": st.floats(0.1, 4),
    "depth_coefficient": st.floats(0.1, 4),
    "depth_divisor": st.sampled_from([1, 4, 8, 16]),
    "stem_channels": st.integers(1, 64),
    "head_channels": st.integers(1, 2000),
    "scale_stem_and_head": st.booleans(),
    "se_ratio": st.floats(0, 1),
    "se_base": st.sampled_from(["input", "hidden"]),
    "dropout_rate": st.floats(0, 1, exclude_max=True),
    "survival_prob": st.floats(0, 1, exclude_min=True),
    "stochastic_depth_mode": st.sampled_from(["batch", "row"]),
    "batch_norm_eps": st.floats(1e-8, 1),
    "batch_norm_momentum": st.floats(0, 1),
    "conv_init": st.sampled_from(["fan_in", "fan_out"]),
    "hidden_act": st.sampled_from(["silu", "relu", "gelu"]),
    "padding": st.sampled_from(["symmetric", "same"]),
    "num_labels": st.integers(1, 50),
}
NONSENSE = st.one_of(st.none(), st.text(max_size=5), st.just(math.nan), st.just(math.inf), st.just(-1), st.just([]))


@st.composite
def block_tables(draw):
    stages = draw(st.integers(1, 8))
    return {
        "kernel_sizes": draw(st.lists(st.sampled_from([1, 3, 5, 7]), min_size=stages, max_size=stages)),
        **{
            field: draw(st.lists(st.integers(1, most), min_size=stages, max_size=stages))
            for field, most in (("strides", 2), ("num_block_repeats", 5), ("expand_ratios", 6), ("out_channels", 400))
        },
    }


@given(fields=st.fixed_dictionaries({}, optional=FIELDS), table=block_tables())
def test_any_valid_configuration_survives_json(fields, table):
    config = EfficientNetNVConfig(**fields, **table)
    again = EfficientNetNVConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    assert again.to_dict() == config.to_dict()
    assert again.stages == config.stages and again.id2label == config.id2label
    assert all(0 < prob <= 1 for prob in config.survival_probs) and len(config.survival_probs) == sum(config.depths)
    assert all(width % config.depth_divisor == 0 for width in config.hidden_sizes[1:])


@given(field=st.sampled_from(sorted(FIELDS)), value=NONSENSE)
def test_nonsense_in_any_field_is_a_sentence(field, value):
    assume(not (field == "num_labels" and value is None))  # means "not given"
    with pytest.raises(ValueError) as refused:
        EfficientNetNVConfig(**{field: value})
    assert field in str(refused.value) and "\n" not in str(refused.value)


@given(
    name=st.sampled_from(sorted(set(Recipe().__dataclass_fields__) - {"name"})),
    value=st.one_of(st.just(math.nan), st.just(object()), st.just({"a": 1}), st.just(-(10**9)), st.just(b"x")),
)
def test_nonsense_in_any_option_of_a_recipe_is_a_sentence(name, value):
    with pytest.raises(UserError) as refused:
        Recipe(**{name: value})
    assert "\n" not in str(refused.value) and name in str(refused.value)


# Sampler

PLANS = st.fixed_dictionaries(
    {
        "num_samples": st.integers(1, 300),
        "per_device_batch_size": st.integers(1, 8),
        "seed": st.integers(0, 2**32 - 1),
        "world_size": st.integers(1, 4),
        "steps_per_update": st.integers(1, 4),
    }
)


def ranks(plan: dict) -> list[TrainingPlan]:
    assume(plan["per_device_batch_size"] * plan["world_size"] * plan["steps_per_update"] <= plan["num_samples"])
    return [TrainingPlan(**plan, rank=rank) for rank in range(plan["world_size"])]


def by_slot(plans: list, epoch: int, start_update: int = 0) -> list[list[int]]:
    requests = [request for plan in plans for request in plan.requests(epoch, start_update)]
    return [request.indices.tolist() for request in sorted(requests, key=lambda request: request.slot)]


@given(plan=PLANS, epoch=st.integers(0, 500))
def test_any_plan_shows_each_picture_at_most_once_and_leaves_out_less_than_a_batch(plan, epoch):
    plans = ranks(plan)
    seen = sum(by_slot(plans, epoch), [])
    assert len(seen) == len(set(seen)) and set(seen) <= set(range(plan["num_samples"]))
    assert 0 <= plan["num_samples"] - len(seen) < plans[0].global_batch_size


@given(plan=PLANS, epoch=st.integers(0, 500))
def test_any_division_of_a_global_batch_follows_the_same_order(plan, epoch):
    plans = ranks(plan)
    alone = replace(plans[0], world_size=1, steps_per_update=plan["world_size"] * plan["steps_per_update"])
    assert by_slot(plans, epoch) == by_slot([alone], epoch)


@given(plan=PLANS, epoch=st.integers(0, 500), data=st.data())
def test_resuming_anywhere_gives_the_rest(plan, epoch, data):
    plans = ranks(plan)
    update = data.draw(st.integers(0, plans[0].updates_per_epoch))
    done = update * plan["world_size"] * plan["steps_per_update"]
    assert by_slot(plans, epoch, update) == by_slot(plans, epoch)[done:]


@given(n=st.integers(0, 200), batch=st.integers(1, 9), world=st.integers(1, 5))
def test_validation_shows_each_picture_once_in_order_over_any_ranks(n, batch, world):
    plans = [ValidationPlan(n, batch, rank, world) for rank in range(world)]
    assert sum(by_slot(plans, 0), []) == list(range(n))


# Schedule


@st.composite
def schedules(draw):
    epochs = draw(st.integers(1, 60))
    return Recipe(
        epochs=epochs,
        warmup_epochs=draw(st.one_of(st.just(0), st.floats(0, epochs))),
        learning_rate=draw(st.floats(1e-5, 1)),
        lr_schedule=draw(st.sampled_from(["cosine", "linear", "constant"])),
        lr_update=draw(st.sampled_from(["epoch", "step"])),
        lr_scaling=draw(st.sampled_from(["none", "linear", "sqrt"])),
        global_batch_size=draw(st.sampled_from([32, 256, 4096, 8192])),
    )


def rates(recipe: Recipe, steps: int) -> list[float]:
    return [learning_rate(recipe, epoch, step, steps) for epoch in range(recipe.epochs) for step in range(steps)]


@given(recipe=schedules(), steps=st.integers(1, 20))
def test_rate_stays_between_nothing_and_the_peak_and_falls_after_the_warm_up(recipe, steps):
    peak, found = peak_learning_rate(recipe), rates(recipe, steps)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in found)
    warm = [
        i
        for i in range(len(found))
        if (i // steps if recipe.lr_update == "epoch" else i / steps) < recipe.warmup_epochs
    ]
    rising, falling = found[: len(warm)], found[len(warm) :]
    assert rising == sorted(rising) and all(a >= b - 1e-12 * peak for a, b in zip(falling, falling[1:]))


@given(recipe=schedules(), steps=st.integers(2, 20))
def test_stepwise_rate_has_no_jumps(recipe, steps):
    recipe = recipe.replace(lr_update="step")
    peak, found = peak_learning_rate(recipe), rates(recipe, steps)
    ramp = 1 / max(recipe.warmup_epochs * steps, 1)
    fall = math.pi / 2 / max((recipe.epochs - recipe.warmup_epochs) * steps, 1)
    assert all(
        abs(a - b) <= peak * max(ramp, fall, 1 / steps if recipe.warmup_epochs else 0) * 1.01
        for a, b in zip(found, found[1:])
    )


@given(recipe=schedules(), steps=st.integers(1, 20))
def test_rate_starts_and_ends_where_it_should(recipe, steps):
    peak = peak_learning_rate(recipe)
    if recipe.warmup_epochs == 0:
        assert learning_rate(recipe, 0, 0, steps) == pytest.approx(peak)
    if recipe.lr_schedule != "constant" and recipe.warmup_epochs < recipe.epochs:
        assert learning_rate(recipe, recipe.epochs, 0, steps) == pytest.approx(0, abs=1e-9 * peak)


# Converters: random numbers in every tensor, so that a swap or a transposition cannot hide.

CONFIGS = {name: EfficientNetNVConfig.from_variant(name, num_labels=3) for name in ("b0", "widese-b0", "lite0")}


def state_of(config: EfficientNetNVConfig, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn(2_000_000, generator=generator)

    def tensor(shape):
        count = math.prod(shape)
        start = int(torch.randint(len(pool) - min(count, len(pool) - 1), (1,), generator=generator))
        return pool[start : start + count].reshape(shape) if count else pool[start].reshape(shape)

    return {
        key: torch.tensor(seed % 100) if key.endswith("tracked") else tensor(shape)
        for key, shape in expected_shapes(config).items()
    }


def writable(config: EfficientNetNVConfig) -> list:
    found = []
    for dialect in DIALECTS.values():
        try:
            dialect.write(state_of(config, 0), config)
        except UserError:
            continue
        found.append(dialect)
    return found


PAIRS = [(name, dialect) for name, config in CONFIGS.items() for dialect in writable(config)]


@settings(max_examples=20)
@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 10**6))
def test_round_trip_through_any_dialect_is_bit_exact(pair, seed):
    name, dialect = pair
    state = state_of(CONFIGS[name], seed)
    back = dialect.read(dialect.write(state, CONFIGS[name]), CONFIGS[name], "x.pth")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)


@settings(max_examples=30)
@given(pair=st.sampled_from(PAIRS), data=st.data())
def test_any_damage_to_a_state_dict_is_a_sentence(pair, data):
    name, dialect = pair
    tensors = dialect.write(state_of(CONFIGS[name], 0), CONFIGS[name])
    chosen = data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=5, unique=True))
    for key in chosen:
        tensor = tensors.pop(key)
        kind = data.draw(st.sampled_from(["missing", "renamed", "longer", "flat"]))
        if kind == "renamed":
            tensors[f"{key}_"] = tensor
        elif kind == "longer":
            tensors[key] = torch.zeros((*tensor.shape[:-1], tensor.shape[-1] + 1) if tensor.dim() else (2,))
        elif kind == "flat":
            tensors[key] = tensor.reshape(-1, 1, 1, 1, 1)
    with pytest.raises(UserError) as refused:
        dialect.read(tensors, CONFIGS[name], "x.pth")
    assert "\n" not in str(refused.value) and "x.pth" in str(refused.value)


def test_every_dialect_takes_part():
    assert {dialect.name for _, dialect in PAIRS} == set(DIALECTS) and set(CONFIGS) < set(VARIANTS)
