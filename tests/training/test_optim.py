"""Optimizers, schedules and loss against the original's tables and an independent float64 re-implementation."""

import math

import numpy as np
import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.recipes import Recipe, load_recipe
from effnet_hf.training.optim import (
    build_optimizer,
    learning_rate,
    parameter_groups,
    peak_learning_rate,
    set_learning_rate,
    training_loss,
)


def model_on_meta(variant):
    with torch.device("meta"):
        return EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant))


@pytest.mark.parametrize("variant, tensors", [("b0", (98, 115)), ("b4", (192, 226))])
def test_groups_are_batch_norm_and_the_rest(variant, tensors):
    norms, rest = parameter_groups(model_on_meta(variant), load_recipe("b0"))
    assert (len(norms["params"]), len(rest["params"])) == tensors
    assert (norms["weight_decay"], rest["weight_decay"]) == (0.0, 1e-5)
    if variant == "b0":
        assert sum(p.numel() for p in norms["params"]) == 42_016
        assert sum(p.numel() for p in rest["params"]) == 5_246_532


def test_batch_norm_shared_by_the_devices_is_batch_norm_too():
    model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model_on_meta("b0"))
    assert [len(group["params"]) for group in parameter_groups(model, Recipe())] == [98, 115]


def test_batch_norm_can_be_decayed_too():
    norms, _ = parameter_groups(model_on_meta("b0"), Recipe(bn_weight_decay=True, weight_decay=0.5))
    assert norms["weight_decay"] == 0.5


# nvidia_original 3.4: the published rates of B0; B4 has twice as much
B0_RATES = {0: 0.005, 1: 0.01, 15: 0.08, 16: 0.08, 100: 0.07092, 208: 0.04, 300: 0.012656, 399: 1.339e-6}
QUANT_B0_RATES = [0.0125, 0.012194, 0.011306, 0.009924, 0.008181, 0.00625, 0.004319, 0.002576, 0.001194, 0.000306]


@pytest.mark.parametrize("name, factor", [("b0", 1), ("b4", 2)])
def test_published_learning_rates(name, factor):
    recipe = load_recipe(name)
    for epoch, rate in B0_RATES.items():
        # the same rate at every step of the epoch
        assert learning_rate(recipe, epoch, 0, 312) == pytest.approx(factor * rate, rel=1e-3)
        assert learning_rate(recipe, epoch, 311, 312) == learning_rate(recipe, epoch, 0, 312)


def test_published_quantization_rates():
    cosine = Recipe(epochs=10, warmup_epochs=0, learning_rate=0.0125, lr_scaling="none")
    assert [learning_rate(cosine, e, 0, 1) for e in range(10)] == pytest.approx(QUANT_B0_RATES, abs=1e-6)
    linear = Recipe(epochs=2, warmup_epochs=0, learning_rate=4.09e-6, lr_schedule="linear", lr_scaling="none")
    assert [learning_rate(linear, e, 0, 1) for e in range(2)] == pytest.approx([4.09e-6, 2.045e-6])


def test_step_schedule_drops_at_its_milestones():
    recipe = Recipe(epochs=90, warmup_epochs=0, learning_rate=1.0, lr_schedule="step", lr_scaling="none")
    rates = [learning_rate(recipe, epoch, 0, 1) for epoch in (0, 29, 30, 59, 60, 79, 80, 89)]
    assert rates == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_cosine_ends_at_end_lr_and_constant_stays():
    recipe = Recipe(epochs=10, warmup_epochs=0, learning_rate=1.0, end_lr=0.1, lr_scaling="none", lr_update="step")
    assert learning_rate(recipe, 9, 999, 1000) == pytest.approx(0.1, abs=1e-5)
    assert learning_rate(recipe.replace(lr_schedule="constant"), 9, 0, 1000) == 1.0


def test_per_step_schedule_is_continuous_and_monotone_around_the_peak():
    recipe = load_recipe("b0", lr_update="step")
    rates = [learning_rate(recipe, epoch, update, 10) for epoch in range(400) for update in range(10)]
    peak = max(range(len(rates)), key=rates.__getitem__)
    assert rates[peak] == pytest.approx(0.08)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert max(abs(a - b) for a, b in zip(rates, rates[1:])) < 0.08 / 159


def test_rate_follows_the_global_batch():
    recipe = load_recipe("b0", global_batch_size=1024)
    assert peak_learning_rate(recipe) == pytest.approx(0.02)
    assert peak_learning_rate(recipe.replace(lr_scaling="sqrt")) == pytest.approx(0.04)
    assert peak_learning_rate(recipe.replace(lr_scaling="none")) == 0.08


