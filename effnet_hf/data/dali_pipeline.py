"""`dali-gpu`: nvJPEG decodes, DALI resizes, mirrors and augments on the GPU; the CPU reads files and draws numbers.

Workers send encoded files together with what was drawn for them, so that order, resume, randomness and the treatment
of bad files are those of `imagefolder`. The same graph runs on a CPU; tests and benchmarks use that.
"""

import random
from collections import deque
from collections.abc import Iterator
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..errors import UserError
from ..image_processing_efficientnet_nv import MAX_ASPECT_RATIO, EfficientNetNVImageProcessor
from .dali import decode_region, quiet_build
from .dali_augment import DaliPolicy
from .pictures import USUAL, Box, Picture, Reading
from .sampler import BatchRequest
from .transforms import RANDAUGMENT, draw_geometry
from .worker_pool import PictureBatches, WorkerPool


class Encoded(NamedTuple):
    """A file for DALI, and what to do with it. All arrays are int32."""

    data: np.ndarray  # uint8
    start: np.ndarray  # (y, x) of the part to decode
    shape: np.ndarray  # (height, width) of it
    resized: np.ndarray  # (height, width) to resize it to
    crop: np.ndarray  # (y, x) of the part to cut out of that, negative in black padding; (0, 0) in training
    flip: np.ndarray  # scalar
    draws: np.ndarray  # (steps, 3), see DaliPolicy.draw; (0, 3) without a policy


class TrainPlanner:
    """Draws for a training image what a `TrainTransform` of the same arguments would draw."""

    def __init__(
        self,
        processor: EfficientNetNVImageProcessor,
        *,
        crop_scale: float = 0.08,
        horizontal_flip: float = 0.5,
        augmentation: str = "none",
        randaugment: tuple[int, int] = RANDAUGMENT,
    ):
        self.processor = processor
        self.crop_scale = crop_scale
        self.horizontal_flip = horizontal_flip
        self.policy = None if augmentation == "none" else DaliPolicy(augmentation, processor, randaugment)

    def __call__(self, picture: Picture, seed: int):
        rng = random.Random(seed)
        box, flip = draw_geometry(rng, picture.width, picture.height, self.crop_scale, self.horizontal_flip)
        draws = np.zeros((0, 3), np.int32) if self.policy is None else self.policy.draw(rng)
        size = self.processor.crop_size
        return box, (size["height"], size["width"]), (0, 0), flip, draws


