"""Where a run stands."""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError, printable
from ..reading import read_json, short


_MOST = 2**53  # whole numbers up to here are exact in every reader of JSON


def _bounded(default: Any, low: float = 0, high: float = _MOST) -> Any:
    return field(default=default, metadata={"low": low, "high": high})


@dataclass
class Progress:
    """`epoch` and `update` name the next optimizer step; a position is exact for any rank count."""

    epoch: int = _bounded(0)
    update: int = _bounded(0)
    total_updates: int = _bounded(0)
    loss_sum: float = 0.0
    loss_count: int = _bounded(0)
    logged: tuple[float, int] = (0.0, 0)  # loss_sum and loss_count of the last line of metrics
    is_trained: bool = False  # all steps of `epoch` are done, its validation is still to come
    best_top1: float = _bounded(-1.0, -1, 100)  # of several labels per image: mAP, and below F1
    best_topk: float = _bounded(0.0, 0, 100)
    best_macro_recall: float = _bounded(0.0, 0, 100)  # of one label per image
    best_macro_f1: float = _bounded(0.0, 0, 100)
    best_loss: float = 0.0
    best_by: str = ""  # the figure that decides which model is best
    best_epoch: int = _bounded(-1, -1)
    best_is_ema: bool = False
    num_validated: int = _bounded(0)
    epochs_since_best: int = _bounded(0)
    seconds: float = _bounded(0.0)
    metrics_bytes: int = _bounded(0)
    num_samples: int = _bounded(0)
    num_processes: int = _bounded(1, 1)
    per_device: int = _bounded(0)  # images
    precision: str = ""
    loss_scale: float = _bounded(0.0, 0, 2.0**127)  # of fp16; 0 in other precisions
    loss_scale_steps: int = _bounded(0)

    def start_epoch(self, epoch: int) -> None:
        self.epoch, self.update, self.is_trained = epoch, 0, False
        self.loss_sum, self.loss_count, self.logged = 0.0, 0, (0.0, 0)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False)

    @classmethod
    def read(cls, path: Path) -> "Progress":
        """Reads what `to_json` wrote.

        Raises:
            UserError: a field is missing, unknown, of another type, or out of its range.
        """
        values = read_json(path)
        fields = {each.name: each for each in dataclasses.fields(cls)}
        if values.keys() != fields.keys():
            differing = ", ".join(sorted(map(printable, fields.keys() ^ values.keys())))
            raise UserError(f"{path} was not written by this version: {differing}.")
        progress = cls()
        for name, each in fields.items():
            low, high = each.metadata.get("low", -math.inf), each.metadata.get("high", math.inf)
            setattr(progress, name, _checked(values[name], getattr(progress, name), low, high, f"{path}: {name}"))
        if progress.update > progress.total_updates or progress.best_epoch > progress.epoch:
            raise UserError(f"{path} contradicts itself: its steps and epochs do not fit together.")
        return progress


def _checked(value: Any, like: Any, low: float, high: float, where: str) -> Any:
    """`value` if it is of the type of `like` and within bounds."""
    if isinstance(like, tuple):
        if isinstance(value, list) and len(value) == len(like):
            return tuple(_checked(entry, each, low, high, where) for entry, each in zip(value, like))
    elif isinstance(like, (bool, str)):
        if type(value) is type(like):
            return value
    elif not isinstance(value, bool) and isinstance(value, int if isinstance(like, int) else (int, float)):
        if low <= value <= high and abs(value) < 1e300:  # no infinity, nor a whole number that no float can hold
            return type(like)(value)
    raise UserError(f"{where} is {short(value)}, which it cannot be.")
