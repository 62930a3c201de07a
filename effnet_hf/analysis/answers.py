"""What a network answered to every image of a validation, kept while it is measured."""

from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator


CHUNK = 4096  # images of one gathering, so that no device needs room for all answers


@dataclass(frozen=True)
class Answers:
    """The answers to labelled images, in the order of the split.

    Attributes:
        logits: float32 (N, classes), as the network gives them.
        labels: int64 (N,), or uint8 (N, classes) where an image has several.
        index: int64 (N,), the numbers of the images in their split, ascending.
        class_names: in label order.
        thresholds: float64 (classes,), from which probability on an image has a label; None where it has one.
        temperature: what the network has divided its logits by.
    """

    logits: np.ndarray
    labels: np.ndarray
    index: np.ndarray
    class_names: list[str]
    thresholds: np.ndarray | None = None
    temperature: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def several(self) -> bool:
        """Whether an image has several labels."""
        return self.labels.ndim == 2


class Recorder:
    """Keeps the answers of a validation in the host's memory, without waiting for the device, and gives them out at
    its end: 4 bytes an image and class."""

    def __init__(self) -> None:
        self._batches: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def add(self, logits: torch.Tensor, labels: torch.Tensor, index: torch.Tensor) -> None:
        """A batch: float32 (N, classes), what the loader gave as labels, and its sample numbers."""
        several = labels.ndim == 2
        self._batches.append((_kept(logits), _kept(labels.to(torch.uint8) if several else labels), _kept(index)))

    def answers(
        self,
        accelerator: Accelerator,
        class_names: list[str],
        thresholds: np.ndarray | None = None,
        temperature: float | None = None,
    ) -> Answers | None:
        """Of all processes, every image once; None on all processes but the first. A collective call, once.

        Args:
            temperature: `config.softmax_temperature` of the network.
        """
        device = accelerator.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the copies of the last batches may be on their way
        own = [_joined(list(column)) for column in zip(*self._batches)]
        self._batches.clear()
        if accelerator.num_processes > 1:
            own = _gathered(own, accelerator, len(class_names), several=thresholds is not None)
        if not accelerator.is_main_process:
            return None
        logits, labels, index = (column.numpy() for column in own)
        # A process has every so-manieth image. A list that no process count divides may be filled up: once is enough.
        places = np.unique(index, return_index=True)[1]
        if not np.array_equal(places, np.arange(len(index))):
            logits, labels, index = logits[places], labels[places], index[places]
        return Answers(logits, labels, index, class_names, thresholds, temperature or 1.0)


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu")
    kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)  # only there a copy goes on by itself
    return kept.copy_(tensor.detach(), non_blocking=True)


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor of all; each part is let go once it is copied, so that all are not there twice."""
    whole = torch.empty((sum(map(len, parts)), *parts[0].shape[1:]), dtype=parts[0].dtype)
    parts.reverse()
    place = 0
    while parts:
        part = parts.pop()
        whole[place : place + len(part)] = part
        place += len(part)
    return whole


def _gathered(own: list[torch.Tensor], accelerator: Accelerator, classes: int, several: bool) -> list[torch.Tensor]:
    """The columns of all processes, on the first one; of the others nothing is kept."""
    if not own:  # this process had no image
        labels = torch.empty((0, classes), dtype=torch.uint8) if several else torch.empty(0, dtype=torch.int64)
        own = [torch.empty((0, classes)), labels, torch.empty(0, dtype=torch.int64)]
    rows = torch.tensor([len(own[0])], device=accelerator.device)
    most = int(accelerator.gather(rows).max())
    parts: list[list[torch.Tensor]] = [[] for _ in own]
    for start in range(0, most, CHUNK):
        there = torch.tensor([len(own[0][start : start + CHUNK])], device=accelerator.device)
        counts = accelerator.gather(there).tolist()
        for column, kept in zip(own, parts):
            chunk = column[start : start + CHUNK].to(accelerator.device)
            filled = accelerator.gather(accelerator.pad_across_processes(chunk))
            if accelerator.is_main_process:
                kept += [part[:count].cpu() for part, count in zip(filled.chunk(len(counts)), counts)]
    return [_joined(kept) if kept else column for column, kept in zip(own, parts)]
