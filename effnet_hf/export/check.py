"""Proof before anything is put in place: on which images a file is checked, and that its answers are PyTorch's."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..data import BadFile, BadFiles, BadPicture, DataSource, Picture, Split, map_labels
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .options import ExportOptions
from .runners import Runner


BATCH_SIZES = (1, 8)
# Largest allowed difference of a logit, for logits up to 10; it grows with them. float16 has 11 bits, bfloat16 8.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-1}
# Least signal-to-noise ratio of the logits against fake quantization, decibels. Measured on B0: 28 and 18; a graph with
# a mistake in it has about 0.
LEAST_SNR: dict[str | None, float] = {"tensorrt": 12.0, "ort-cpu": 5.0}
# The graph's own resizing differs from Pillow's by one in some thousands of bytes: of a probability.
PREPROCESSING_TOLERANCE = 2e-2

log = logging.getLogger(__name__)

Feed = Callable[[list[Image.Image]], np.ndarray]


class CheckImages:
    """Upright RGB images, opened one at a time."""

    @property
    def description(self) -> str:
        """For a sentence, e.g. "64 images of imagenette"."""
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray | None:
        """Class indices of what `batches` has given, or None where they are not known."""
        return None

    def __len__(self) -> int:
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        raise NotImplementedError

    def readable(self) -> Iterator[Image.Image]:
        """All images in order, without those that cannot be read."""
        return map(self.open, range(len(self)))

    def batches(self, sizes: Sequence[int]) -> Iterator[list[Image.Image]]:
        """The readable ones in batches of these sizes; the last size repeats."""
        images, sizes = self.readable(), list(sizes)
        while batch := list(islice(images, sizes[0])):
            yield batch
            sizes = sizes[1:] or sizes


class FolderImages(CheckImages):
    """Of `DIR/val/<class>/…`, or of the `val_fraction` that training held out of `DIR/<class>/…`.

    Every n-th, so that `count` of them cover all classes; all with `count=None`. One in a hundred, at least one, may be
    unreadable; it is passed over, as in validation.

    `labels` is None when the folders are other classes than the model's.

    Raises:
        UserError: no such folder; later, too many unreadable images.
    """

    _labels: np.ndarray | None

    def __init__(self, data_dir: str, class_names: list[str], count: int | None = None, val_fraction: float = 0.0):
        source = DataSource.from_folder(data_dir, val_fraction, train=False)
        assert source.val is not None  # a folder without validation images is refused
        self._take(_thinned(source.val, count), f" of {Path(data_dir).resolve().name}")
        with contextlib.suppress(UserError):  # other classes than the model's
            self._labels = map_labels(source.class_names, class_names, data_dir, by_position=True)[self._split.labels]

    @classmethod
    def of(cls, split: Split, count: int | None = None) -> "FolderImages":
        """Of a split that is open already, labels unknown."""
        found = cls.__new__(cls)
        found._take(_thinned(split, count), "")
        return found

    def _take(self, split: Split, of_what: str) -> None:
        self._split, self._of_what = split, of_what
        self._labels = None
        self._unreadable: set[int] = set()
        self._bad_files = BadFiles(None, len(split), has_flags=False)

    @property
    def description(self) -> str:
        return f"{len(self._split) - len(self._unreadable):,} images{self._of_what}"

    @property
    def labels(self) -> np.ndarray | None:
        return None if self._labels is None else np.delete(self._labels, sorted(self._unreadable))

    def __len__(self) -> int:
        return len(self._split)

    def open(self, index: int) -> Image.Image:
        """This one, or the next that can be read."""
        images = map(self._read, chain(range(index, len(self)), range(index)))
        image = next(filter(None, images), None)
        if image is None:
            raise UserError(f"none of the {len(self)} images can be read; the last: {self._bad_files.names[-1]}.")
        return image

    def readable(self) -> Iterator[Image.Image]:
        self.open(0)  # there is one
        return filter(None, map(self._read, range(len(self))))

    def _read(self, index: int) -> Image.Image | None:
        try:
            return Picture(self._split.read(index)).rgb()
        except BadPicture as error:
            self._unreadable.add(index)
            for file in self._bad_files.report([BadFile(self._split.name(index), str(error))]):
                log.warning("%s; it is passed over", file)
            return None


def _thinned(split: Split, count: int | None) -> Split:
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


class GeneratedImages(CheckImages):
    """Photograph-like noise: power falling with the square of the frequency, as in nature, plus a few flat shapes.

    Landscape and portrait, the short side `side` pixels. No two are alike; the same on every machine.
    """

    def __init__(self, count: int, side: int):
        self._count, self._side = count, side

    @property
    def description(self) -> str:
        return f"{self._count} generated images"

    def __len__(self) -> int:
        return self._count

    def open(self, index: int) -> Image.Image:
        rng = np.random.default_rng(index)
        height, width = self._side, self._side + 7 * index % (self._side // 2)
        if index % 3 == 2:
            height, width = width, height
        frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
        frequency[0, 0] = 1
        canvas = np.empty((height, width, 3))
        shared = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
        for channel in range(3):
            own = rng.standard_normal(frequency.shape) + 1j * rng.standard_normal(frequency.shape)
            noise = np.fft.irfft2((2 * shared + own) / frequency, s=(height, width))
            canvas[..., channel] = 110 + 55 * (noise - noise.mean()) / noise.std()
        for _ in range(4):
            top, left = rng.integers(0, height * 3 // 4), rng.integers(0, width * 3 // 4)
            tall, wide = rng.integers(8, self._side // 2, 2)
            canvas[top : top + tall, left : left + wide] += rng.uniform(-90, 90, 3)
        return Image.fromarray(canvas.clip(0, 255).astype(np.uint8))


class MirroredPairs(CheckImages):
    """For graphs that take images of any size, which only make a batch with their like: each beside its mirror image,
    the first one alone."""

    def __init__(self, images: CheckImages):
        self._images = images

    def readable(self) -> Iterator[Image.Image]:
        images = self._images.readable()
        yield next(images)
        for image in images:
            yield image
            yield ImageOps.mirror(image)


def size_of(processor: EfficientNetNVImageProcessor) -> tuple[int, int]:
    """(height, width) of its `pixel_values`."""
    return processor.crop_size["height"], processor.crop_size["width"]


def pixels_of(processor: EfficientNetNVImageProcessor, **overrides) -> Feed:
    """What turns images into the processor's own `pixel_values`, float32 (N, 3, crop height, crop width)."""

    def feed(images: list[Image.Image]) -> np.ndarray:
        return np.stack(processor(images, **overrides)["pixel_values"]).astype(np.float32, copy=False)

    return feed


