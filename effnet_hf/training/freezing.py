"""`--freeze`: parts of a pretrained network that do not train, for some epochs or at all.

A frozen part has no gradients, so it has no backward pass, and no optimizer touches it, not even by weight decay. It
stays in evaluation mode: batch norm uses and keeps the checkpoint's statistics, stochastic depth drops nothing.
"""

from types import MethodType

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import UserError
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..recipes import Recipe


PARTS = {"stages": "the stem and the stages", "backbone": "all but the classifier"}


def check_fine_tuning(recipe: Recipe) -> None:
    """Raises `UserError` for a recipe that freezes fresh weights, or that cannot be frozen and thawed as it says."""
    if recipe.freeze == "none":
        return
    if recipe.model is None:
        raise UserError(
            f"--freeze {recipe.freeze} keeps pretrained weights as they are; give them with --model, or leave it out."
        )
    if recipe.compile == "graphs":
        raise UserError("--freeze changes what a step computes, which a recorded graph cannot; use --compile full.")


class Freezing:
    """Freezes parts of a network, in place, and thaws them when their epochs are over.

    Args:
        model: the network, without DDP, whose optimizer has been built: it holds the frozen weights, too, so that its
            groups stay what they are.
    """

    def __init__(self, model: EfficientNetNVForImageClassification, recipe: Recipe):
        self.what, self.epochs = recipe.freeze, recipe.freeze_epochs
        parts: dict[str, nn.Module] = {"stages": model.efficientnet.encoder, "backbone": model.efficientnet}
        self.part = parts.get(self.what)
        self.weights: list[nn.Parameter] = []
        if self.part is not None:
            self.part.train(False)
            # Whoever puts the network into training mode, after a validation or before an epoch, passes here.
            self.part.train = MethodType(_stay, self.part)
            self.weights = [parameter for parameter in self.part.parameters() if parameter.requires_grad]
            for parameter in self.weights:
                parameter.requires_grad_(False)

    def describe(self, epochs: int) -> str:
        """What trains, in a sentence, for the first lines of a run of so many epochs; empty where all does."""
        if self.part is None:
            return ""
        span = f"the first {self.epochs} of {epochs} epochs" if 0 < self.epochs < epochs else "the whole run"
        return f"{PARTS[self.what]} for {span}: {sum(weight.numel() for weight in self.weights):,} parameters"

    def is_over(self, epoch: int) -> bool:
        """Whether something is frozen that trains from this epoch on."""
        return self.part is not None and 0 < self.epochs <= epoch

    def thaw(self, wrapped: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> nn.Module:
        """Lets everything train, and returns `wrapped`, the network as it is called in training, in a new DDP if it had
        one: DDP expects the gradients of those parameters that had any when it was made."""
        assert self.part is not None
        del self.part.train
        for parameter in self.weights:
            parameter.requires_grad_(True)
        self.part, self.weights = None, []
        _rest(optimizer)
        if not isinstance(wrapped, DistributedDataParallel):
            return wrapped
        settings = accelerator.ddp_handler.to_kwargs() if accelerator.ddp_handler is not None else {}
        again = DistributedDataParallel(
            wrapped.module, device_ids=wrapped.device_ids, output_device=wrapped.output_device, **settings
        )
        accelerator._models = [again if model is wrapped else model for model in accelerator._models]
        return again


def _rest(optimizer: torch.optim.Optimizer) -> None:
    """Gives the weights of an SGD that have no momentum one of 0, which the first step makes what torch makes of none:
    fused SGD takes a group in which all have one, or nobody."""
    for group in optimizer.param_groups:
        states = [(weight, optimizer.state[weight]) for weight in group["params"] if "dampening" in group]
        if group.get("momentum") or any("momentum_buffer" in state for _, state in states):
            for weight, state in states:
                state.setdefault("momentum_buffer", torch.zeros_like(weight))


def _stay(self: nn.Module, mode: bool = True) -> nn.Module:
    return self
