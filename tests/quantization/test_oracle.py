"""Ranges and logits are those of pytorch-quantization, to the bit, on the same batches."""

import warnings

import pytest
import torch

from effnet_hf import EfficientNetNVConfig, EfficientNetNVForImageClassification, modeling_efficientnet_nv
from effnet_hf.quantization import calibrate, quantize, quantizers

from ..conversion.random_weights import normalised, random_state


@pytest.fixture(scope="module")
def oracle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(
            "pytorch_quantization.quant_modules",
            reason="needs pytorch-quantization==2.1.3, the last wheel of NVIDIA's original quantizers",
        )


def original(config, state, monkeypatch):
    """The network built while pytorch-quantization stands in for torch.nn's layers, as in NVIDIA's own code; the two
    products of a block carry its quantizers by hand, as there."""
    from pytorch_quantization import nn as quant_nn
    from pytorch_quantization import quant_modules
    from pytorch_quantization.tensor_quant import QuantDescriptor

    histogram = QuantDescriptor(calib_method="histogram")

    class Scale(modeling_efficientnet_nv.ScaleByGate):
        def __init__(self):
            super().__init__()
            self.gate, self.x = quant_nn.TensorQuantizer(histogram), quant_nn.TensorQuantizer(histogram)

        def forward(self, gate, x):
            return super().forward(self.gate(gate), self.x(x))

    class Add(modeling_efficientnet_nv.ResidualAdd):
        def __init__(self):
            super().__init__()
            self.identity = quant_nn.TensorQuantizer(histogram)

        def forward(self, branch, identity):
            return super().forward(branch, self.identity(identity))

    for layer in (quant_nn.QuantConv2d, quant_nn.QuantLinear, quant_nn.QuantAdaptiveAvgPool2d):
        layer.set_default_quant_desc_input(histogram)
    monkeypatch.setattr(modeling_efficientnet_nv, "ScaleByGate", Scale)
    monkeypatch.setattr(modeling_efficientnet_nv, "ResidualAdd", Add)
    # Their library exchanges torch's own class, which ours inherits from.
    monkeypatch.setattr(modeling_efficientnet_nv, "GlobalAvgPool2d", lambda: torch.nn.AdaptiveAvgPool2d(1))
    quant_modules.initialize()
    try:
        model = EfficientNetNVForImageClassification(config)
    finally:
        quant_modules.deactivate()
    model.load_state_dict(state)
    return model.eval()


def their_quantizers(model):
    from pytorch_quantization.nn import TensorQuantizer

    names = {name: q for name, q in model.named_modules() if isinstance(q, TensorQuantizer)}
    return {name.replace("._", ".").removesuffix("_quantizer"): quantizer for name, quantizer in names.items()}


def calibrate_theirs(model, batches, method, **options):
    from pytorch_quantization.calib import MaxCalibrator

    found = their_quantizers(model)
    for quantizer in found.values():
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for quantizer in found.values():
        if isinstance(quantizer._calibrator, MaxCalibrator):
            quantizer.load_calib_amax()
        else:
            quantizer.load_calib_amax(method, **options)
        quantizer.enable_quant()
        quantizer.disable_calib()
    return found


def test_all_222_ranges_and_the_logits_are_equal(oracle, monkeypatch):
    config = EfficientNetNVConfig.from_variant("b0", num_labels=10)
    float_model = EfficientNetNVForImageClassification(config)
    float_model.load_state_dict(random_state(config))
    normalised(float_model, 32)
    # The second batch is wider than the first, so histograms grow.
    batches = [scale * torch.randn(2, 3, 32, 32) for scale in (1.0, 2.0, 1.5)]
    theirs = original(config, float_model.state_dict(), monkeypatch)
    reference = calibrate_theirs(theirs, batches, "percentile", percentile=99.99)
    quantize(float_model)
    calibrate(float_model, batches)
    ours = quantizers(float_model)
    assert set(ours) == set(reference) and len(ours) == 222
    for name, quantizer in ours.items():
        assert torch.equal(quantizer._amax, reference[name]._amax), name
        assert quantizer._amax.min() > 0
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(float_model(x).logits, theirs(x).logits)


def test_gradients_are_equal_too(oracle, monkeypatch, tiny_config):
    config = tiny_config(survival_prob=1.0, dropout_rate=0.0)
    ours = EfficientNetNVForImageClassification(config).eval()
    theirs = original(config, ours.state_dict(), monkeypatch)
    batches = [torch.randn(4, 3, 32, 32)]
    calibrate_theirs(theirs, batches, "percentile", percentile=99.9)
    quantize(ours, calibration_percentile=99.9)
    calibrate(ours, batches)
    x = torch.randn(4, 3, 32, 32)
    for model in (ours, theirs):
        model.train()(x).logits.logsumexp(1).sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        assert torch.equal(parameter.grad, gradients[name].grad), name
