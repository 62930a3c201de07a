"""Grad-CAM by its formula, and on a network of which it is known what it looks at."""

import pytest
import torch

from effnet_hf import EfficientNetNVForImageClassification
from effnet_hf.analysis.attention import attention


@pytest.fixture
def network(tiny_config):
    """Of a map of 4 x 4 behind its last convolution."""
    return EfficientNetNVForImageClassification(tiny_config()).eval()


def test_is_the_formula(network):
    images, classes = torch.randn(3, 3, 32, 32), torch.tensor([[0, 4], [2, 2], [1, 3]])
    with torch.no_grad():
        seen = network.efficientnet(images).last_hidden_state
    # A mean and a linear layer follow: the gradient of a logit is the class's weight over the number of places.
    weights = network.classifier.weight[classes].detach() / 16
    expected = torch.einsum("nkc,nchw->nkhw", weights, seen).relu()
    expected /= expected.amax((2, 3), keepdim=True).clamp(min=1e-30)
    found = attention(network, images, classes)
    assert found.shape == (3, 2, 4, 4) and expected.any()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_of_a_small_image_an_earlier_map_is_taken(network):
    images = torch.randn(2, 3, 16, 16)  # the last map has 2 x 2 places
    with torch.no_grad():
        maps = network(images, output_hidden_states=True).hidden_states
    assert [each.shape[-1] for each in maps] == [8, 8, 4, 2]
    assert attention(network, images, torch.zeros(2, 1, dtype=torch.long)).shape == (2, 1, 4, 4)


def test_leaves_the_network_as_it_was(network):
    network.train()
    network.classifier.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with torch.inference_mode():  # as a validation is
        maps = attention(network, torch.randn(2, 3, 32, 32), torch.tensor([[0], [1]]))
    assert network.training and not maps.requires_grad
    assert all(parameter.grad is None for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_hook_goes_also_when_the_network_fails(network):
    with pytest.raises(RuntimeError):
        attention(network, torch.randn(1, 3, 32, 32), torch.tensor([[99]]))
    assert not any(module._forward_hooks for module in network.modules())


def test_temperature_changes_nothing(network):
    images, classes = torch.randn(2, 3, 32, 32), torch.tensor([[0], [1]])
    plain = attention(network, images, classes)
    network.config.softmax_temperature = 3.0
    torch.testing.assert_close(attention(network, images, classes), plain)


def test_quantized_network_has_maps_like_the_float_one(network):
    pytest.importorskip("modelopt", reason="needs the quant extra: pip install -e '.[quant]'")
    from effnet_hf.quantization import calibrate, quantize

    images, classes = torch.randn(4, 3, 32, 32), torch.tensor([[0], [1], [2], [3]])
    plain = attention(network, images, classes)
    quantize(network)
    calibrate(network, [images])
    found = attention(network, images, classes)
    assert not torch.equal(found, plain)
    assert torch.corrcoef(torch.stack([found.flatten(), plain.flatten()]))[0, 1] > 0.9


def test_looks_at_the_square_that_it_was_trained_on(tiny_config):
    """Grey noise with a bright square: what tells the classes apart is its colour, wherever it is."""
    network = EfficientNetNVForImageClassification(tiny_config(id2label={0: "red", 1: "blue"}, dropout_rate=0.0))

    def batch(count: int) -> tuple[torch.Tensor, ...]:
        images, labels = 0.3 * torch.randn(count, 3, 32, 32), torch.randint(2, (count,))
        places = torch.randint(4, (count, 2))
        for image, label, (row, column) in zip(images, labels, 8 * places):
            image[2 * label, row : row + 8, column : column + 8] += 3
        return images, labels, places

    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    for _ in range(40):
        images, labels, _ = batch(16)
        network(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for module in network.modules():  # statistics that have forgotten the first steps
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        for _ in range(8):
            network(batch(16)[0])
        images, labels, places = batch(64)
        assert (network.eval()(images).logits.argmax(-1) == labels).float().mean() > 0.95
    hottest = attention(network, images, labels[:, None])[:, 0].flatten(1).argmax(1)
    found = torch.stack([hottest // 4, hottest % 4], 1)
    assert (found - places).abs().amax(1).le(1).float().mean() > 0.9  # by chance 42 %
    assert (found == places).all(1).float().mean() > 0.25  # by chance 6 %
