"""What a training checkpoint of the original knows besides the weights: epoch, best accuracy, optimizer state.

PyTorch numbers the optimizer's tensors in the order it was given them. The original makes two groups, the parameters
with `bn` in their name and the others (by default without and with weight decay); the order within a group is the
model's, which is that of the state dict. Here every tensor gets our parameter's name instead of a number.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class TrainerState:
    """
    Attributes:
        epoch: number of finished epochs, i.e. the index of the next one.
        best_top1: best validation accuracy so far, percent.
        param_groups: hyperparameters of each group, and under `"params"` our names of its parameters.
        optimizer_state: our parameter name to its state (`momentum_buffer`, `square_avg`, `step`, …), in our shapes.
        averaged: the moving average (EMA) of the weights under our names, if the weights themselves are the plain ones.
    """

    epoch: int | None
    best_top1: float | None
    param_groups: list[dict[str, Any]]
    optimizer_state: dict[str, dict[str, Any]]
    averaged: dict[str, torch.Tensor] | None = None


def read_trainer_state(
    extras: Mapping[str, Any], their_keys: list[str], names: Mapping[str, str], shapes: Mapping[str, tuple]
) -> tuple[TrainerState | None, list[str]]:
    """The trainer's state, and notes on what could not be used.

    Args:
        extras: the entries of the checkpoint besides the weights.
        their_keys: keys of their state dict, in the file's order.
        names: their key to our parameter name; `shapes`: our parameter name to its shape.
    """
    notes = []
    groups, state = [], {}
    optimizer = extras.get("optimizer")
    if isinstance(optimizer, Mapping) and optimizer.get("param_groups"):
        order = [key for key in their_keys if key in names and not key.endswith(_BUFFERS)]
        try:
            groups, state = _by_name(optimizer, order, names, shapes)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            groups, state = [], {}
            notes.append(f"The optimizer state does not fit the weights and was left out: {error}.")
    epoch, best = extras.get("epoch"), extras.get("best_prec1")
    others = sorted(str(key) for key in extras if key not in ("epoch", "best_prec1", "optimizer"))
    if others:
        notes.append(f"Left out of the training checkpoint: {', '.join(others)}.")
    if epoch is None and best is None and not groups:
        return None, notes
    best = None if best is None else float(best)
    return TrainerState(None if epoch is None else int(epoch), best, groups, state), notes


def _by_name(optimizer: Mapping, order: list[str], names: Mapping[str, str], shapes: Mapping[str, tuple]):
    """Parameter groups and state under our names; `ValueError` if the numbers cannot be told apart."""
    sizes = [len(group["params"]) for group in optimizer["param_groups"]]
    bn = [key for key in order if "bn" in key]
    rest = [key for key in order if "bn" not in key]
    known = {(len(order),): [order], (len(bn), len(rest)): [bn, rest], (len(rest), len(bn)): [rest, bn]}
    if tuple(sizes) not in known:
        raise ValueError(
            f"its groups hold {sizes} tensors, the model has {len(bn)} of batch norm and {len(rest)} others"
        )
    groups: list[dict] = []
    name_of: dict = {}
    for group, keys in zip(optimizer["param_groups"], known[tuple(sizes)]):
        ours = [names[key] for key in keys]
        name_of.update(zip(group["params"], ours))
        groups.append({**group, "params": ours})
    state = {}
    for number, entries in optimizer["state"].items():
        name = name_of[number]
        state[name] = {key: _reshaped(value, shapes[name], key, name) for key, value in entries.items()}
    return groups, state


def _reshaped(value: Any, shape: tuple, key: str, name: str) -> Any:
    if not isinstance(value, torch.Tensor) or value.numel() == 1 and key == "step":
        return value
    if value.numel() != torch.Size(shape).numel():
        raise ValueError(f"{key} of {name} is {tuple(value.shape)}, the parameter {shape}")
    return value.reshape(shape)
