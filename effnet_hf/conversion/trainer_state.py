"""What a training checkpoint of the original knows besides the weights: epoch, best accuracy, optimizer state.

PyTorch numbers the optimizer's tensors in the order it was given them. The original makes two groups, the parameters
with `bn` in their name and the others (by default without and with weight decay); the order within a group is the
model's, which is that of the state dict. Here every tensor gets our parameter's name instead of a number.

What `convert` keeps of it is one safetensors file: `optimizer/KEY/PARAMETER`, `average/NAME`, and everything that is
no tensor as JSON in the file's header.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoint import read_weights
from ..errors import UserError, first_line, printable
from ..reading import read_tensors, short, wrong_numbers


TRAINER_FILE = "trainer_state.safetensors"
_MOST_EPOCHS = 1_000_000_000
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class TrainerState:
    """
    Attributes:
        epoch: number of finished epochs, i.e. the index of the next one.
        best_top1: best validation accuracy so far, percent.
        param_groups: hyperparameters of each group that are numbers, words or lists of such, and under `"params"` our
            names of its parameters.
        optimizer_state: our parameter name to its state (`momentum_buffer`, `square_avg`, `step`, …), in our shapes.
        averaged: the moving average (EMA) of the weights under our names, if the weights themselves are the plain ones.
    """

    epoch: int | None
    best_top1: float | None
    param_groups: list[dict[str, Any]]
    optimizer_state: dict[str, dict[str, Any]]
    averaged: dict[str, torch.Tensor] | None = None


def write_trainer_state(state: TrainerState, folder: str | os.PathLike) -> None:
    """Writes it into a folder, for [`read_trainer_state`]."""
    entries = [
        (f"optimizer/{key}/{name}", value) for name, own in state.optimizer_state.items() for key, value in own.items()
    ]
    entries += [(f"average/{name}", tensor) for name, tensor in (state.averaged or {}).items()]
    described = {
        "epoch": state.epoch,
        "best_top1": state.best_top1,
        "param_groups": state.param_groups,
        "numbers": {key: value for key, value in entries if not isinstance(value, torch.Tensor)},
    }
    tensors = {  # copies: safetensors refuses tensors that share memory
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in entries
        if isinstance(value, torch.Tensor)
    }
    save_file(tensors, Path(folder, TRAINER_FILE), metadata={"trainer_state": json.dumps(described)})


def read_trainer_state(folder: str | os.PathLike) -> TrainerState:
    """What [`write_trainer_state`] wrote beside the weights.

    Raises:
        UserError: it is damaged, or a field or tensor is not what it can be for these weights.
    """
    path = Path(folder, TRAINER_FILE)
    tensors, metadata = read_tensors(path)
    try:
        described = json.loads(metadata.get("trainer_state", ""))
        if described.keys() != {"epoch", "best_top1", "param_groups", "numbers"}:
            raise ValueError
        groups, numbers = list(described["param_groups"]), dict(described["numbers"])
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} does not say what it holds; convert the original's checkpoint again.") from None
    for field, fits, wanted in (
        ("epoch", _is_epoch, f"a whole number from 0 to {_MOST_EPOCHS}"),
        ("best_top1", _is_percent, "a number from 0 to 100"),
    ):
        if described[field] is not None and not fits(described[field]):
            raise UserError(f"{path}: {field} must be {wanted}, got {short(described[field])}.")
    weights = read_weights(str(folder), str(path))
    parts: dict[str, dict[str, Any]] = {"optimizer": {}, "average": {}}
    for key, value in {**tensors, **numbers}.items():
        part, _, rest = key.partition("/")
        slot, name = rest.split("/", 1) if part == "optimizer" and "/" in rest else ("", rest)
        belongs = part in parts and name in weights and (isinstance(value, torch.Tensor) or slot == "step")
        if belongs and isinstance(value, torch.Tensor):
            own = weights[name]
            like = value.is_floating_point() == own.is_floating_point() and value.shape == own.shape
            belongs = value.numel() == 1 if slot == "step" else like
        if not belongs:
            raise UserError(f"{path}: {printable(key)} belongs to no weight of this shape beside it.")
        if isinstance(value, torch.Tensor):
            value = value.reshape(()) if slot == "step" else value
            value = value.float() if value.is_floating_point() else value
            fault = wrong_numbers(slot or name, value)
        else:
            fault = None if _is_number(value) and value >= 0 else "is no count of steps"
        if fault:
            raise UserError(f"{path}: {printable(key)} {fault}.")
        if part == "optimizer":
            parts[part].setdefault(name, {})[slot] = value
        else:
            parts[part][name] = value
    for part, names in (
        ("optimizer", {name for name in weights if not name.endswith(_BUFFERS)}),
        ("average", set(weights)),
    ):
        if parts[part] and names - parts[part].keys():
            raise UserError(f"{path} lacks the {part}'s {min(names - parts[part].keys())}.")
    return TrainerState(
        described["epoch"], described["best_top1"], groups, parts["optimizer"], parts["average"] or None
    )


def trainer_state_of(
    extras: Mapping[str, Any], their_keys: list[str], names: Mapping[str, str], shapes: Mapping[str, tuple]
) -> tuple[TrainerState | None, list[str]]:
    """The trainer's state in a training checkpoint, and notes on what could not be used.

    Args:
        extras: the entries of the checkpoint besides the weights.
        their_keys: keys of their state dict, in the file's order.
        names: their key to our parameter name; `shapes`: our parameter name to its shape.
    """
    notes = []
    groups, state = [], {}
    optimizer = extras.get("optimizer")
    if optimizer is not None and optimizer != {}:
        order = [key for key in their_keys if key in names and not key.endswith(_BUFFERS)]
        try:
            groups, state = _by_name(optimizer, order, names, shapes)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError) as error:
            groups, state = [], {}
            reason = printable(first_line(error)[:200])
            notes.append(f"The optimizer state does not fit the weights and was left out: {reason}")
    counts: dict[str, Any] = {}
    for field, fits, wanted in (
        ("epoch", _is_epoch, f"no whole number from 0 to {_MOST_EPOCHS}"),
        ("best_prec1", _is_percent, "no number from 0 to 100"),
    ):
        value = extras.get(field)
        counts[field] = value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        if value is not None and not fits(value):
            counts[field] = None
            notes.append(f"Its {field}, {short(value)}, is {wanted} and was left out.")
    others = sorted(printable(key) for key in extras if key not in ("epoch", "best_prec1", "optimizer"))
    if others:
        notes.append(f"Left out of the training checkpoint: {', '.join(others)}.")
    epoch, best = counts["epoch"], counts["best_prec1"]
    if epoch is None and best is None and not groups:
        return None, notes
    return TrainerState(epoch, None if best is None else float(best), groups, state), notes


def _is_epoch(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_EPOCHS


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e38 < value < 1e38


def _is_percent(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 100


def _is_plain(value: Any) -> bool:
    """Whether it is a number or a word, or a short list of such."""
    if isinstance(value, (list, tuple)):
        return len(value) < 100 and not any(isinstance(each, (list, tuple)) or not _is_plain(each) for each in value)
    return value is None or isinstance(value, (bool, str)) or _is_number(value)


def _by_name(optimizer: Any, order: list[str], names: Mapping[str, str], shapes: Mapping[str, tuple]):
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
        plain = {name: value for name, value in group.items() if isinstance(name, str) and _is_plain(value)}
        groups.append({**plain, "params": ours})
    state = {}
    for number, entries in optimizer["state"].items():
        name = name_of[number]
        state[name] = {
            key: _reshaped(value, shapes[name], key, name) for key, value in entries.items() if value is not None
        }
    if state and state.keys() != set(name_of.values()):
        raise ValueError(f"it holds nothing of {min(set(name_of.values()) - state.keys())}")
    return groups, state


def _reshaped(value: Any, shape: tuple, key: Any, name: str) -> Any:
    if not (isinstance(key, str) and key.isidentifier()):  # it becomes part of a name in a file
        raise ValueError(f"it calls something {short(key)}")
    if not isinstance(value, torch.Tensor):
        if key != "step" or not _is_number(value) or value < 0:
            raise ValueError(f"{key} of {name} is {short(value)}")
        return value
    value = value.detach().float()
    if fault := wrong_numbers(key, value):
        raise ValueError(f"{key} of {name} {fault}")
    if value.numel() == 1 and key == "step":
        return value.reshape(())
    if value.numel() != torch.Size(shape).numel():
        raise ValueError(f"{key} of {name} is {tuple(value.shape)}, the parameter {shape}")
    return value.reshape(shape)
