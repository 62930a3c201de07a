"""Calibration: its methods, what it refuses, and one answer on several processes."""

import pytest
import torch
from accelerate import debug_launcher

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.errors import UserError
from effnet_hf.quantization import calibrate, quantize, quantizers

from .two_processes import batches_of, build, calibrate_here


def test_two_processes_hold_the_ranges_of_all_their_pictures(tmp_path):
    """The same bits on both, and those of one process that sees the batches of both together."""
    debug_launcher(calibrate_here, args=(str(tmp_path),), num_processes=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = build()
    calibrate(alone, [torch.cat(pair) for pair in zip(batches_of(0), batches_of(1))])
    assert first["images"] == second["images"] == alone.config.quantization["calibration_pictures"] == 16
    for name, quantizer in quantizers(alone).items():
        assert torch.equal(first["amax"][name], second["amax"][name]), name
        # A magnitude at the edge of two bins may be counted in either: one bin of 2,048.
        torch.testing.assert_close(first["amax"][name], quantizer._amax, rtol=2e-3, atol=0)


@pytest.mark.parametrize("method", ["percentile", "entropy", "max"])
def test_methods_on_known_activations(method):
    model = build(calibration_method=method, calibration_percentile=90.0)
    x = torch.linspace(-4, 4, 4 * 3 * 32 * 32).reshape(4, 3, 32, 32)
    calibrate(model, [x])
    amax = quantizers(model)["efficientnet.encoder.stem.conv.input"]._amax.item()
    expected = {"percentile": (3.59, 3.61), "entropy": (0.1, 4.0), "max": (4.0, 4.0)}[method]
    assert expected[0] <= amax <= expected[1]


def test_weights_get_the_largest_magnitude_of_each_output_channel():
    model = build()
    calibrate(model, batches_of(0))
    conv, linear = model.efficientnet.encoder.stem.conv, model.classifier
    assert torch.equal(conv.weight_quantizer._amax.flatten(), conv.weight.abs().flatten(1).amax(1))
    assert torch.equal(linear.weight_quantizer._amax, linear.weight.abs().amax(1, keepdim=True))


def test_calibration_sees_the_float_network_and_leaves_training_as_it_was():
    model = build().train()
    statistics = model.efficientnet.encoder.stem.bn.running_mean.clone()
    calibrate(model, batches_of(0))
    first = {name: quantizer._amax.clone() for name, quantizer in quantizers(model).items()}
    calibrate(model, batches_of(0))  # ranges that exist do not change what is seen
    assert all(torch.equal(quantizer._amax, first[name]) for name, quantizer in quantizers(model).items())
    assert model.training and torch.equal(model.efficientnet.encoder.stem.bn.running_mean, statistics)


def test_no_picture_and_a_diverged_model_are_refused():
    with pytest.raises(UserError, match="no image to calibrate on"):
        calibrate(build(), [])
    model = build()
    with torch.no_grad():
        model.classifier.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match="NaN or infinity, e.g. classifier.weight"):
        calibrate(model, batches_of(0))


def test_entropy_is_the_librarys_to_the_bit():
    from effnet_hf.quantization.histogram import Histogram

    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        histogram = Histogram(8)
        histogram._num_bins = 300  # the library's loop is quadratic in Python
        for scale in (1.0, 1.3):
            histogram.collect(scale * torch.randn(5000, generator=generator) ** 3)
        reference = histogram.compute_amax("entropy")
        assert torch.equal(histogram.amax("entropy", 0.0), reference)


def test_unknown_settings_are_refused():
    model = EfficientNetNVForImageClassification(EfficientNetNVConfig(num_block_repeats=[1] * 7))
    with pytest.raises(UserError, match="calibration_method must be"):
        quantize(model, calibration_method="mse")
    assert model.config.quantization is None


@pytest.mark.parametrize("kind", ["uniform", "edges", "zeros", "nan and inf", "huge", "beyond"])
def test_counting_exactly_is_histc(kind):
    """What `--deterministic true` takes on a GPU, where torch refuses histc."""
    from effnet_hf.quantization.histogram import count_exactly

    x = torch.rand(20_000)
    values, end = {
        "uniform": (x, x.max().item()),
        "edges": ((x * 64).round() / 64, 1.0),
        "zeros": (torch.zeros(100), 0.0),
        "nan and inf": (torch.cat([x, torch.tensor([float("nan"), float("inf")])]), x.max().item()),
        "huge": (x * 3e38, 3e38),
        "beyond": (x, 0.5),
    }[kind]
    assert torch.equal(count_exactly(values, 2048, end), torch.histc(values, bins=2048, min=0, max=end))
