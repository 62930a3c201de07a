"""Processes that read, decode and transform; whole micro-batches leave them. All that the default loader needs."""

import atexit
import contextlib
import errno
import gc
import logging
import math
import multiprocessing
import multiprocessing.queues
import os
import re
import signal
import sys
import tempfile
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from ..errors import UserError, first_line
from .bad_files import BadFile
from .pictures import USUAL, BadPicture, Picture, Reading
from .sampler import BatchRequest
from .source import Split


_POLL = 5.0  # seconds between two looks at loader processes that give nothing
_QUIET = 300.0  # seconds without a batch before a line says so
_LEAVE = 3.0  # seconds that loader processes have to end by themselves
_DIED = (
    "a loader process died ({}); usually memory ran out: lower --num_workers, or give a container more memory and"
    " shared memory (docker run --shm-size=8g)."
)
_TOO_MANY = re.compile("Too many open files|ancdata")
_UNREACHABLE = (errno.ENOENT, errno.ECONNREFUSED, errno.ECONNRESET)  # a live process: its socket's file is gone
log = logging.getLogger(__name__)


class PictureBatches(Dataset):
    """`self[request]` is a whole micro-batch of `prepare`d images; unreadable ones are replaced or left out.

    Args:
        split: where the files are.
        seed: of the run.
        replace_bad: put another image of the same class in the place of an unreadable one; otherwise leave it out.
        reading: what deep values mean, and how large an image may be.
    """

    def __init__(self, split: Split, seed: int, replace_bad: bool, reading: Reading = USUAL):
        self.split = split
        self.reading = reading
        self.seed = seed
        self.replace_bad = replace_bad

    def prepare(self, picture: Picture, seed: int):
        """What the batch needs of an image; `BadPicture` if it turns out to be unreadable."""
        raise NotImplementedError

    def load(self, request: BatchRequest) -> tuple[list, dict]:
        """The prepared images, and `labels`, `index` (int64 tensors), the `request` and the `bad` files met.

        An image that takes the place of an unreadable one keeps that one's `index`.
        """
        split = self.split_of(request)
        prepared, labels, kept, bad = [], [], [], []
        for index, seed in zip(request.indices.tolist(), request.seeds(self.seed)):
            candidate, stand_ins = index, None
            while candidate is not None:
                try:
                    prepared.append(self.prepare(Picture(split.read(candidate), self.reading), seed))
                    labels.append(split.label(candidate))
                    kept.append(index)
                    break
                except BadPicture as error:
                    bad.append(BadFile(split.name(candidate), str(error)))
                stand_ins = stand_ins or (split.stand_ins(index, seed) if self.replace_bad else iter(()))
                candidate = next(stand_ins, None)
        numbers = {"labels": torch.tensor(labels, dtype=torch.int64), "index": torch.tensor(kept, dtype=torch.int64)}
        # Without the images of a stream, which would come back from the worker with it.
        return prepared, {**numbers, "request": replace(request, split=None), "bad": bad}

    def split_of(self, request: BatchRequest) -> Split:
        return self.split if request.split is None else request.split


class MicroBatches(PictureBatches):
    """Micro-batches of finished images, `pixel_values` uint8 (N, H, W, 3).

    Args:
        transform: `TrainTransform` or `EvaluationTransform`.
    """

    def __init__(self, split: Split, transform, seed: int, replace_bad: bool, reading: Reading = USUAL):
        super().__init__(split, seed, replace_bad, reading)
        self.transform = transform

    def prepare(self, picture: Picture, seed: int):
        return self.transform(picture, seed)

    def __getitem__(self, request: BatchRequest) -> dict:
        images, batch = self.load(request)
        size = self.transform.processor.crop_size
        pixels = torch.empty((len(images), size["height"], size["width"], 3), dtype=torch.uint8)
        for target, image in zip(pixels.numpy(), images):
            target[...] = image
        return {"pixel_values": pixels, **batch}