def soft_cross_entropy(logits, targets, smoothing):
    """nvidia_original 3.6, in numpy: (1 - eps) * -sum(t log p) + eps * mean(-log p)."""
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    return ((1 - smoothing) * -(targets * log_p).sum(1) + smoothing * -log_p.mean(1)).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_loss_is_the_originals(smoothing, soft):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    targets = np.eye(5)[labels]
    if soft:
        targets = 0.3 * targets + 0.7 * targets[::-1]
    given = torch.tensor(targets if soft else labels, dtype=torch.float64 if soft else torch.int64)
    given = given.float() if soft else given
    loss = training_loss(torch.tensor(logits, dtype=torch.float32), given, smoothing)
    assert loss.item() == pytest.approx(soft_cross_entropy(logits, targets, smoothing), rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
def test_class_weights_multiply_each_classs_term_and_a_batch_is_the_mean_of_its_parts(smoothing, soft):
    rng = np.random.default_rng(0)
    logits, labels, weights = rng.normal(size=(8, 5)), rng.integers(0, 5, 8), rng.uniform(0.1, 9, 5)
    targets = np.eye(5)[labels]
    if soft:
        targets = 0.3 * targets + 0.7 * targets[::-1]
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -(weights * (targets * (1 - smoothing) + smoothing / 5) * log_p).sum(1).mean()
    given = torch.tensor(targets) if soft else torch.tensor(labels)
    own = torch.tensor(weights, dtype=torch.float32)

    def loss_and_gradient(rows):
        x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
        part = given[rows].float() if soft else given[rows]
        loss = training_loss(x[rows], part, smoothing, class_weights=own)
        (gradient,) = torch.autograd.grad(loss, x)
        return loss.item(), gradient

    loss, gradient = loss_and_gradient(slice(None))
    parts = [loss_and_gradient(slice(i, i + 2)) for i in range(0, 8, 2)]
    assert loss == pytest.approx(expected, rel=1e-5)
    assert np.mean([part for part, _ in parts]) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(torch.stack([part for _, part in parts]).mean(0), gradient, atol=1e-6)


def test_equal_weights_change_nothing_and_several_labels_weigh_the_ones():
    torch.manual_seed(0)
    logits, labels, several = torch.randn(6, 4), torch.arange(6) % 4, torch.randint(2, (6, 4)).float()
    assert training_loss(logits, labels, 0.1, class_weights=torch.ones(4)) == pytest.approx(
        training_loss(logits, labels, 0.1).item(), rel=1e-6
    )
    weights = torch.tensor([1.0, 2.0, 5.0, 0.5])
    p = logits.sigmoid()
    by_hand = -(weights * several * p.log() + (1 - several) * (1 - p).log()).mean()
    loss = training_loss(logits, several, 0.0, multi_label=True, class_weights=weights)
    assert loss == pytest.approx(by_hand.item(), rel=1e-5)


def rmsprop_step(state, weight, gradient, rate, decay, alpha=0.9, eps=0.01, momentum=0.9):
    """torch's RMSprop in numpy float64: coupled decay, eps outside the root, rate outside the buffer."""
    gradient = gradient + decay * weight
    state["v"] = alpha * state.get("v", 0.0) + (1 - alpha) * gradient**2
    state["buf"] = momentum * state.get("buf", 0.0) + gradient / (np.sqrt(state["v"]) + eps)
    return weight - rate * state["buf"]


def sgd_step(state, weight, gradient, rate, decay, momentum=0.9, nesterov=False):
    gradient = gradient + decay * weight
    state["buf"] = gradient if "buf" not in state else momentum * state["buf"] + gradient
    return weight - rate * (gradient + momentum * state["buf"] if nesterov else state["buf"])


@pytest.mark.parametrize(
    "settings, reference",
    [
        ({"optimizer": "rmsprop"}, rmsprop_step),
        ({"optimizer": "sgd"}, sgd_step),
        ({"optimizer": "sgd", "nesterov": True}, lambda *a, **k: sgd_step(*a, **k, nesterov=True)),
    ],
    ids=["rmsprop", "sgd", "nesterov"],
)
def test_three_optimizer_steps_equal_a_float64_reimplementation(settings, reference):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8), torch.nn.Flatten())
    recipe = Recipe(weight_decay=0.05, learning_rate=0.1, lr_scaling="none", warmup_epochs=0, **settings)
    optimizer = build_optimizer(model, recipe)
    weights = {name: p.detach().double().numpy().copy() for name, p in model.named_parameters()}
    states = {name: {} for name in weights}
    rng = np.random.default_rng(1)
    for step in range(3):
        rate = 0.1 / (step + 1)
        set_learning_rate(optimizer, rate)
        for name, parameter in model.named_parameters():
            gradient = rng.normal(size=parameter.shape)
            parameter.grad = torch.tensor(gradient, dtype=torch.float32)
            decay = 0.0 if name.startswith("1.") else 0.05
            weights[name] = reference(
                states[name], weights[name], gradient.astype(np.float32).astype(float), rate, decay
            )
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), weights[name], rtol=1e-5, atol=1e-6)


def test_adamw_uses_its_betas():
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Recipe(optimizer="adamw", adam_betas=[0.8, 0.95]))
    assert optimizer.defaults["betas"] == (0.8, 0.95) and math.isclose(optimizer.defaults["lr"], 0.08)


@pytest.mark.parametrize(
    ("settings", "form"),
    [({"optimizer": "rmsprop"}, {"foreach": False}), ({"optimizer": "sgd"}, {"fused": True}),
     ({"optimizer": "adamw"}, {"fused": True})],
    ids=["rmsprop", "sgd", "adamw"],
)  # fmt: skip
def test_each_optimizer_takes_the_form_that_is_fastest_on_a_cpu(settings, form):
    optimizer = build_optimizer(torch.nn.Linear(2, 2), Recipe(**settings))
    assert all(group[name] is value for group in optimizer.param_groups for name, value in form.items())