def arrays_of(images: list[Image.Image]) -> np.ndarray:
    """Images of one size as they are, uint8 (N, height, width, 3)."""
    return np.stack([np.asarray(image) for image in images])


@dataclass(frozen=True)
class Comparison:
    """Outputs of two runtimes on the same images.

    Attributes:
        difference: largest absolute difference of any output.
        agreement: share of images with the same best class, percent.
        certain_agreement: the same among images whose two best outputs lie further apart than twice `difference`
            in the reference: where they do not, rounding may decide.
        snr: signal to noise, decibels: power of the reference's outputs over power of the differences.
        scale: largest absolute output of the reference.
    """

    difference: float
    agreement: float
    certain_agreement: float
    snr: float
    scale: float


def compare(reference: np.ndarray, outputs: np.ndarray) -> Comparison:
    """Both (images, classes)."""
    reference, outputs = reference.astype(np.float64), outputs.astype(np.float64)
    difference = np.abs(reference - outputs).max()
    same = reference.argmax(1) == outputs.argmax(1)
    ordered = np.sort(reference, axis=1)
    certain = ordered[:, -1] - ordered[:, -2] > 2 * difference if ordered.shape[1] > 1 else np.ones(len(same), bool)
    noise = np.square(reference - outputs).mean()
    centred = np.square(reference - reference.mean(0)).mean()
    return Comparison(
        difference=float(difference),
        agreement=100 * float(same.mean()),
        certain_agreement=100 * float(same[certain].mean()) if certain.any() else 100.0,
        snr=(10 * math.log10(centred / noise) if centred else 0.0) if noise else math.inf,
        scale=float(np.abs(reference).max()),
    )


def top1(outputs: np.ndarray, labels: np.ndarray) -> float:
    """Percent of images whose best class is the label."""
    return 100 * float((outputs.argmax(1) == labels).mean())


def run_all(
    runners: Mapping[str, tuple[Runner, Feed]], images: CheckImages, batch_sizes: Sequence[int] = BATCH_SIZES
) -> dict[str, np.ndarray]:
    """Every runner's outputs (images, classes) on all images, in batches of 1, 8, 8, …"""
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    for batch in images.batches(batch_sizes):
        fed: dict[Feed, np.ndarray] = {}
        for name, (run, feed) in runners.items():
            if feed not in fed:
                fed[feed] = feed(batch)
            outputs[name].append(np.array(run(fed[feed])))
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


def require_equal(comparison: Comparison, options: ExportOptions, runtime: str) -> None:
    """Raises `UserError` unless a float export computes what PyTorch computes, up to the rounding of its dtype."""
    tolerance = TOLERANCE[options.dtype] * max(1.0, comparison.scale / 10)
    if options.with_preprocessing:
        tolerance = max(tolerance, PREPROCESSING_TOLERANCE)
    if not comparison.difference <= tolerance or comparison.certain_agreement < 100:
        raise UserError(
            f"the exported file does not compute what the checkpoint does: in {runtime} it differs by "
            f"{comparison.difference:.2g} (allowed: {tolerance:.2g}), top-1 agreement {comparison.agreement:.2f} %; "
            "nothing was written."
        )
