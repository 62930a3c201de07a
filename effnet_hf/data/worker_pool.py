"""Processes that read, decode and transform; whole micro-batches leave them. All that the default loader needs."""

import gc
import signal
import sys
import time
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError
from .bad_files import BadFile
from .pictures import BadPicture, Picture
from .sampler import BatchRequest, mix
from .source import Split


class PictureBatches(Dataset):
    """`self[request]` is a whole micro-batch of `prepare`d images; unreadable ones are replaced or left out.

    Args:
        split: where the files are.
        seed: of the run.
        replace_bad: put another image of the same class in the place of an unreadable one; otherwise leave it out.
    """

    def __init__(self, split: Split, seed: int, replace_bad: bool):
        self.split = split
        self.seed = seed
        self.replace_bad = replace_bad

    def prepare(self, picture: Picture, seed: int):
        """What the batch needs of an image; `BadPicture` if it turns out to be unreadable."""
        raise NotImplementedError

    def load(self, request: BatchRequest, opened: dict[int, Picture] | None = None) -> tuple[list, dict]:
        """The prepared images, and `labels`, `index` (int64 tensors), the `request` and the `bad` files met.

        An image that takes the place of an unreadable one keeps that one's `index`.
        """
        split = self.split_of(request)
        prepared, labels, kept, bad = [], [], [], []
        for index in request.indices.tolist():
            seed = mix(self.seed, request.epoch, index)
            candidate, picture, stand_ins = index, (opened or {}).get(index), None
            while candidate is not None:
                try:
                    picture = picture or Picture(split.read(candidate))
                    prepared.append(self.prepare(picture, seed))
                    labels.append(split.label(candidate))
                    kept.append(index)
                    break
                except BadPicture as error:
                    bad.append(BadFile(split.name(candidate), str(error)))
                stand_ins = stand_ins or (split.stand_ins(index, seed) if self.replace_bad else iter(()))
                candidate, picture = next(stand_ins, None), None
        numbers = {"labels": torch.tensor(labels, dtype=torch.int64), "index": torch.tensor(kept, dtype=torch.int64)}
        return prepared, {**numbers, "request": request, "bad": bad}

    def split_of(self, request: BatchRequest) -> Split:
        return self.split if request.split is None else request.split


class MicroBatches(PictureBatches):
    """Micro-batches of finished images, `pixel_values` uint8 (N, H, W, 3).

    Args:
        transform: `TrainTransform` or `EvaluationTransform`.
        decoder: decodes a micro-batch's JPEGs together (`DaliDecoder`); None decodes one by one.
    """

    def __init__(self, split: Split, transform, seed: int, replace_bad: bool, decoder=None):
        super().__init__(split, seed, replace_bad)
        self.transform = transform
        self.decoder = decoder

    def prepare(self, picture: Picture, seed: int):
        return self.transform(picture, seed)

    def __getitem__(self, request: BatchRequest) -> dict:
        images, batch = self.load(request, self._predecode(request) if self.decoder else None)
        size = self.transform.processor.crop_size
        pixels = torch.empty((len(images), size["height"], size["width"], 3), dtype=torch.uint8)
        for target, image in zip(pixels.numpy(), images):
            target[...] = image
        return {"pixel_values": pixels, **batch}

    def _predecode(self, request: BatchRequest) -> dict[int, Picture]:
        """Opens the images and has the decoder fill in the part that the transform will ask for."""
        split, opened = self.split_of(request), {}
        for index in request.indices.tolist():
            try:
                opened[index] = Picture(split.read(index))
            except BadPicture:
                continue  # `load` meets it again and says so
        plain = {index: picture for index, picture in opened.items() if picture.plain_jpeg}
        boxes = {i: self.transform.box(picture, mix(self.seed, request.epoch, i)) for i, picture in plain.items()}
        regions = self.decoder.decode([(plain[i].data, boxes[i]) for i in plain])
        for index, region in zip(plain, regions):
            plain[index].preload(boxes[index], region)
        return opened


class WorkerPool:
    """Runs `PictureBatches` in worker processes that live as long as the pool, or in this process with 0 workers."""

    def __init__(
        self, dataset: PictureBatches, num_workers: int = 0, prefetch_factor: int = 2, pin_memory: bool = False
    ):
        self.num_workers = num_workers
        self._dataset = dataset
        self._pin = pin_memory
        self._requests = _Requests()
        self._loader = None
        if num_workers:
            self._loader = DataLoader(
                dataset,
                batch_size=None,
                sampler=self._requests,
                num_workers=num_workers,
                prefetch_factor=prefetch_factor,
                persistent_workers=True,
                pin_memory=pin_memory,
                collate_fn=_unchanged,
                worker_init_fn=_leave_signals_to_the_parent,
                # Its own generator: a draw from the global one would make dropout depend on the number of workers.
                generator=torch.Generator(),
            )

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[dict]:
        if self._loader is None:
            for request in requests:
                batch = self._dataset[request]
                if self._pin:
                    batch = {k: v.pin_memory() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
                yield batch
            return
        if self._loader._iterator is None and "nvidia.dali" in sys.modules:
            # The workers are forked next. One that collects a pipeline left in a cycle waits for threads it has not.
            gc.collect()
        self._requests.current = requests
        try:
            yield from self._loader
        except (RuntimeError, OSError, EOFError) as error:
            if not self._a_worker_died():
                raise
            raise UserError(
                f"a loader process died ({str(error).splitlines()[0]}); usually memory ran out: lower --num_workers or"
                " --prefetch_factor, or give a container more shared memory (docker run --shm-size=8g)."
            ) from error

    def _a_worker_died(self) -> bool:
        workers = getattr(getattr(self._loader, "_iterator", None), "_workers", [])
        try:
            for _ in range(20):  # its connections close a moment before it counts as dead
                if any(not worker.is_alive() for worker in workers):
                    return True
                time.sleep(0.1)
        except RuntimeError:  # torch's signal handler says the same, now
            return True
        return False

    def close(self):
        """Ends the workers."""
        iterator = getattr(self._loader, "_iterator", None)
        if iterator is not None:
            iterator._shutdown_workers()  # the DataLoader has no public way to end persistent workers
        self._loader = None


class _Requests:
    """Hands the current epoch's requests to a `DataLoader` that outlives the epoch."""

    def __init__(self):
        self.current: Iterator[BatchRequest] = iter(())

    def __iter__(self):
        return self.current


def _unchanged(batch):
    return batch


def _leave_signals_to_the_parent(worker: int):
    # Ctrl-C and a scheduler's SIGTERM reach the whole process group; the trainer wants to finish its step and save.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
