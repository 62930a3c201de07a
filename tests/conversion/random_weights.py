"""Weights for conversion tests: random, with batch norm statistics that matter."""

import torch

from effnet_hf import EfficientNetNVConfig
from effnet_hf.conversion.dialect import expected_shapes


def random_tensors(shapes: dict[str, tuple], seed: int = 0) -> dict[str, torch.Tensor]:
    """Values for a state dict, by the last part of each name; drawing them beats initialising a model tenfold."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in shapes.items():
        noise = torch.empty(shape).uniform_(-1, 1, generator=generator)
        if key.endswith("num_batches_tracked"):
            tensors[key] = torch.tensor(7)
        elif key.endswith("running_var"):
            tensors[key] = 1 + 0.5 * noise
        elif len(shape) > 1:
            tensors[key] = noise * (3 / noise[0].numel()) ** 0.5
        else:  # batch norm's gain is the only one-dimensional weight
            tensors[key] = key.endswith("weight") + 0.1 * noise
    return tensors


def random_state(config: EfficientNetNVConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of ours."""
    return random_tensors(expected_shapes(config), seed)


def filled(build, *args, side: int = 64, **kwargs) -> torch.nn.Module:
    """A foreign model with random tensors, in evaluation mode, without its own initialisation."""
    with torch.device("meta"):
        model = build(*args, **kwargs)
    state = random_tensors({key: tuple(tensor.shape) for key, tensor in model.state_dict().items()})
    model.load_state_dict(state, strict=True, assign=True)
    return normalised(model, side)


@torch.no_grad()
def normalised(model: torch.nn.Module, side: int) -> torch.nn.Module:
    """Sets batch norm's statistics, layer after layer, so that the input reaches the logits at any depth.

    A layer's variances are drawn around their mean: a channel that varies little in one batch would amplify rounding.
    """
    generator = torch.Generator().manual_seed(3)

    def set_statistics(norm, inputs):
        noise = torch.empty_like(norm.running_var).uniform_(-0.5, 0.5, generator=generator)
        variance, mean = torch.var_mean(inputs[0], dim=(0, 2, 3))
        norm.running_var.copy_(variance.mean() * (1 + noise))
        norm.running_mean.copy_(mean + 0.1 * noise)

    norms = [module for module in model.eval().modules() if isinstance(module, torch.nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(set_statistics) for norm in norms]
    model(pictures(side))
    for hook in hooks:
        hook.remove()
    classifier = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
    classifier.weight.mul_(0.2)  # logits of some tenths, as an untrained network has
    return model


def pictures(side: int) -> torch.Tensor:
    """The one batch that statistics are set by and logits are compared on."""
    return torch.randn(4, 3, side, side, generator=torch.Generator().manual_seed(2))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same keys, shapes, types and bits."""
    assert list(found) == list(expected)
    for key, tensor in expected.items():
        assert found[key].dtype == tensor.dtype and torch.equal(found[key], tensor), key
