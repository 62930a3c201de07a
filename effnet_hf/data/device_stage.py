"""On the device: uint8 images are rescaled, normalised, partly erased and mixed; or batches are made there, for
benchmarks.

Under CUDA this happens one batch ahead, on a side stream.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch

from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .listing import UNKNOWN, rows
from .sampler import BatchRequest, mix


IMAGENET_SIZES = (1_281_167, 50_000)
_STREAM = 0x6D69787570  # keeps the mixer's draws apart from those of the images …
_ERASER = 0x6572617365  # … and these apart from both
_ERASED_SHARE, _ERASED_RATIO, _TRIES = (0.02, 0.33), (0.3, 3.3), 10  # torchvision's


class DeviceStage:
    """Turns host batches into device batches.

    A host batch is `{"pixel_values": uint8 (N, H, W, 3), "labels": int64 (N,), "index": int64 (N,), "request"}`; a
    device batch has float32 (N, 3, H, W) pixels, labels int64 (N,), or float32 (N, classes) when mixed or when an image
    has several, and no request.

    Args:
        processor: says whether and how to rescale and normalise.
        mixer: mixup or cutmix, or None.
        label_sets: uint8 (sets, classes) where an image has several labels; `labels` are then its rows.
        eraser: random erasing, or None; it comes before the mixer.
    """

    def __init__(
        self,
        device: torch.device | str,
        processor: EfficientNetNVImageProcessor,
        channels_last: bool = True,
        mixer: "BatchMixer | None" = None,
        label_sets: np.ndarray | None = None,
        eraser: "RandomEraser | None" = None,
    ):
        self.device = torch.device(device)
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.mixer, self.eraser = mixer, eraser
        self._label_sets = None if label_sets is None else torch.from_numpy(label_sets).to(self.device)
        self._factor = processor.rescale_factor if processor.do_rescale else None
        self._normalises = processor.do_normalize
        self._mean = torch.tensor(processor.image_mean, dtype=torch.float32, device=self.device)
        self._std = torch.tensor(processor.image_std, dtype=torch.float32, device=self.device)

    def __call__(self, batches: Iterator[dict]) -> Iterator[dict]:
        if self.device.type != "cuda":
            yield from map(self.stage, batches)
            return
        staged = self._stage_beside(batches)
        while staged is not None:
            following = self._stage_beside(batches)
            batch, ready = staged
            current = torch.cuda.current_stream(self.device)
            current.wait_event(ready)
            for tensor in batch.values():
                if tensor.is_cuda:
                    tensor.record_stream(current)
            yield batch
            staged = following

    def stage(self, batch: dict) -> dict:
        """One batch, on the current stream."""
        pixels = self._normalise(batch["pixel_values"].to(self.device, non_blocking=True))
        labels = batch["labels"].to(self.device, non_blocking=True)
        if self._label_sets is not None:
            labels = self._label_sets[labels].float()
        if self.eraser is not None:
            self.eraser(pixels, batch["request"])
        if self.mixer is not None:
            pixels, labels = self.mixer(pixels, labels, batch["request"])
        return {"pixel_values": pixels, "labels": labels, "index": batch["index"]}

    def _normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 (N, H, W, 3) -> float32 (N, 3, H, W).

        The operations are the image processor's, in its order and each in float32, so that their rounding agrees.
        """
        count, height, width, channels = pixels.shape
        # Whole rows against a row of repeated statistics, an image at a time where a cache is small: five times as
        # fast on a CPU as broadcasting three numbers over a batch.
        mean, std = self._mean.repeat(width), self._std.repeat(width)
        rows = torch.empty((count, height, width * channels), dtype=torch.float32, device=self.device)
        chunk = 1 if self.device.type == "cpu" else max(count, 1)
        for source, target in zip(pixels.view(rows.shape).split(chunk), rows.split(chunk)):
            target.copy_(source)
            if self._factor is not None:
                target.mul_(self._factor)
            if self._normalises:
                target.sub_(mean).div_(std)
        pixels = rows.view(count, height, width, channels).permute(0, 3, 1, 2)
        return pixels.contiguous(memory_format=self.memory_format)

    @cached_property
    def _side(self) -> torch.cuda.Stream:
        """One stream for all epochs: the allocator keeps a pool of memory per stream and never moves it to another.

        Iterations that overlap, or that were left early, are in order on it, and each of their batches has an event of
        its own.
        """
        return torch.cuda.Stream(self.device)

    def _stage_beside(self, batches):
        with torch.cuda.stream(self._side):
            batch = next(batches, None)
            return None if batch is None else (self.stage(batch), self._side.record_event())


class RandomEraser:
    """torchvision's `RandomErasing`, image by image: a rectangle of 2 to 33 % of its area becomes 0, which is the mean
    of normalised images.

    Where is a function of (seed, epoch, slot), as mixup is: an image that an epoch has twice loses different parts.

    Args:
        probability: of an image to lose a part.
    """

    def __init__(self, seed: int, probability: float):
        self.seed = seed
        self.probability = probability

    def __call__(self, pixels: torch.Tensor, request: BatchRequest) -> None:
        """Changes (N, 3, H, W) float in place."""
        rng = np.random.Generator(np.random.PCG64(mix(self.seed, request.epoch, request.slot, _ERASER)))
        height, width = pixels.shape[-2:]
        for number in np.flatnonzero(rng.random(len(pixels)) < self.probability).tolist():
            for _ in range(_TRIES):
                area = height * width * rng.uniform(*_ERASED_SHARE)
                ratio = np.exp(rng.uniform(*np.log(_ERASED_RATIO)))
                h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
                if h < height and w < width:
                    top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
                    pixels[number, :, top : top + h, left : left + w] = 0
                    break


