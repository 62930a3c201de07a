"""Images that can only be read in order: `--streaming`."""

import logging
import os
import queue
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeVar

import datasets
import fsspec
import numpy as np
import pyarrow as pa
from datasets.distributed import split_dataset_by_node

from ..errors import UserError, first_line, printable
from .labels import NO_LABEL
from .listing import UNKNOWN, rows
from .pictures import BadPicture, read_file
from .remote import builder_of
from .sampler import BatchRequest, TrainingPlan, mix
from .source import NO_IMAGE


T = TypeVar("T")
_END = object()
SHUFFLE_BUFFER = 1000  # images, undecoded: about 100 MB of ImageNet
_SPARE = 8  # images of a stream beside those of a micro-batch, for the places of unreadable ones
_FIRST = 64  # images of a stream that are asked for a label before it is used
_QUIET = 300.0  # seconds without an answer before a line says so
_LEAVE = 1.0  # seconds that a reading thread is waited for at the end
log = logging.getLogger(__name__)


class StreamedSplit:
    """Images that can only be read in order.

    Args:
        mapping: of a row's label to ours; -1 for a class that is not known.
        names: of the classes in a row's numbering.
        size: images in it.
        origin: what `--dataset_name` and `--dataset_config` were, and the split's name.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        image_column: str,
        label_column: str,
        mapping: np.ndarray,
        names: list[str],
        size: int,
        origin: tuple[str, str | None, str],
    ):
        dataset = dataset.select_columns([image_column, label_column])
        self._dataset = dataset.cast_column(image_column, datasets.Image(decode=False))
        self._image_column = image_column
        self._label_column = label_column
        self._mapping = mapping
        self._names = names
        self._size = size
        self._origin = origin
        self._has_gaps = False

    def __len__(self) -> int:
        return self._size

    def note_on_files(self, world_size: int) -> str | None:
        """A sentence where the files do not divide evenly, and every process has to read all of them."""
        files = self._dataset.num_shards
        if files % world_size == 0:
            return None
        name, _, split = self._origin
        return (
            f"split {split} of {printable(name)} has {files:,} file{'s' * (files != 1)}, which {world_size} processes"
            f" cannot share evenly: each reads all of them and keeps one image of {world_size}; a multiple of"
            f" {world_size} files would be read once."
        )

    def read(self, rank: int, world_size: int, shuffle_seed: int | None = None) -> Iterator[tuple[dict, int]]:
        """This rank's undecoded images and labels: its files if they divide evenly, else every n-th image."""
        dataset = self._dataset
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed & 0xFFFFFFFF, buffer_size=SHUFFLE_BUFFER)
        if world_size > 1:
            dataset = split_dataset_by_node(dataset, rank, world_size)
        name, _, split = self._origin
        for row in self._rows(dataset):
            label = row[self._label_column]
            if label is None or label == NO_LABEL:
                if not self._has_gaps and rank == 0:
                    log.warning("split %s of %s has images without a label: they are left out", split, printable(name))
                self._has_gaps = True
                continue
            if not 0 <= label < len(self._mapping):
                raise UserError(f"--dataset_name {name} has an image whose label is {label}, which is no class of it.")
            if self._mapping[label] < 0:
                known = [name for name, number in zip(self._names, self._mapping) if number >= 0]
                raise UserError(
                    f"split {split} of {printable(name)} has an image of the class {printable(self._names[label])},"
                    f" which is not known; known are {len(known):,} of its classes, e.g."
                    f" {', '.join(printable(each) for each in known[:3])}. Leave such images out."
                )
            yield row[self._image_column] or NO_IMAGE, int(self._mapping[label])

    def require_labels(self) -> None:
        """Raises `UserError` where the first images have no label: those of a test split never have."""
        first = [row[self._label_column] for row in islice(self._rows(self._dataset), _FIRST)]
        if all(label is None or label == NO_LABEL for label in first):
            name, _, split = self._origin
            found = f"none of its first {len(first)} images has one" if first else "it is empty"
            raise UserError(f"split {split} of {name} has no labels: {found} (null or -1).")

    def _rows(self, dataset) -> Iterator[dict]:
        stream, name = iter(dataset), self._origin[0]
        while True:
            try:
                row = next(stream, None)
            except Exception as error:  # a network's, a damaged file's: of every kind
                raise UserError(f"the stream of --dataset_name {name} broke: {printable(first_line(error))}") from error
            if row is None:
                return
            yield row

    def listing(self, split: str) -> pa.Table:
        """Its part of a `DataListing`: the files that it is read from, since nobody knows its images beforehand."""
        name, config, own = self._origin
        try:
            files = (builder_of(name, config).config.data_files or {}).get(own, [])
            sizes = [int(fs.info(path).get("size") or UNKNOWN) for fs, path in map(fsspec.core.url_to_fs, files)]
        except Exception as error:  # as `load_dataset`
            raise UserError(f"--dataset_name {name} cannot be listed: {printable(first_line(error))}") from error
        home = os.path.abspath(name)
        names = [os.path.relpath(file, home) if file.startswith(home + os.sep) else file for file in map(str, files)]
        names = [re.sub("@[0-9a-f]{40}", "", each) for each in names]  # a commit may have changed other files only
        names, sizes = [*names, f"all images of {own}"], [*sizes, self._size]
        return rows(split, names, np.full(len(names), UNKNOWN), np.array(sizes))