class WorkerPool:
    """Runs a data set of whole batches, `PictureBatches` as a rule, in worker processes that live as long as the pool,
    or in this process with 0 workers."""

    def __init__(self, dataset: Dataset, num_workers: int = 0, prefetch_factor: int = 2, pin_memory: bool = False):
        self.num_workers = num_workers
        self._dataset = dataset
        self._pin = pin_memory
        self._requests = _Requests()
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._interrupted = False
        self._end: Any = None  # kills the workers
        if num_workers:
            self._loader = DataLoader(
                _InWorker(dataset),
                batch_size=None,
                sampler=self._requests,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                persistent_workers=True,
                pin_memory=pin_memory,
                collate_fn=_unchanged,
                worker_init_fn=_start_worker,
                # Its own generator: a draw from the global one would make dropout depend on the number of workers.
                generator=torch.Generator(),
            )

    def batches(self, requests: Iterator) -> Iterator:
        """The data set's answer to each request, in order.

        Raises:
            UserError: a worker died, or shared memory is full.
        """
        if self._loader is None:
            for request in requests:
                batch = self._dataset[request]
                if self._pin:
                    batch = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                yield batch
            return
        self._requests.current = requests
        try:
            iterator = self._start()
            while (batch := self._wait(lambda: next(iterator, None))) is not None:
                if isinstance(batch, _Failure):
                    raise UserError(batch.sentence)
                yield batch
        except GeneratorExit:
            raise
        except BaseException:
            self._interrupted = True
            raise

    def close(self):
        """Ends the workers, if need be by force: they have nothing to save."""
        iterator, self._loader, self._iterator = self._iterator, None, None
        if iterator is None:
            return
        kill = threading.Timer(0 if self._interrupted else _LEAVE, _kill, [iterator._workers])  # they ignore SIGTERM
        kill.daemon = True
        kill.start()
        try:
            iterator._shutdown_workers()  # the DataLoader has no public way to end persistent workers
        finally:
            kill.cancel()
            atexit.unregister(self._end)
            self._end()

    def death(self) -> str | None:
        """What ended one of the workers, in a sentence; None while all of them live."""
        dead = (worker for worker in getattr(self._iterator, "_workers", ()) if not worker.is_alive())
        code = next((worker.exitcode for worker in dead), None)
        if code is None:
            return None
        if code >= 0:  # nothing that a lack of memory does
            return f"a loader process ended with exit code {code}; --num_workers 0 does without them and shows why."
        with contextlib.suppress(ValueError):
            code = signal.Signals(-code).name
        return _DIED.format(f"killed by {code}")

    def _start(self) -> Any:
        if self._iterator is None:
            self._iterator = self._start_workers()
        else:
            self._iterator._timeout = 0  # what is left of an epoch that was not finished may take long
            self._wait(lambda: iter(self._loader))  # type: ignore[arg-type]
        self._iterator._timeout = _POLL
        return self._iterator

    def _start_workers(self) -> Any:
        if "nvidia.dali" in sys.modules:
            # The workers are forked next. One that collects a pipeline left in a cycle waits for threads it has not.
            gc.collect()
        if multiprocessing.current_process().daemon:
            raise UserError(
                "a daemonic process (as those of multiprocessing.Pool) may not start loader processes; do without them:"
                " --num_workers 0."
            )
        before = multiprocessing.active_children()
        # torch's own handler would raise wherever the main thread happens to be, in the middle of a training step too.
        signal_handling._SIGCHLD_handler_set = True
        try:
            # As many locks as it will take: where they have no room, torch's iterator is left half-made and noisy.
            [multiprocessing.Lock() for _ in range(3 * self.num_workers + 12)]
            with warnings.catch_warnings():
                # The run's lock and pinned memory have threads, which wait and hold nothing that a worker needs.
                warnings.filterwarnings("ignore", ".*multi-threaded, use of fork", DeprecationWarning)
                iterator: Any = iter(self._loader)  # type: ignore[arg-type]
            _leave_deaths_to_the_pool(iterator)
        except BaseException as error:
            _kill([child for child in multiprocessing.active_children() if child not in before])
            if isinstance(error, OSError):
                raise UserError(
                    f"the loader processes cannot be started ({error.strerror or error}); lower --num_workers, or do"
                    " without them: --num_workers 0."
                ) from error
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
                raise UserError(_DIED.format("at its start")) from error
            raise
        # Whatever ends this process: Python would ask them to end, which they ignore, and wait for them.
        self._end = atexit.register(weakref.finalize(self, _kill, iterator._workers))
        return iterator

    def _wait(self, call: Callable[[], Any]) -> Any:
        """`call()`, which asks the DataLoader, over and over until it has an answer; what keeps it from one is said."""
        global _waiting
        quiet = 0.0
        while True:
            _waiting = self
            try:
                if sentence := self.death():
                    raise UserError(sentence)
                return call()
            except (RuntimeError, OSError, EOFError) as error:
                deadline = time.monotonic() + (0 if isinstance(error, RuntimeError) else _LEAVE)
                while (sentence := self.death()) is None and time.monotonic() < deadline:
                    time.sleep(0.05)  # its connections close a moment before it counts as dead
                if sentence:
                    raise UserError(sentence) from error
                if _TOO_MANY.search(str(error)) or isinstance(error, OSError) and error.errno in _UNREACHABLE:
                    raise UserError(_not_handed_over(error)) from error
                if not str(error).startswith("DataLoader timed out"):
                    raise
            finally:
                _waiting = None
            quiet += _POLL
            if quiet >= _QUIET:
                quiet = 0.0
                log.warning(
                    "no batch has come from the loader processes for %.0f minutes, and they are alive: does the storage"
                    " hang? Waiting on.",
                    _QUIET / 60,
                )


