"""Fresh weights, the regularisers, and activation checkpointing: what training relies on and evaluation never shows."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.modeling_efficientnet_nv import StochasticDepth


@pytest.fixture
def pixels():
    return torch.randn(8, 3, 32, 32)


@pytest.fixture(scope="module")
def fresh_b0():
    torch.manual_seed(0)
    return EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant("b0"))


# Initialisation -----------------------------------------------------------------------------------------------------


def assert_is_kaiming_normal(weights: list[torch.Tensor], fans: list[int]) -> None:
    """Pooled over layers, weights over sqrt(2 / fan) are standard normal: their first moments, and no layer is off."""
    weights = [weight.detach() for weight in weights]
    pooled = torch.cat([(weight * math.sqrt(fan / 2)).flatten() for weight, fan in zip(weights, fans)]).double()
    tolerance = 5 / math.sqrt(pooled.numel())
    assert pooled.mean().abs() < tolerance
    assert (pooled.square().mean() - 1).abs() < math.sqrt(2) * tolerance
    assert (pooled.pow(4).mean() - 3).abs() < math.sqrt(96) * tolerance  # a uniform distribution has 1.8
    for weight, fan in zip(weights, fans):
        assert weight.std() * math.sqrt(fan / 2) == pytest.approx(1, abs=5 / math.sqrt(2 * weight.numel()))


def assert_is_torchs_linear(linear: nn.Linear) -> None:
    bound = 1 / math.sqrt(linear.in_features)
    for values in (linear.weight.detach(), linear.bias.detach()):
        assert values.abs().max() <= bound
        scaled = (values / bound).double()  # uniform in [-1, 1]: mean 0, variance 1/3
        assert scaled.mean().abs() < 5 / math.sqrt(3 * values.numel())
        assert (scaled.square().mean() - 1 / 3).abs() < 5 * math.sqrt(4 / 45 / values.numel())


def test_fresh_weights_are_drawn_as_in_the_original(fresh_b0):
    convs = [module for module in fresh_b0.modules() if isinstance(module, nn.Conv2d)]
    assert len(convs) == 49
    # fan-in of a depthwise kernel is k x k
    fans = [conv.in_channels // conv.groups * math.prod(conv.kernel_size) for conv in convs]
    assert_is_kaiming_normal([conv.weight for conv in convs], fans)

    linears = [module for module in fresh_b0.modules() if isinstance(module, nn.Linear)]
    assert len(linears) == 2 * 16 + 1
    for linear in linears:
        assert_is_torchs_linear(linear)

    for norm in (module for module in fresh_b0.modules() if isinstance(module, nn.BatchNorm2d)):
        assert (norm.weight == 1).all()
        assert (norm.bias == 0).all()
        assert (norm.running_mean == 0).all()
        assert (norm.running_var == 1).all()
        assert norm.num_batches_tracked == 0


def test_fan_out_can_be_chosen_for_convolutions():
    config = EfficientNetNVConfig.from_variant("b0", conv_init="fan_out")
    convs = [
        module for module in EfficientNetNVForImageClassification(config).modules() if isinstance(module, nn.Conv2d)
    ]
    # PyTorch's fan-out does not divide by the groups
    assert_is_kaiming_normal([c.weight for c in convs], [c.out_channels * math.prod(c.kernel_size) for c in convs])


def test_a_model_born_on_meta_is_drawn_alike_when_it_gets_storage():
    config = EfficientNetNVConfig.from_variant("b0")
    with torch.device("meta"):
        model = EfficientNetNVForImageClassification(config)
    model.to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(7)
    model.apply(model._init_weights)
    test_fresh_weights_are_drawn_as_in_the_original(model)


def test_a_seed_fixes_every_fresh_weight(tiny_config):
    first, second, third = (
        EfficientNetNVForImageClassification(tiny_config()).state_dict()
        for seed in (1, 1, 2)
        if torch.manual_seed(seed)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], third["classifier.weight"])


def test_a_new_head_is_drawn_fresh_and_everything_else_is_loaded_to_the_bit(fresh_b0, tmp_path):
    saved = copy.deepcopy(fresh_b0)
    for buffer in saved.buffers():
        buffer.copy_(torch.rand_like(buffer, dtype=torch.float) * 10)
    saved.save_pretrained(tmp_path)
    loaded = EfficientNetNVForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert loaded.config.num_labels == loaded.num_labels == len(loaded.config.id2label) == 7
    assert loaded.classifier.weight.shape == (7, 1280)
    assert_is_torchs_linear(loaded.classifier)
    before, after = saved.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name in before:
        if not name.startswith("classifier."):
            assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("variant", ["b0", "widese-b0"])
def test_every_parameter_gets_a_gradient_at_step_one(variant):
    model = EfficientNetNVForImageClassification(EfficientNetNVConfig.from_variant(variant)).train()
    model(torch.randn(4, 3, 64, 64), labels=torch.arange(4)).loss.backward()
    silent = [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 1e-9]
    assert not silent


def test_a_fresh_network_neither_explodes_nor_fades(fresh_b0):
    logits = copy.deepcopy(fresh_b0).train()(torch.randn(8, 3, 64, 64)).logits
    assert 0.05 < logits.std() < 5


# Regularisers -------------------------------------------------------------------------------------------------------


def outputs_of_two_passes(model, pixels):
    return model(pixels).logits.detach(), model(pixels).logits.detach()


def test_evaluation_is_deterministic_and_needs_no_regulariser(tiny_config, pixels):
    regularised = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.5, survival_prob=0.5)).eval()
    plain = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0, survival_prob=1.0)).eval()
    plain.load_state_dict(regularised.state_dict())
    first, second = outputs_of_two_passes(regularised, pixels)
    assert torch.equal(first, second)
    assert torch.equal(first, plain(pixels).logits)


def test_training_without_regularisers_is_deterministic(tiny_config, pixels):
    model = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0, survival_prob=1.0)).train()
    first, second = outputs_of_two_passes(model, pixels)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "regulariser", [{"dropout_rate": 0.5, "survival_prob": 1.0}, {"survival_prob": 0.5, "dropout_rate": 0.0}]
)
def test_each_regulariser_alone_changes_training_outputs(tiny_config, pixels, regulariser):
    model = EfficientNetNVForImageClassification(tiny_config(**regulariser)).train()
    outputs = [model(pixels).logits.detach() for _ in range(8)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_dropout_zeroes_its_share_of_the_pooled_features_and_scales_the_rest(tiny_config):
    model = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.4, survival_prob=1.0)).train()
    seen = []
    model.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.efficientnet.register_forward_hook(lambda _, __, outputs: seen.append(outputs.pooler_output))
    model(torch.randn(64, 3, 32, 32))
    pooled, dropped = seen
    zero = dropped == 0
    assert 0.37 < zero.float().mean() < 0.43  # 4,096 draws
    torch.testing.assert_close(dropped[~zero], pooled[~zero] / 0.6)


def test_stochastic_depth_drops_a_whole_batch_or_single_pictures():
    x = torch.ones(1000, 2, 1, 1)
    batch, row = StochasticDepth(0.7, "batch").train(), StochasticDepth(0.7, "row").train()
    for _ in range(20):
        values = batch(x).unique()
        assert values.numel() == 1
        assert values.item() in (0.0, pytest.approx(1 / 0.7))
    per_picture = row(x)[:, :, 0, 0]
    assert torch.equal(per_picture[:, 0], per_picture[:, 1])
    kept = per_picture[:, 0] != 0
    assert 0.65 < kept.float().mean() < 0.75
    torch.testing.assert_close(per_picture[kept], torch.full((int(kept.sum()), 2), 1 / 0.7))


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_stochastic_depth_preserves_the_expected_value(mode):
    drop = StochasticDepth(0.8, mode).train()
    mean = torch.stack([drop(torch.ones(4, 1, 1, 1)).mean() for _ in range(4000)]).mean()
    assert mean == pytest.approx(1, abs=0.04)  # five standard errors of 4,000 draws


def test_stochastic_depth_draws_once_per_block_and_forward(tiny_config, pixels, monkeypatch):
    draws, bernoulli = [], torch.Tensor.bernoulli_

    def counted(tensor, p):
        draws.append((tensor.numel(), p))
        return bernoulli(tensor, p)

    monkeypatch.setattr(torch.Tensor, "bernoulli_", counted)
    config = tiny_config(survival_prob=0.5, dropout_rate=0.0)
    # 5 blocks; residual are number 0 (never dropped), 2 and 4
    expected = [pytest.approx(1 - 0.5 * i / 5) for i in (2, 4)]
    model = EfficientNetNVForImageClassification(config).train()
    for _ in range(3):
        draws.clear()
        model(pixels)
        assert draws == [(1, probability) for probability in expected]

    config.stochastic_depth_mode = "row"
    model = EfficientNetNVForImageClassification(config).train()
    draws.clear()
    model(pixels)
    assert draws == [(len(pixels), probability) for probability in expected]

    draws.clear()
    model.eval()(pixels)
    assert draws == []


def test_a_dropped_block_is_the_identity_with_no_gradient_to_its_weights(tiny_config, monkeypatch):
    model = EfficientNetNVForImageClassification(tiny_config(survival_prob=0.5)).train()
    block = model.efficientnet.encoder.stages[1].blocks[1]
    monkeypatch.setattr(torch.Tensor, "bernoulli_", lambda tensor, p: tensor.zero_())
    x = torch.randn(4, 24, 8, 8, requires_grad=True)
    y = block(x)
    assert torch.equal(y, x)
    y.sum().backward()
    assert all(not parameter.grad.any() for parameter in block.parameters())


# Activation checkpointing -------------------------------------------------------------------------------------------


def enable_checkpointing(model, **kwargs):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(**kwargs)
    return model


def two_training_steps(model, pixels):
    """Loss and gradients of a second step, and all that the steps left in the model."""
    for seed in (1, 2):
        torch.manual_seed(seed)
        loss = model.train()(pixels, labels=torch.arange(len(pixels)) % 5).loss
        model.zero_grad()
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"loss": loss.detach(), **gradients, **dict(model.named_buffers())}


def assert_equal_to_the_bit(first, second):
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


@pytest.mark.parametrize("mode", ["batch", "row"])
def test_checkpointing_changes_no_bit_of_loss_gradients_or_running_statistics(tiny_config, pixels, mode):
    config = tiny_config(survival_prob=0.5, stochastic_depth_mode=mode, dropout_rate=0.3)
    plain = EfficientNetNVForImageClassification(config)
    checkpointed = enable_checkpointing(copy.deepcopy(plain))
    recomputed = []
    for block in (module for module in checkpointed.modules() if hasattr(module, "gradient_checkpointing")):
        block.depthwise.register_forward_pre_hook(lambda *_: recomputed.append(1))
    assert_equal_to_the_bit(two_training_steps(plain, pixels), two_training_steps(checkpointed, pixels))
    assert len(recomputed) == 2 * 2 * 5  # two steps of five blocks, each run twice: it did checkpoint
    assert all(norm.track_running_stats for norm in checkpointed.modules() if isinstance(norm, nn.BatchNorm2d))


def test_checkpointing_survives_copying_and_pickling(tiny_config, pixels):
    plain = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0))
    checkpointed = enable_checkpointing(copy.deepcopy(plain))
    copies = [copy.deepcopy(checkpointed), pickle.loads(pickle.dumps(checkpointed))]
    expected = two_training_steps(plain, pixels)
    for model in copies:
        assert_equal_to_the_bit(two_training_steps(model, pixels), expected)


def test_checkpointing_compiles_and_still_updates_the_statistics_once(tiny_config, pixels):
    plain = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0))
    compiled = torch.compile(enable_checkpointing(copy.deepcopy(plain)), backend="aot_eager")
    expected, found = two_training_steps(plain, pixels), two_training_steps(compiled, pixels)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[f"_orig_mod.{name}" if name != "loss" else name], tensor, msg=name)


def test_checkpointing_can_be_switched_off_again(tiny_config, pixels):
    model = enable_checkpointing(EfficientNetNVForImageClassification(tiny_config()))
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    runs = []
    model.efficientnet.encoder.stages[0].blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    two_training_steps(model, pixels)
    assert len(runs) == 2


def test_checkpointing_leaves_frozen_batch_norm_frozen(tiny_config, pixels):
    def freeze_and_step(model):
        model.train()
        model.train = lambda mode=True: model  # two_training_steps shall not thaw it
        for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
            norm.eval()
        return two_training_steps(model, pixels)

    plain = EfficientNetNVForImageClassification(tiny_config(dropout_rate=0.0))
    checkpointed = enable_checkpointing(copy.deepcopy(plain))
    outcome = freeze_and_step(checkpointed)
    assert_equal_to_the_bit(freeze_and_step(plain), outcome)
    assert outcome["efficientnet.head.bn.num_batches_tracked"] == 0


# Other people's loops -----------------------------------------------------------------------------------------------


def test_transformers_trainer_trains_it_with_checkpointing(tiny_config, tmp_path):
    new_name = hasattr(TrainingArguments, "activation_checkpointing")  # transformers >= 5
    model = EfficientNetNVForImageClassification(tiny_config(survival_prob=0.8))
    before = copy.deepcopy(model.state_dict())
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(8)]
    arguments = TrainingArguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        **{"activation_checkpointing" if new_name else "gradient_checkpointing": True},
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    assert trainer.predict(rows).predictions.shape == (8, 5)
    after = model.state_dict()
    unchanged = [name for name in before if torch.equal(before[name], after[name].cpu())]
    assert not unchanged
    assert after["efficientnet.head.bn.num_batches_tracked"] == 2


@pytest.mark.parametrize("training", [False, True])
def test_it_traces_as_one_graph(tiny_config, pixels, training):
    model = EfficientNetNVForImageClassification(tiny_config(survival_prob=0.5)).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.manual_seed(1)
    logits = compiled(pixels).logits
    torch.manual_seed(1)
    torch.testing.assert_close(logits, model(pixels).logits)