class MicroBatchSplit:
    """The images of one micro-batch, and maybe some beside it, looked up by number like a `Split`."""

    def __init__(self, indices: np.ndarray, samples: list[tuple[dict, int]]):
        self._samples = dict(zip(indices.tolist(), samples))

    def label(self, index: int) -> int:
        return self._samples[index][1]

    def name(self, index: int) -> str:
        return self._samples[index][0].get("path") or f"image {index} of the stream"

    def read(self, index: int) -> bytes:
        image = self._samples[index][0]
        if image["bytes"] is not None:
            return image["bytes"]
        if not image["path"]:
            raise BadPicture("has neither bytes nor a path")
        return read_file(image["path"])

    def stand_ins(self, index: int, seed: int):
        """The other images, those of the same class first."""
        same = self.label(index)
        yield from sorted((other for other in self._samples if other != index), key=lambda o: self.label(o) != same)


@dataclass(frozen=True)
class StreamedTrainingPlan(TrainingPlan):
    """Like `TrainingPlan`, but the order is that of the stream through a shuffle buffer, seeded by (seed, epoch).

    It therefore depends on the number of ranks. Resuming reads what it skips, without decoding it. A rank whose files
    run out early starts over in another order, so that all ranks make the same number of updates.
    """

    split: StreamedSplit | None = None

    def requests(self, epoch: int, start_update: int = 0) -> Iterator[BatchRequest]:
        return read_ahead(self._requests(epoch, start_update * self.steps_per_update))

    def _requests(self, epoch, first):
        # Each micro-batch comes with some neighbours, those before it but in the first ones: nothing is read that no
        # micro-batch needs, and a resumed run has the same ones.
        size = self.per_device_batch_size
        start = max(0, first * size - _SPARE)
        samples, held = islice(self._samples(epoch), start, None), deque()
        for micro_batch in range(first, self.batches_per_epoch):
            own = micro_batch * size
            while start < own - _SPARE:
                held.popleft()
                start += 1
            held.extend(islice(samples, size + _SPARE - len(held)))
            numbers = np.arange(start, start + len(held)) * self.world_size + self.rank
            split = MicroBatchSplit(numbers, list(held))
            slot = micro_batch * self.world_size + self.rank
            yield BatchRequest(epoch, slot, numbers[own - start : own - start + size], split)

    def _samples(self, epoch):
        for lap in count():
            read = 0
            for sample in self.split.read(self.rank, self.world_size, mix(self.seed, epoch, lap)):
                read += 1
                yield sample
            if read == 0:
                raise UserError(
                    f"rank {self.rank} of {self.world_size} gets no images from this stream: it has too few files."
                )


@dataclass(frozen=True)
class StreamedValidationPlan:
    """Every image once over all ranks, as the stream divides itself."""

    num_samples: int
    per_device_batch_size: int
    rank: int = 0
    world_size: int = 1
    split: StreamedSplit | None = None

    @property
    def updates_per_epoch(self) -> int:
        share = -(-self.num_samples // self.world_size)
        return -(-share // self.per_device_batch_size)

    def requests(self, epoch: int = 0, start_update: int = 0) -> Iterator[BatchRequest]:
        return read_ahead(self._requests(epoch, start_update))

    def _requests(self, epoch, start_update):
        samples = self.split.read(self.rank, self.world_size)
        for batch in count():
            chunk = list(islice(samples, self.per_device_batch_size))
            if not chunk:
                return
            positions = batch * self.per_device_batch_size + np.arange(len(chunk))
            indices = positions * self.world_size + self.rank
            if batch >= start_update:
                yield BatchRequest(epoch, batch * self.world_size + self.rank, indices, MicroBatchSplit(indices, chunk))


def read_ahead(iterator: Iterator[T], depth: int = 4) -> Iterator[T]:
    """The same items, fetched by a thread a few ahead of whoever consumes them: a network is slow.

    What the iterator raises is raised here. The thread ends when this generator is closed; one that waits for an answer
    is left to itself.
    """
    items: queue.Queue = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work():
        try:
            for item in iterator:
                if not put((item, None)):
                    return
            put((_END, None))
        except BaseException as error:  # handed to the consumer
            put((_END, error))

    thread = threading.Thread(target=work, name="read_ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                item, error = items.get(timeout=_QUIET)
            except queue.Empty:
                log.warning("nothing has been read from the stream for %.0f minutes; waiting on", _QUIET / 60)
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item
    finally:
        stopped.set()
        thread.join(_LEAVE)
