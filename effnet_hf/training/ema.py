"""Exponential moving average of the weights, with the original's warm-up.

Own code because `torch.optim.swa_utils.AveragedModel` averages integer buffers too, and timm's `ModelEmaV3` warms up
by another formula.
"""

import copy
from typing import Any

import torch
from torch import nn


class ModelEMA:
    """Keeps `shadow = decay * shadow + (1 - decay) * model` over parameters and batch-norm statistics.

    The decay warms up as `min(decay, (1 + n) / (10 + n))` after n updates. The original updates after every
    micro-batch, so its effective horizon depends on the number of devices; this one follows optimizer steps.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.model: Any = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        own, new = list(self.model.state_dict().values()), list(model.state_dict().values())
        pairs = [(a, b) for a, b in zip(own, new) if a.is_floating_point()]
        torch._foreach_lerp_([a for a, _ in pairs], [b for _, b in pairs], 1 - decay)
        for a, b in zip(own, new):
            if not a.is_floating_point():
                a.copy_(b)
        self.updates += 1

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])
