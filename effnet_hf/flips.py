"""Test-time flips: the answer to an image and the answer to its mirror image, averaged."""

import math
from types import MethodType

import torch
from torch.nn.functional import logsigmoid

from .multi_label import is_multi_label


def use_test_time_flip(network: torch.nn.Module) -> torch.nn.Module:
    """In place: in evaluation mode the network answers with the arithmetic mean of the probabilities of an image and of
    its mirror image, left and right exchanged, for twice the work.

    The mean is given as logits, the logarithms whose softmax (sigmoid, for several labels per image) it is, so that
    whatever reads a network's answers reads these. Both are divided by `config.softmax_temperature` before.

    Where left and right mean something (digits, letters, road signs, which hand) it does harm.
    """
    network.forward = MethodType(_both_ways, network)  # bound, so that a deep copy of the network calls the copy
    return network


def _both_ways(self, pixel_values: torch.Tensor | None = None, **settings):
    answer = type(self).forward(self, pixel_values=pixel_values, **settings)
    if pixel_values is None or self.training:
        return answer
    mirrored = type(self).forward(self, pixel_values=pixel_values.flip(-1), **settings)
    one, other = answer.logits.float(), mirrored.logits.float()
    # In logarithms: of a probability that rounds to 1 the other digits would be lost.
    if is_multi_label(self.config) or self.config.num_labels == 1:
        answer.logits = _log_mean(logsigmoid(one), logsigmoid(other)) - _log_mean(logsigmoid(-one), logsigmoid(-other))
    else:
        answer.logits = _log_mean(one.log_softmax(-1), other.log_softmax(-1))
    return answer


def _log_mean(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.logaddexp(one, other) - math.log(2)