_waiting: WorkerPool | None = None  # the pool that the main thread waits for


class _Failure(NamedTuple):
    """Instead of a batch: why there is none."""

    sentence: str


class _InWorker(Dataset):
    """The same batches in shared memory. It is filled here, where it can fail with a sentence: the thread that torch
    leaves it to would print an error, and the batch would never arrive."""

    def __init__(self, batches: Dataset):
        self._batches = batches

    def __getitem__(self, request) -> Any:
        try:
            batch = self._batches[request]
        except UserError as error:
            return _Failure(str(error))
        except MemoryError:
            return _Failure("a loader process ran out of memory; lower --num_workers or --per_device_batch_size.")
        tensors = [value for value in batch.values() if isinstance(value, torch.Tensor)] if type(batch) is dict else []
        try:
            needed = sum(tensor.nbytes for tensor in tensors)
            if needed > _room():  # memory that is not there is a bus error where it is first written to
                return _full(needed, "no space left")
            for tensor in tensors:
                tensor.share_memory_()
        except (RuntimeError, OSError) as error:
            return _full(needed, first_line(error).rstrip("."))
        return batch


def _room() -> float:
    """Bytes that /dev/shm has left; infinity where it cannot be asked."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return math.inf
    return status.f_bavail * status.f_frsize


def _full(needed: int, reason: str) -> _Failure:
    return _Failure(
        "/dev/shm, through which loader processes hand over batches, has no room for one of"
        f" {needed / 1e6:.1f} MB"
        f" ({reason}); give the container more (docker run --shm-size=8g), lower --num_workers, or do without such"
        " processes: --num_workers 0."
    )


class _Requests:
    """Hands the current epoch's requests to a `DataLoader` that outlives the epoch."""

    def __init__(self):
        self.current: Iterator = iter(())

    def __iter__(self):
        return self.current


def _unchanged(batch):
    return batch


def _kill(workers: list) -> None:
    for worker in workers:
        if worker.is_alive():
            worker.kill()


def _leave_deaths_to_the_pool(iterator) -> None:
    """Has a worker's death noticed where the pool waits for it, and at once."""
    if iterator._worker_pids_set:  # for torch's handler, which another DataLoader may have set before
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        return
    before = signal.getsignal(signal.SIGCHLD)
    if getattr(before, "of_pools", False):
        return

    def note(number, frame):
        if _waiting is not None and (sentence := _waiting.death()):
            raise UserError(sentence)  # a read of a message that was cut short would never end
        if callable(before):
            before(number, frame)

    note.of_pools = True  # type: ignore[attr-defined]
    signal.signal(signal.SIGCHLD, note)


def _start_worker(worker: int):
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer wants to finish its step and save.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    multiprocessing.queues.Queue._on_queue_feeder_error = _hand_over_the_reason  # type: ignore[attr-defined]


def _hand_over_the_reason(queue, error, sent):
    # The thread that hands a batch over would print its error and go on without the batch, which the trainer waits for.
    if not isinstance(sent, tuple) or isinstance(sent[1], _Failure):  # not even that
        os._exit(1)
    queue.put((sent[0], _Failure(_not_handed_over(error))))


def _not_handed_over(error: BaseException) -> str:
    if _TOO_MANY.search(str(error)):
        return (
            "the loader processes need more open files than this session may have; raise the limit (ulimit -n 65536),"
            " or lower --num_workers."
        )
    return (
        "a loader process cannot hand over its batch through a socket in"
        f" {tempfile.tempdir or 'the temporary folder'} ({first_line(error).rstrip('.')}); set TMPDIR to a folder that"
        " exists and has a short name, or do without such processes: --num_workers 0."
    )