class BatchMixer:
    """Mixup and cutmix after normalisation: a batch is mixed with a permutation of itself, and labels become soft.

    One lambda ~ Beta(alpha, alpha), not folded to >= 0.5, and one permutation per micro-batch and rank, as in NVIDIA's
    recipe. Both are a function of (seed, epoch, slot): resumed and re-sharded runs mix the same images.

    Args:
        mixup, cutmix: alpha of the Beta distribution, 0 is off; a coin chooses when both are on.
    """

    def __init__(self, num_classes: int, seed: int, mixup: float = 0.0, cutmix: float = 0.0):
        self.num_classes = num_classes
        self.seed = seed
        self.mixup = mixup
        self.cutmix = cutmix

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, request: BatchRequest):
        """(N, 3, H, W) float and (N,) int64, or (N, classes) float -> mixed pixels, (N, classes) float32 labels."""
        rng = np.random.Generator(np.random.PCG64(mix(self.seed, request.epoch, request.slot, _STREAM)))
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if cut else self.mixup
        lam = float(rng.beta(alpha, alpha))
        order = torch.from_numpy(rng.permutation(len(labels))).to(pixels.device, non_blocking=True)
        if cut:
            top, bottom, left, right = draw_box(rng, pixels.shape[-2], pixels.shape[-1], lam)
            lam = 1 - (bottom - top) * (right - left) / (pixels.shape[-2] * pixels.shape[-1])
            pixels = pixels.clone(memory_format=torch.preserve_format)
            pixels[:, :, top:bottom, left:right] = pixels[order, :, top:bottom, left:right]
        else:
            pixels = pixels * lam + pixels[order] * (1 - lam)
        if not labels.is_floating_point():
            labels = torch.nn.functional.one_hot(labels, self.num_classes).to(torch.float32)
        return pixels, labels * lam + labels[order] * (1 - lam)


def draw_box(rng: np.random.Generator, height: int, width: int, lam: float) -> tuple[int, int, int, int]:
    """Top, bottom, left and right of a rectangle of area 1 - `lam` around a random centre, clipped to the image.

    This is timm's `rand_bbox`, which can only draw from numpy's process-wide generator.
    """
    ratio = (1 - lam) ** 0.5
    cut_height, cut_width = int(height * ratio), int(width * ratio)
    y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
    top, bottom = np.clip([y - cut_height // 2, y + (cut_height + 1) // 2], 0, height)
    left, right = np.clip([x - cut_width // 2, x + (cut_width + 1) // 2], 0, width)
    return int(top), int(bottom), int(left), int(right)


class SyntheticImages:
    """So many images that nobody looks at."""

    def __init__(self, count: int):
        self._count = count

    def __len__(self) -> int:
        return self._count

    def listing(self, split: str) -> pa.Table:
        """Their part of a `DataListing`."""
        return rows(split, ["synthetic images"], np.array([UNKNOWN]), np.array([self._count]))


class SyntheticBatches:
    """One batch of N(0, 1) pixels and random labels, made once and handed out again and again.

    It stands in for a backend together with its device stage: `batches` yields device batches.
    """

    num_workers = 0

    def __init__(
        self,
        device: torch.device | str,
        processor: EfficientNetNVImageProcessor,
        num_classes: int,
        seed: int,
        channels_last: bool = True,
        mixer: BatchMixer | None = None,
        eraser: RandomEraser | None = None,
    ):
        self._device = torch.device(device)
        self._shape = (3, processor.crop_size["height"], processor.crop_size["width"])
        self._num_classes = num_classes
        self._seed = seed
        self._memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self._mixer, self._eraser = mixer, eraser
        self._made: tuple[torch.Tensor, torch.Tensor] | None = None

    def batches(self, requests: Iterator[BatchRequest]) -> Iterator[dict]:
        for request in requests:
            count = len(request.indices)
            if self._made is None or len(self._made[0]) < count:
                self._made = self._make(request)
            pixels, labels = self._made
            yield {
                "pixel_values": pixels[:count],
                "labels": labels[:count],
                "index": torch.from_numpy(request.indices),
            }

    def close(self) -> None:
        self._made = None

    def _make(self, request: BatchRequest) -> tuple[torch.Tensor, torch.Tensor]:
        count, generator = len(request.indices), torch.Generator().manual_seed(self._seed)
        pixels = torch.randn((count, *self._shape), generator=generator)
        pixels = pixels.to(self._device, memory_format=self._memory_format)
        labels = torch.randint(self._num_classes, (count,), generator=generator).to(self._device)
        if self._eraser is not None:
            self._eraser(pixels, request)
        return self._mixer(pixels, labels, request) if self._mixer else (pixels, labels)
