"""The moving average follows the original's formula and forgets nothing on the way to disk and back."""

import pytest
import torch

from effnet_hf.training.ema import ModelEMA


def tiny():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))


def scramble(model):
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) if tensor.is_floating_point() else tensor + 1)


@pytest.mark.parametrize("decay", [0.5, 0.9999])
def test_decay_warms_up_as_the_original(decay):
    model = tiny()
    ema = ModelEMA(model, decay)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    for n in range(12):
        scramble(model)
        ema.update(model)
        d = min(decay, (1 + n) / (10 + n))  # nvidia_original 3.7
        for name, value in model.state_dict().items():
            whole = not value.is_floating_point()
            expected[name] = value.double() if whole else d * expected[name] + (1 - d) * value.double()
    for name, value in ema.model.state_dict().items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert ema.model.state_dict()["1.num_batches_tracked"].dtype == torch.int64


def test_average_is_independent_of_the_model_and_restorable():
    model = tiny()
    ema = ModelEMA(model, 0.9)
    scramble(model)
    ema.update(model)
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())
    other = ModelEMA(tiny(), 0.9)
    other.load_state_dict(ema.state_dict())
    scramble(model)
    ema.update(model)
    other.update(model)
    for a, b in zip(ema.model.state_dict().values(), other.model.state_dict().values()):
        assert torch.equal(a, b)


def test_it_follows_the_model_it_is_given_and_walks_through_it_once(monkeypatch):
    """Walking through a network's modules takes longer than the average itself, so it is done once per model."""
    model, other = tiny(), tiny()
    ema = ModelEMA(model, 0.0)  # the average is the newest weights
    walks, walk = [], torch.nn.Module.state_dict
    monkeypatch.setattr(torch.nn.Module, "state_dict", lambda self, **kw: walks.append(self) or walk(self, **kw))
    for source in (model, model, model, other):
        scramble_in_place(source)
        ema.update(source)
        for own, new in zip(ema.model.parameters(), source.parameters()):
            assert torch.equal(own, new)
    assert [walks.count(module) for module in (model, other)] == [1, 1]


def scramble_in_place(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
