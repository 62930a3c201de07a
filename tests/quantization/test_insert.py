"""Quantizers stand where NVIDIA's stand, under names that say so, and nowhere else."""

from collections import Counter

import pytest
import torch

from effnet_hf import EfficientNetNVBackbone, EfficientNetNVConfig, EfficientNetNVForImageClassification
from effnet_hf.conversion.nvidia import NVIDIA
from effnet_hf.errors import UserError
from effnet_hf.quantization import fold_into_convolution, quantize, quantizers, set_quantizers


@pytest.mark.parametrize("size, total, kinds", [("b0", 222, (99, 82, 32, 9)), ("b4", 444, (194, 161, 64, 25))])
@pytest.mark.parametrize("family", ["", "widese-"])
def test_inventory_is_nvidias_by_name(family, size, total, kinds):
    config = EfficientNetNVConfig.from_variant(family + size, quantization={})
    with torch.device("meta"):
        found = quantizers(EfficientNetNVForImageClassification(config))
    assert set(found) == set(NVIDIA.quantizer_names(config)) and len(found) == total
    counts = Counter(name.rsplit(".", 1)[1] for name in found)
    assert (counts["input"], counts["weight"], counts["gate"] + counts["x"], counts["identity"]) == kinds
    assert sum(counts.values()) == total
    for name, quantizer in found.items():
        assert (quantizer.num_bits, quantizer.narrow_range, quantizer.unsigned) == (8, False, False)
        assert quantizer._amax.numel() == (quantizer._amax.shape[0] if name.endswith(".weight") else 1)


def test_cpu_preset_adds_every_layers_result_but_the_logits(tiny_quantized):
    nvidia, cpu = quantizers(tiny_quantized(False)), quantizers(tiny_quantized(False, placement="cpu"))
    added = set(cpu) - set(nvidia)
    assert set(nvidia) <= set(cpu) and all(name.endswith(".output") for name in added)
    assert "efficientnet.encoder.stem.bn.output" in added and "classifier.output" not in added
    convolutions = sum(name.endswith("conv.weight") for name in nvidia)
    assert len(added) == convolutions + sum(".se." in name and name.endswith(".weight") for name in nvidia)


def test_chosen_layers_stay_in_float(tiny_quantized):
    found = quantizers(tiny_quantized(float_layers=["encoder.stem.conv", "*.se.*", "classifier"]))
    assert not any(".se." in name or "stem" in name or "classifier" in name for name in found) and found
    with pytest.raises(UserError, match="--float_layers encoder.stm: the model has no such layer"):
        tiny_quantized(float_layers=["encoder.stm"])


def test_without_its_quantizers_it_is_the_float_model(tiny_quantized, tiny_config):
    model, x = tiny_quantized(), torch.randn(2, 3, 32, 32)
    plain = EfficientNetNVForImageClassification(tiny_config()).eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("_amax")})
    assert not torch.equal(model(x).logits, plain(x).logits)
    set_quantizers(model, False)
    assert torch.equal(model(x).logits, plain(x).logits)
    set_quantizers(model, True, only={"classifier.weight"})
    assert not torch.equal(model(x).logits, plain(x).logits)


@pytest.mark.parametrize("placement", ["nvidia", "cpu"])
def test_folding_batch_norm_changes_nothing_but_rounding(placement, tiny_quantized):
    model, x = tiny_quantized(placement=placement), torch.randn(4, 3, 32, 32)
    before = model(x).logits
    for module in list(model.modules()):
        if hasattr(module, "bn"):
            fold_into_convolution(module)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    torch.testing.assert_close(model(x).logits, before, rtol=0.05, atol=0.02)  # a value may round to its neighbour


def test_frozen_batch_norm_keeps_its_statistics_and_still_learns(tiny_quantized):
    model = tiny_quantized(batch_norm="frozen").train()
    bn = model.efficientnet.encoder.stem.bn
    before = bn.running_mean.clone()
    model(torch.randn(4, 3, 32, 32)).logits.logsumexp(1).mean().backward()
    assert torch.equal(bn.running_mean, before) and bn.weight.grad.abs().sum() > 0 and not bn.training


def test_folded_before_training_has_no_batch_norm(tiny_quantized):
    model = tiny_quantized(batch_norm="folded").train()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    model(torch.randn(4, 3, 32, 32)).logits.logsumexp(1).mean().backward()
    assert model.efficientnet.encoder.stem.conv.bias.grad is not None


def test_gradients_stop_outside_the_range(tiny_quantized):
    quantizer = quantizers(tiny_quantized())["classifier.input"]
    quantizer._amax.fill_(1.0)
    x = torch.tensor([-1.5, -0.5, 0.5, 1.5], requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 0]
    assert torch.equal(y, torch.tensor([-128.0, -64.0, 64.0, 127.0]) / 127)  # not narrow: -128 is a value


@pytest.mark.parametrize(
    "section, named",
    [
        ({"placement": "gpu"}, "placement must be 'nvidia' or 'cpu', got 'gpu'"),
        ({"calibration_method": "mse"}, "calibration_method"),
        ({"calibration_percentile": 0}, "calibration_percentile"),
        ({"batch_norm": "fold"}, "batch_norm"),
        ({"float_layers": "classifier"}, "float_layers"),
        ({"bits": 8}, "keys engine, placement"),
        ({"num_bits": 16}, "num_bits"),
        ("int8", "quantization must have the keys .*, got 'int8'"),
    ],
    ids=str,
)
def test_bad_section_is_refused_by_the_configuration(section, named):
    with pytest.raises(ValueError, match=named):
        EfficientNetNVConfig(quantization=section)


def test_quantizing_twice_is_refused(tiny_quantized):
    with pytest.raises(UserError, match="already"):
        quantize(tiny_quantized())


def test_backbone_carries_quantizers_too(tiny_config):
    backbone = EfficientNetNVBackbone(tiny_config(quantization={"placement": "nvidia"}))
    assert "encoder.stem.conv.weight" in quantizers(backbone)
