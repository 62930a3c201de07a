"""What a CUDA device computes beside the CPU, part by part. Run with `-m gpu`."""

import copy

import pytest
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.data import BatchMixer
from effnet_hf.data.sampler import BatchRequest
from effnet_hf.training.ema import ModelEMA
from effnet_hf.tuning import fold_batchnorm

from .gpu_device import DEVICE, exact_products  # noqa: F401


pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("exact_products")]


@pytest.fixture
def model(tiny_config):
    model = EfficientNetNVForImageClassification(tiny_config(survival_prob=1.0, dropout_rate=0.0))
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(torch.randn(16, 3, 32, 32))  # statistics as a trained network has them
    return model.eval()


@pytest.mark.parametrize("kinds", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.2, "cutmix": 1.0}], ids=str)
def test_mixing_gives_the_cpus_batch(kinds):
    pixels, labels = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
    for slot in range(4):
        request = BatchRequest(epoch=1, slot=slot, indices=labels.numpy())
        mixer = BatchMixer(5, seed=3, **kinds)
        expected = mixer(pixels, labels, request)
        mixed = mixer(pixels.to(DEVICE), labels.to(DEVICE), request)
        for mine, right in zip(mixed, expected):
            assert mine.device.type == DEVICE
            torch.testing.assert_close(mine.cpu(), right, rtol=1e-6, atol=1e-6)  # a GPU multiplies and adds in one


def test_the_moving_average_is_the_cpus(model):
    there = copy.deepcopy(model).to(DEVICE)
    averages = ModelEMA(model, 0.9), ModelEMA(there, 0.9)
    for _ in range(3):
        with torch.no_grad():
            for one, other in zip(model.parameters(), there.parameters()):
                one.add_(torch.randn_like(one))
                other.copy_(one)
        for average, source in zip(averages, (model, there)):
            average.update(source)
    right, mine = (average.model.state_dict() for average in averages)
    assert right.keys() == mine.keys()
    for name, expected in right.items():
        torch.testing.assert_close(mine[name].cpu(), expected, rtol=1e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_a_folded_network_gives_the_same_logits(model, layout):
    pixels = torch.randn(4, 3, 32, 32)
    with torch.inference_mode():
        expected = model(pixels).logits
    model.to(DEVICE, memory_format=layout)
    with torch.inference_mode():
        given = pixels.to(DEVICE, memory_format=layout)
        for network in (model, fold_batchnorm(model)):
            torch.testing.assert_close(network(given).logits.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["percentile", "max"])
def test_calibration_finds_the_cpus_ranges(model, method):
    pytest.importorskip("modelopt.torch.quantization", exc_type=ImportError)
    from effnet_hf.quantization import calibrate, quantize
    from effnet_hf.quantization_efficientnet_nv import quantizers

    batches = [torch.randn(4, 3, 32, 32) * (1 + i) for i in range(3)]  # the second needs bins the first had not
    ranges = []
    for device in ("cpu", DEVICE):
        network = copy.deepcopy(model).to(device)
        quantize(network, calibration_method=method)
        calibrate(network, [batch.to(device) for batch in batches])
        ranges.append({name: quantizer._amax.cpu() for name, quantizer in quantizers(network).items()})
    right, mine = ranges
    assert right.keys() == mine.keys()
    for name, expected in right.items():
        exact = name.endswith(".weight")  # an activation on the edge of a bin may fall to either side
        torch.testing.assert_close(mine[name], expected, rtol=0 if exact else 1e-2, atol=0, msg=name)
