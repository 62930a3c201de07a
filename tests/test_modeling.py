"""The architecture is the published one, and the models speak transformers' language: outputs, losses, loading."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

from effnet_hf import (
    EfficientNetNVBackbone,
    EfficientNetNVConfig,
    EfficientNetNVForImageClassification,
    EfficientNetNVModel,
)
from effnet_hf.modeling_efficientnet_nv import MBConv, SqueezeExcite, StochasticDepth


# variant: parameters, running-statistics values, tensors in the state dict; measured on the original, 1000 classes
COUNTS = {
    "b0": (5_288_548, 42_016, 360),
    "b1": (7_794_184, 62_048, 508),
    "b2": (9_109_994, 67_568, 508),
    "b3": (12_233_232, 87_296, 574),
    "b4": (19_341_616, 125_200, 706),
    "b5": (30_389_784, 172_736, 854),
    "b6": (43_040_704, 224_432, 986),
    "b7": (66_347_960, 310_720, 1200),
    "widese-b0": (8_423_848, 42_016, 360),
    "widese-b1": (13_336_204, 62_048, 508),
    "widese-b2": (15_678_504, 67_568, 508),
    "widese-b3": (21_530_032, 87_296, 574),
    "widese-b4": (34_927_246, 125_200, 706),
    "widese-b5": (56_146_944, 172_736, 854),
    "widese-b6": (80_444_154, 224_432, 986),
    "widese-b7": (125_844_160, 310_720, 1200),
}
# variant: squeeze width of each stage's first block, and of its later blocks
SQUEEZE_WIDTHS = {
    "b0": [(8, None), (4, 6), (6, 10), (10, 20), (20, 28), (28, 48), (48, None)],
    "widese-b0": [(8, None), (24, 36), (36, 60), (60, 120), (120, 168), (168, 288), (288, None)],
    "b4": [(12, 6), (6, 8), (8, 14), (14, 28), (28, 40), (40, 68), (68, 112)],
    "widese-b4": [(12, 6), (36, 48), (48, 84), (84, 168), (168, 240), (240, 408), (408, 672)],
}


def on_meta(variant: str, model_class=EfficientNetNVForImageClassification, **overrides):
    """A network without storage: counts and shapes at no cost."""
    with torch.device("meta"):
        return model_class(EfficientNetNVConfig.from_variant(variant, **overrides))


@pytest.mark.parametrize("variant", COUNTS)
def test_sixteen_architectures_have_the_published_number_of_parameters(variant):
    model = on_meta(variant)
    running = [b.numel() for name, b in model.named_buffers() if name.endswith(("running_mean", "running_var"))]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (parameters, sum(running), len(model.state_dict())) == COUNTS[variant]


def test_lite_networks_have_no_squeeze_excite_and_relu6():
    modules = list(on_meta("lite0").modules())
    assert not any(isinstance(module, (SqueezeExcite, nn.SiLU)) for module in modules)
    assert any(isinstance(module, nn.ReLU6) for module in modules)


@pytest.mark.parametrize(
    ("variant", "gigamacs", "rounding"),
    [("b0", 0.3858, 5e-5), ("widese-b0", 0.3889, 5e-5), ("b4", 4.394, 5e-4), ("widese-b4", 4.409, 5e-4)],
)
def test_multiplications_per_picture_are_the_published_ones(variant, gigamacs, rounding):
    model = on_meta(variant).eval()
    size = model.config.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gigamacs, abs=rounding)


@pytest.mark.parametrize("variant", SQUEEZE_WIDTHS)
def test_squeeze_widths_follow_the_input_or_in_widese_the_hidden_channels(variant):
    stages = on_meta(variant).efficientnet.encoder.stages
    for stage, (first, later) in zip(stages, SQUEEZE_WIDTHS[variant], strict=True):
        widths = [block.se.reduce.out_features for block in stage.blocks]
        assert widths == [first] + [later] * (len(stage.blocks) - 1)


@pytest.mark.parametrize(
    ("variant", "sizes"),
    [("b0", [112, 112, 56, 28, 14, 14, 7, 7]), ("b4", [190, 190, 95, 48, 24, 24, 12, 12])],
)
def test_feature_maps_halve_and_odd_sizes_round_up(variant, sizes):
    model = on_meta(variant, EfficientNetNVModel).eval()
    config = model.config
    pixels = torch.empty(2, 3, config.image_size, config.image_size, device="meta")
    outputs = model(pixels, output_hidden_states=True)
    shapes = [(2, channels, size, size) for channels, size in zip(config.hidden_sizes, sizes)]
    assert [tuple(map_.shape) for map_ in outputs.hidden_states] == shapes
    assert outputs.last_hidden_state.shape == (2, config.hidden_dim, sizes[-1], sizes[-1])
    assert outputs.pooler_output.shape == (2, config.hidden_dim)


def test_blocks_are_residual_unless_they_change_width_or_resolution():
    for variant, expected in (("b0", 9), ("b4", 25)):
        blocks = [module for module in on_meta(variant).modules() if isinstance(module, MBConv)]
        assert sum(block.add is not None for block in blocks) == expected
        assert all(block.add is None for block in blocks if block.depthwise.conv.stride != (1, 1))


def test_b4_drops_exactly_its_residual_branches_with_the_published_probabilities():
    # every residual block of B4 in order, as published
    expected = [0.99375, 0.98125, 0.975, 0.96875, 0.95625, 0.95, 0.94375, 0.93125, 0.925, 0.91875, 0.9125, 0.90625]
    expected += [0.89375, 0.8875, 0.88125, 0.875, 0.86875, 0.85625, 0.85, 0.84375, 0.8375, 0.83125, 0.825, 0.81875]
    expected += [0.80625]
    drops = [module.survival_prob for module in on_meta("b4").modules() if isinstance(module, StochasticDepth)]
    assert drops == pytest.approx(expected, abs=1e-12)
    assert not any(isinstance(module, StochasticDepth) for module in on_meta("b0").modules())


def test_every_layer_has_the_settings_of_the_configuration():
    model = on_meta("b0", batch_norm_eps=2e-3, batch_norm_momentum=0.05, hidden_act="relu", num_channels=1)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 49
    assert {(norm.eps, norm.momentum) for norm in norms} == {(2e-3, 0.05)}
    assert not any(isinstance(module, nn.SiLU) for module in model.modules())
    assert model.efficientnet.encoder.stem.conv.weight.shape == (32, 1, 3, 3)
    for conv in (module for module in model.modules() if isinstance(module, nn.Conv2d)):
        assert conv.bias is None
        assert conv.padding == tuple((kernel - 1) // 2 for kernel in conv.kernel_size)


def test_same_padding_pads_right_and_bottom_first():
    config = EfficientNetNVConfig.from_variant("lite0", num_labels=3)
    stem = EfficientNetNVModel(config).encoder.stem
    nn.init.ones_(stem.conv.weight)
    summed = stem.conv(stem.pad(torch.ones(1, 3, 4, 4)))[0, 0] / 3
    # 4 pixels, kernel 3, stride 2: no padding on the left, one pixel on the right
    assert summed.tolist() == [[9, 6], [6, 4]]


# Outputs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_config):
    return EfficientNetNVForImageClassification(tiny_config()).eval()


@pytest.fixture
def pixels():
    return torch.randn(4, 3, 32, 32)


def test_hidden_states_are_the_stem_and_every_stage(model, pixels):
    assert model(pixels).hidden_states is None
    hidden_states = model(pixels, output_hidden_states=True).hidden_states
    assert [tuple(map_.shape[1:]) for map_ in hidden_states] == [(16, 16, 16), (16, 16, 16), (24, 8, 8), (40, 4, 4)]
    assert torch.equal(hidden_states[0], model.efficientnet.encoder.stem(pixels))
    model.config.output_hidden_states = True
    assert len(model(pixels).hidden_states) == 4


def test_tuples_hold_what_the_named_outputs_hold(model, pixels):
    named = model(pixels, labels=torch.arange(4), output_hidden_states=True)
    loss, logits, hidden_states = model(pixels, labels=torch.arange(4), output_hidden_states=True, return_dict=False)
    assert torch.equal(loss, named.loss)
    assert torch.equal(logits, named.logits)
    assert all(map(torch.equal, hidden_states, named.hidden_states))
    (logits,) = model(pixels, return_dict=False)
    assert torch.equal(logits, named.logits)

    base = model.efficientnet
    last_hidden_state, pooled = base(pixels, return_dict=False)
    assert torch.equal(last_hidden_state, base(pixels).last_hidden_state)
    assert torch.equal(pooled, last_hidden_state.mean((2, 3)))


def test_one_label_per_picture_is_cross_entropy(model, pixels):
    labels = torch.tensor([0, 4, 2, 1])
    outputs = model(pixels, labels=labels)
    assert torch.equal(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))


def test_several_labels_per_picture_are_binary_cross_entropy(tiny_config, pixels):
    labels = torch.randint(2, (4, 5)).float()
    for problem_type in (None, "multi_label_classification"):
        model = EfficientNetNVForImageClassification(tiny_config(problem_type=problem_type)).eval()
        outputs = model(pixels, labels=labels)
        expected = nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels)
        torch.testing.assert_close(outputs.loss, expected)


def test_regression_is_mean_squared_error(tiny_config, pixels):
    labels = torch.randn(4)
    for problem_type in (None, "regression"):
        model = EfficientNetNVForImageClassification(tiny_config(num_labels=1, problem_type=problem_type)).eval()
        outputs = model(pixels, labels=labels)
        torch.testing.assert_close(outputs.loss, ((outputs.logits.squeeze() - labels) ** 2).mean())


def test_without_labels_the_classifier_gives_pooled_features(tiny_config, pixels):
    model = EfficientNetNVForImageClassification(tiny_config(num_labels=0)).eval()
    assert isinstance(model.classifier, nn.Identity)
    assert torch.equal(model(pixels).logits, model.efficientnet(pixels).pooler_output)


@pytest.mark.parametrize(
    ("shape", "sentence"),
    [
        ((3, 32, 32), r"pixel_values must have shape \(N, 3, height, width\), got \(3, 32, 32\)"),
        ((1, 1, 32, 32), r"pixel_values must have shape \(N, 3, height, width\), got \(1, 1, 32, 32\)"),
        (None, r"pixel_values must have shape \(N, 3, height, width\), got None"),
    ],
)
def test_pixels_of_a_wrong_shape_are_refused_with_a_sentence(tiny_config, shape, sentence):
    for model_class in (EfficientNetNVModel, EfficientNetNVForImageClassification, EfficientNetNVBackbone):
        with pytest.raises(ValueError, match=sentence):
            model_class(tiny_config())(None if shape is None else torch.zeros(shape))


@pytest.mark.parametrize("size", [(1, 1), (17, 31), (33, 200)])
def test_any_picture_size_gives_logits(model, size):
    logits = model(torch.randn(2, 3, *size)).logits
    assert logits.shape == (2, 5)
    assert logits.isfinite().all()


def test_channels_last_gives_the_same_logits(model, pixels):
    expected = model(pixels).logits
    channels_last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(channels_last(pixels.to(memory_format=torch.channels_last)).logits, expected)


def test_the_input_is_left_as_it_was(model, pixels):
    before = pixels.clone()
    model(pixels)
    assert torch.equal(pixels, before)


# Saving and loading -------------------------------------------------------------------------------------------------


def test_auto_classes_open_a_saved_folder_with_the_same_logits(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert type(loaded) is EfficientNetNVForImageClassification
    assert not loaded.training
    assert torch.equal(loaded(pixels).logits, model(pixels).logits)
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is EfficientNetNVModel
    assert torch.equal(base(pixels).pooler_output, model.efficientnet(pixels).pooler_output)
    fresh = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    assert type(fresh) is EfficientNetNVModel


def test_loading_in_bfloat16_computes_in_bfloat16(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    half = EfficientNetNVForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = half(pixels.bfloat16()).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(pixels).logits, atol=0.05, rtol=0.05)
    half.save_pretrained(tmp_path / "half")
    again = EfficientNetNVForImageClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert again.dtype == torch.bfloat16


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_device_map_loads_the_same_model(model, pixels, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    loaded = EfficientNetNVForImageClassification.from_pretrained(tmp_path, device_map=device_map)
    torch.testing.assert_close(loaded(pixels.to(loaded.device)).logits.cpu(), model(pixels).logits)


def test_overrides_on_loading_reach_the_layers(tiny_config, tmp_path):
    saved = EfficientNetNVForImageClassification(tiny_config(survival_prob=0.8, dropout_rate=0.4))
    saved.save_pretrained(tmp_path)
    loaded = EfficientNetNVForImageClassification.from_pretrained(tmp_path, survival_prob=1.0, dropout_rate=0.0)
    assert any(isinstance(module, StochasticDepth) for module in saved.modules())
    assert not any(isinstance(module, StochasticDepth) for module in loaded.modules())
    assert loaded.dropout.p == 0.0
    with pytest.raises(ValueError, match="survival_prob must be a number in"):
        EfficientNetNVForImageClassification.from_pretrained(tmp_path, survival_prob=2.0)


@pytest.mark.parametrize("missing", ["num_batches_tracked", "running_mean", "se.reduce.bias"])
def test_tensors_missing_from_a_checkpoint_leave_their_neighbours_alone(model, tmp_path, missing):
    state = {name: torch.rand_like(t) if t.is_floating_point() else t for name, t in model.state_dict().items()}
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(missing)}
    model.save_pretrained(tmp_path, state_dict=kept)
    loaded = EfficientNetNVForImageClassification.from_pretrained(tmp_path).state_dict()
    assert len(kept) < len(loaded)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
