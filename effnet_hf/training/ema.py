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
        self._source: nn.Module | None = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        if model is not self._source:  # collected once: walking through the modules takes longer than the average
            self._source, own, new = model, _tensors(self.model), _tensors(model)
            self._floats, self._new_floats = ([t for t in each if t.is_floating_point()] for each in (own, new))
            self._counts, self._new_counts = ([t for t in each if not t.is_floating_point()] for each in (own, new))
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self._floats, self._new_floats, 1 - decay)
        if self._counts:  # of batches, by batch norm
            torch._foreach_copy_(self._counts, self._new_counts)
        self.updates += 1

    def state_dict(self) -> dict:
        return {"updates": self.updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.updates = state["updates"]
        self.model.load_state_dict(state["model"])


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and saved buffers, the living ones: later changes in place are seen through them."""
    return list(model.state_dict(keep_vars=True).values())