class EvaluationPlanner:
    """The sizes and the crop of the processor's `resize_and_crop`, worked out beforehand."""

    policy = None

    def __init__(self, processor: EfficientNetNVImageProcessor):
        self.processor = processor

    def __call__(self, picture: Picture, seed: int = 0):
        box, resized = Box(0, 0, picture.width, picture.height), (picture.height, picture.width)
        if self.processor.do_resize:
            edge, short = self.processor.size["shortest_edge"], min(resized)
            w, h = (min(side, MAX_ASPECT_RATIO * short) for side in (picture.width, picture.height))
            box = Box((picture.width - w) // 2, (picture.height - h) // 2, w, h)
            long = int(edge * max(w, h) / short)
            resized = (long, edge) if w <= h else (edge, long)
        size = self.processor.crop_size
        crop = tuple(_crop_start(side, size[name]) for side, name in zip(resized, ("height", "width")))
        return box, resized, crop, False, np.zeros((0, 3), np.int32)


def _crop_start(side: int, size: int) -> int:
    """Where a centre crop starts: half to even, as the processor rounds it, or before the edge that it pads."""
    return round((side - size) / 2) if side >= size else -((size - side) // 2)


class EncodedBatches(PictureBatches):
    """Micro-batches of `Encoded` files; what DALI could read differently from Pillow is decoded here, by Pillow."""

    def __init__(self, split, planner, seed: int, replace_bad: bool, reading: Reading = USUAL):
        super().__init__(split, seed, replace_bad, reading)
        self.planner = planner
        self._trust_jpegs = True

    def prepare(self, picture: Picture, seed: int) -> Encoded:
        box, resized, crop, flip, draws = self.planner(picture, seed)
        data, start = picture.data, (box.top, box.left)
        if not (picture.plain_jpeg and self._trust_jpegs):
            data, start = _as_ppm(picture.crop(box)), (0, 0)
        numbers = [np.array(x, np.int32) for x in (start, (box.height, box.width), resized, crop, flip)]
        return Encoded._make([np.frombuffer(data, np.uint8), *numbers, draws])

    def __getitem__(self, request: BatchRequest) -> dict:
        encoded, batch = self.load(request)
        return {"encoded": encoded, **batch, "request": request}  # whole: `decoded_by_pillow` may need it

    def decoded_by_pillow(self, request: BatchRequest) -> dict:
        """The same micro-batch after DALI refused a file of it: here every file is decoded, the bad ones replaced."""
        self._trust_jpegs = False
        try:
            return self[request]
        finally:
            self._trust_jpegs = True


class DaliPipeline:
    """Turns `EncodedBatches` into uint8 (N, H, W, 3) batches on `device`.

    Args:
        files: the micro-batches.
        num_workers, prefetch_factor: of the processes that read them.
        max_batch_size: images in a micro-batch.
        num_threads: DALI's own, for the part of JPEG decoding that stays on the CPU.
        queue_depth: batches that DALI prepares ahead, 1 is none.

    Raises:
        UserError: the processor resizes with a filter that DALI does not have as Pillow has it.
    """

    def __init__(
        self,
        files: EncodedBatches,
        num_workers: int,
        prefetch_factor: int,
        max_batch_size: int,
        device: torch.device,
        num_threads: int = 2,
        queue_depth: int = 2,
    ):
        resample = Image.Resampling(files.planner.processor.resample)
        if resample not in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC):
            raise UserError(
                "--loader dali-gpu resizes bilinearly or bicubically, and the preprocessor_config.json says resample"
                f" {int(resample)}, which is {resample.name.lower()}; use --loader imagefolder or dali-cpu."
            )
        self.num_workers = num_workers
        self._files = files
        self._pool = WorkerPool(files, num_workers, prefetch_factor)
        self._max_batch_size = max_batch_size
        self._device = device
        self._num_threads = num_threads
        self._queue_depth = queue_depth
        self._pipeline: Any = None
        self._source: Iterator[dict] = iter(())
        self._under_way: deque[dict] = deque()  # handed to DALI, not yet come back
        self._bad_only: list = []  # bad files of micro-batches in which nothing could be read

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[dict]:
        self._source, failures = self._pool.batches(requests), 0
        try:
            while True:
                if self._pipeline is None:
                    self._pipeline = self._build()
                try:
                    (images,) = self._pipeline.run()
                except StopIteration:
                    break
                except RuntimeError:  # a file that DALI refuses: which one, it does not say
                    failures += 1
                    if failures > 1 and not self._under_way:
                        raise
                    self._pipeline = None
                    again = [self._files.decoded_by_pillow(batch["request"]) for batch in self._under_way]
                    self._under_way.clear()
                    self._source = chain(again, self._source)
                    continue
                batch = self._under_way.popleft()
                yield {**self._without_files(batch), "pixel_values": self._to_torch(images)}
            self._pipeline.reset()
            if self._bad_only:
                nothing = torch.empty(0, dtype=torch.int64)
                yield {"labels": nothing, "index": nothing, "request": None, "bad": self._bad_only}
        except BaseException:
            self._pipeline = None  # it holds batches of an epoch that nobody wants any more
            raise
        finally:
            self._under_way.clear()
            self._bad_only = []

    def close(self):
        self._pipeline = None
        self._pool.close()

    def _feed(self):
        """DALI's source: the next micro-batch as one list per input."""
        batch = next(self._source)
        while not batch["encoded"]:
            self._bad_only += batch["bad"]
            if self._files.replace_bad:
                raise StopIteration  # in training an error: what is under way is finished, then it is said
            batch = next(self._source)
        batch["bad"], self._bad_only = self._bad_only + batch["bad"], []
        self._under_way.append(batch)
        columns = [list(column) for column in zip(*batch["encoded"])]
        return tuple(columns if self._files.planner.policy else columns[:-1])

    @staticmethod
    def _without_files(batch):
        return {key: value for key, value in batch.items() if key != "encoded"}

    def _to_torch(self, images) -> torch.Tensor:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = images.as_tensor()
        pixels = torch.empty(tuple(dense.shape()), dtype=torch.uint8, device=self._device)
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        feed_ndarray(dense, pixels, cuda_stream=stream)
        return pixels

    def _build(self):
        from nvidia.dali import fn, pipeline_def, types

        cuda = self._device.type == "cuda"
        policy, processor = self._files.planner.policy, self._files.planner.processor
        size = [processor.crop_size["height"], processor.crop_size["width"]]
        kind = types.INTERP_LINEAR if processor.resample == Image.Resampling.BILINEAR else types.INTERP_CUBIC

        @pipeline_def(
            batch_size=self._max_batch_size,
            num_threads=self._num_threads,
            device_id=(self._device.index or 0) if cuda else None,
            enable_conditionals=True,
            prefetch_queue_depth=self._queue_depth,
        )
        def graph():
            encoded, start, shape, resized, crop, flip, *draws = fn.external_source(
                source=self._feed,
                num_outputs=7 if policy else 6,
                batch=True,
                dtype=[types.UINT8, *[types.INT32] * (6 if policy else 5)],
                ndim=[1, 1, 1, 1, 1, 0, *([2] if policy else [])],
            )
            images = decode_region(encoded, start, shape, "mixed" if cuda else "cpu")
            images = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), interp_type=kind, antialias=True)
            images = fn.slice(
                images, crop, size, axis_names="HW", normalized_anchor=False, normalized_shape=False,
                out_of_bounds_policy="pad",
            )  # fmt: skip
            images = fn.flip(images, horizontal=flip)
            return policy.apply(images, draws[0]) if policy else images

        with quiet_build():
            pipeline = graph()
            pipeline.build()
        return pipeline


def _as_ppm(pixels: torch.Tensor) -> bytes:
    """The simplest format that DALI decodes: a line of text and the pixels, of uint8 (3, height, width)."""
    _, height, width = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()
