"""Who sees which image when: a pure function of (seed, epoch), the same for any number of processes and workers.

Update `u` of an epoch consumes `order[u * G : (u + 1) * G]`, G being the global batch. Within it, micro-batch `m` of
rank `r` is the `(m * world_size + r)`-th run of `per_device_batch_size` images: two processes, or one process that
accumulates twice, see the same micro-batches. That run's number, counted over the epoch, is its `slot`.

A balanced epoch has the same number of updates and every class as often. Each class hands out its images as from a
stack that is shuffled anew whenever it is empty, over all epochs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import UserError


_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_CLASSES = 0x636C617373  # keeps the order within a class apart from that of an epoch


def mix(*words: int) -> int:
    """64 well-mixed bits from whole numbers (SplitMix64): seeds that differ in one bit share nothing.

    Unlike `hash`, and unlike the streams of numpy and torch, its values are the same in every version.
    """
    state = 0
    for word in words:
        state = _finalise((state ^ (word & _MASK)) + _GOLDEN & _MASK)
    return state


def _finalise(z):
    """SplitMix64's output function, on a Python integer or an array of uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `range(num_samples)` that this epoch follows, int64."""
    keys = np.arange(1, num_samples + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(mix(seed, epoch))
    return np.argsort(_finalise(keys), kind="stable")


def balanced_order(labels: np.ndarray, size: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """`size` sample numbers, in which every class that there is stands equally often, or once more than another.

    Which class that is goes round from epoch to epoch, and so do the images of a class: no image is taken again before
    all others of its class were.

    Args:
        labels: int64 (samples,), classes.

    Returns:
        The numbers, and for each how many times all of its class had been taken before, counted from this epoch's
        first: what tells the appearances of an image in one epoch apart. Both int64 (size,).
    """
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    counts, classes = np.diff(starts, append=len(labels)), len(starts)
    share, rest = divmod(size, classes)
    samples, repeats = [], []
    for place, (start, count) in enumerate(zip(starts.tolist(), counts.tolist())):
        # How many of this class earlier epochs have taken, and this one will have: the `rest` is dealt out in turn.
        first, stop = (e * share + (e * rest - place + classes - 1) // classes for e in (epoch, epoch + 1))
        laps = np.arange(first // count, -(-stop // count))
        keys = _scrambled(laps.astype(np.uint64) + np.uint64(mix(seed, place, _CLASSES)))
        keys = _scrambled(keys[:, None] + np.arange(1, count + 1, dtype=np.uint64))
        stacks = np.argsort(keys, axis=1, kind="stable")
        taken = slice(first - laps[0] * count, stop - laps[0] * count) if len(laps) else slice(0)
        samples.append(order[start + stacks.ravel()[taken]])
        repeats.append(np.repeat(laps - laps[:1], count)[taken])
    shuffled = epoch_order(size, seed, epoch)
    return np.concatenate(samples)[shuffled], np.concatenate(repeats)[shuffled]


def _scrambled(words: np.ndarray) -> np.ndarray:
    """SplitMix64's output for uint64 states that are neighbours."""
    return _finalise(words * np.uint64(_GOLDEN))


@dataclass(frozen=True)
class BatchPlan:
    """`global_batch_size = per_device * world_size * accumulation_steps`, always exactly.

    `rank` is this process's number; `reason` says why the batch per device is no larger, where the device's memory
    decided.
    """

    per_device: int
    world_size: int = 1
    accumulation_steps: int = 1
    rank: int = 0
    reason: str = ""

    @property
    def global_batch_size(self) -> int:
        return self.per_device * self.world_size * self.accumulation_steps

    def __str__(self) -> str:
        devices = f"{self.world_size} process{'es' if self.world_size > 1 else ''}"
        parts = f"{self.per_device} per device x {devices} x {self.accumulation_steps} accumulated"
        return f"{self.global_batch_size} = {parts}" + (f" ({self.reason})" if self.reason else "")


@dataclass(frozen=True)
class BatchRequest:
    """One micro-batch to fetch: sample numbers, and what seeds its randomness."""

    epoch: int
    slot: int  # position in the epoch over all ranks
    indices: np.ndarray
    split: Any = None  # the samples themselves, where they cannot be looked up by number (streaming)
    repeats: np.ndarray | None = None  # int64, for each index which of its appearances in the epoch this is

    def seeds(self, seed: int) -> list[int]:
        """What seeds the randomness of each image: a function of the run's seed, epoch, image, and appearance."""
        repeats = [0] * len(self.indices) if self.repeats is None else self.repeats.tolist()
        return [mix(seed, self.epoch, *((i, n) if n else (i,))) for i, n in zip(self.indices.tolist(), repeats)]


@dataclass(frozen=True)
class TrainingPlan:
    """Shuffled, whole updates only: the images that do not fill a last global batch wait for the next epoch.

    Raises:
        UserError: fewer images than one global batch.
    """

    num_samples: int
    per_device_batch_size: int
    seed: int = 0
    rank: int = 0
    world_size: int = 1
    steps_per_update: int = 1

    def __post_init__(self):
        if self.num_samples < self.global_batch_size:
            share = self.num_samples // self.world_size
            eighth = 2 ** max((share // 8).bit_length() - 1, 3)  # a power of two: eight steps or more in an epoch
            raise UserError(
                f"one update takes {self.global_batch_size} images ({self.per_device_batch_size} per device x"
                f" {self.world_size} devices x {self.steps_per_update} accumulation steps) and the training data has"
                f" {self.num_samples}; lower --global_batch_size, e.g. to {min(eighth, share) * self.world_size}."
            )

    @property
    def global_batch_size(self) -> int:
        return self.per_device_batch_size * self.world_size * self.steps_per_update

    @property
    def updates_per_epoch(self) -> int:
        return self.num_samples // self.global_batch_size

    @property
    def batches_per_epoch(self) -> int:
        return self.updates_per_epoch * self.steps_per_update

    def requests(self, epoch: int, start_update: int = 0) -> Iterator[BatchRequest]:
        """This rank's micro-batches from update `start_update` on; what comes before is never touched."""
        order, repeats = self._order(epoch)
        for micro_batch in range(start_update * self.steps_per_update, self.batches_per_epoch):
            slot = micro_batch * self.world_size + self.rank
            own = slice(slot * self.per_device_batch_size, (slot + 1) * self.per_device_batch_size)
            yield BatchRequest(epoch, slot, order[own], repeats=None if repeats is None else repeats[own])

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        return epoch_order(self.num_samples, self.seed, epoch), None


@dataclass(frozen=True)
class BalancedTrainingPlan(TrainingPlan):
    """As many updates, and in each epoch every class as often.

    Attributes:
        labels: int64 (num_samples,), the classes.
    """

    labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False, repr=False)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray | None]:
        return balanced_order(self.labels, self.updates_per_epoch * self.global_batch_size, self.seed, epoch)


@dataclass(frozen=True)
class ValidationPlan:
    """In order, every image exactly once over all ranks; ranks may get different numbers of batches."""

    num_samples: int
    per_device_batch_size: int
    rank: int = 0
    world_size: int = 1

    @property
    def batches_per_epoch(self) -> int:
        slots = -(-self.num_samples // self.per_device_batch_size)
        return len(range(self.rank, slots, self.world_size))

    updates_per_epoch = batches_per_epoch

    def requests(self, epoch: int = 0, start_update: int = 0) -> Iterator[BatchRequest]:
        for batch in range(start_update, self.batches_per_epoch):
            slot = batch * self.world_size + self.rank
            start = slot * self.per_device_batch_size
            stop = min(start + self.per_device_batch_size, self.num_samples)
            yield BatchRequest(epoch, slot, np.arange(start, stop))
