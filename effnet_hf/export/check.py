"""Proof before anything is put in place: on which images a file is checked, and that its answers are PyTorch's."""

import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from PIL import Image, ImageOps

from ..configuration import EfficientNetNVConfig
from ..data import BadFile, BadFiles, BadPicture, Picture, Reading, Split, match_classes
from ..data.opening import open_data
from ..errors import UserError
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..multi_label import is_multi_label, mean_average_precision, thresholds_of
from ..recipes import Recipe
from .options import ExportOptions
from .runners import Runner


BATCH_SIZES = (1, 8)
# Largest allowed difference of a logit, for logits up to 10; it grows with them. float16 has 11 bits, bfloat16 8.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-1}
# Least signal-to-noise ratio of the logits against fake quantization, decibels. Measured on B0: 28 and 18; a graph with
# a mistake in it has about 0.
LEAST_SNR: dict[str | None, float] = {"tensorrt": 12.0, "ort-cpu": 5.0, "xnnpack": 5.0, "weights": 12.0}
# `nncf` is `openvino` of a float checkpoint, against that.
LEAST_SNR |= {"openvino": 12.0, "nncf": 5.0}
# The graph resizes rows first, as Pillow does but for images that are far taller than wide, which it takes by columns
# first since version 13: there some bytes differ by one, and a probability by this.
PREPROCESSING_TOLERANCE = 2e-2

log = logging.getLogger(__name__)

Feed = Callable[[list[Image.Image]], np.ndarray]


class CheckImages:
    """Upright RGB images, opened one at a time; files as `reading` says. A user should read `notes`."""

    reading = Reading()
    notes: Sequence[str] = ()

    @property
    def description(self) -> str:
        """For a sentence, e.g. "64 images of imagenette"."""
        raise NotImplementedError

    @property
    def labels(self) -> np.ndarray | None:
        """Class indices (N,) of what `batches` has given, or 0 and 1 (N, classes) where an image has several;
        None where they are not known."""
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
    """The images that a recipe's data options give a validation.

    Every n-th in the order of their labels, so that `count` of them cover all classes of some images; all with
    `count=None`. One in a hundred, at least one, may be
    unreadable; it is passed over, as in validation.

    `labels` is None when they are of other classes than the model's, and `notes` say why.

    Raises:
        UserError: there are none, or `classes_by_position` cannot be done; later, too many unreadable images.
    """

    _labels: np.ndarray | None
    notes: list[str]

    def __init__(
        self, data: Recipe, class_names: list[str], count: int | None = None, reading: Reading = CheckImages.reading
    ):
        self.reading = reading
        source = open_data(data, train=False)
        assert isinstance(source.val, Split)  # what has no validation images is refused; a stream is not
        name = data.labels or data.data_dir or data.dataset_name
        assert name is not None
        self._take(_thinned(source.val, count), f" of {os.path.basename(os.path.realpath(name))}")
        self.notes = [*source.notes, *reading.notes]
        sets, rows = source.label_sets, np.unique(source.val.labels)
        used = rows if sets is None else np.flatnonzero(sets[rows].any(axis=0))
        try:
            match = match_classes(source.class_names, class_names, name, data.classes_by_position, used)
        except UserError as reason:
            if data.classes_by_position:
                raise
            self.notes.append(f"accuracy is not measured: {reason}")
        else:
            self.notes += [match.note] if match.note else []
            if sets is None:
                self._labels = match.numbers[self._split.labels]
            else:
                self._labels = np.zeros((len(self._split), len(class_names)), np.uint8)
                self._labels[:, match.numbers[used]] = sets[self._split.labels][:, used]

    @classmethod
    def of(cls, split: Split, count: int | None = None, reading: Reading = CheckImages.reading) -> "FolderImages":
        """Of a split that is open already, labels unknown."""
        found = cls.__new__(cls)
        found.reading = reading
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
        return None if self._labels is None else np.delete(self._labels, sorted(self._unreadable), 0)

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
            return Picture(self._split.read(index), self.reading).rgb()
        except BadPicture as error:
            self._unreadable.add(index)
            for file in self._bad_files.report([BadFile(self._split.name(index), str(error))]):
                log.warning("%s; it is passed over", file)
            return None


def _thinned(split: Split, count: int | None) -> Split:
    if count is None or count >= len(split):
        return split
    by_label = np.argsort(split.labels, kind="stable")  # a list's may lie in any order
    return split.subset(np.sort(by_label[np.linspace(0, len(split) - 1, count).round().astype(int)]))


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

    @staticmethod
    def without_mirrors(outputs: np.ndarray) -> np.ndarray:
        """Of the outputs those of the images themselves."""
        return np.concatenate([outputs[:1], outputs[1::2]])


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


def whole_pixels_of(images: list[Image.Image]) -> np.ndarray:
    """The same as transformers.js gives them to a graph that preprocesses, float32 (N, 3, height, width), 0 to 255."""
    return arrays_of(images).transpose(0, 3, 1, 2).astype(np.float32)


@dataclass(frozen=True)
class Comparison:
    """Outputs of two runtimes on the same images.

    Attributes:
        difference: largest absolute difference of any output.
        agreement: share of images with the same best class, or the same labels where there may be several, percent.
        certain_agreement: the same among images whose two best outputs lie further apart than twice `difference`
            in the reference, or further than it from what decides on a label: where they do not, rounding may decide.
        snr: signal to noise, decibels: power of the reference's outputs over power of the differences.
        scale: largest absolute output of the reference.
        several: whether an image may have several labels.
    """

    difference: float
    agreement: float
    certain_agreement: float
    snr: float
    scale: float
    several: bool = False

    @property
    def agreed(self) -> str:
        """For a sentence."""
        kind = "agreement on all labels" if self.several else "top-1 agreement"
        return f"{kind} {self.agreement:.2f} %"


def deciding(config: EfficientNetNVConfig, options: ExportOptions) -> np.ndarray | None:
    """The least output of every class at which an image has it; None where an image has one label, the best."""
    if not is_multi_label(config):
        return None
    least = thresholds_of(config)
    with np.errstate(divide="ignore"):
        return least if options.probabilities else np.log(least) - np.log(1 - least)


def compare(reference: np.ndarray, outputs: np.ndarray, least: np.ndarray | None = None) -> Comparison:
    """Both (images, classes); `least` as [`deciding`] gives it."""
    reference, outputs = reference.astype(np.float64), outputs.astype(np.float64)
    difference = np.abs(reference - outputs).max()
    if least is not None:
        same = ((reference >= least) == (outputs >= least)).all(1)
        certain = (np.abs(reference - least) > difference).all(1)
    else:
        same = reference.argmax(1) == outputs.argmax(1)
        ordered = np.sort(reference, axis=1)
        certain = ordered[:, -1] - ordered[:, -2] > 2 * difference if ordered.shape[1] > 1 else np.ones(len(same), bool)
    noise = np.square(reference - outputs).mean()
    centred = np.square(reference - reference.mean(0)).mean()
    return Comparison(
        difference=float(difference),
        agreement=100 * float(same.mean()),
        certain_agreement=100 * float(same[certain].mean()) if certain.any() else 100.0,
        snr=(10 * math.log10(centred / noise) if centred / noise > 0 else 0.0) if noise else math.inf,
        scale=float(np.abs(reference).max()),
        several=least is not None,
    )


def accuracies(
    outputs: Mapping[str, np.ndarray], names: tuple[str, str], labels: np.ndarray | None
) -> tuple[float, float] | None:
    """[`accuracy`] of two of the outputs."""
    first, second = (accuracy(outputs[name], labels) for name in names)
    return None if first is None or second is None else (first, second)


def accuracy(outputs: np.ndarray, labels: np.ndarray | None) -> float | None:
    """Percent of images whose best class is the label, or mAP where they may have several; None without labels."""
    if labels is None:
        return None
    if labels.ndim == 2:
        return mean_average_precision(outputs, labels) if labels.any() else None
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
    if options.with_preprocessing or options.layout:
        tolerance = max(tolerance, PREPROCESSING_TOLERANCE)
    if not comparison.difference <= tolerance or comparison.certain_agreement < 100:
        raise UserError(
            f"the exported file does not compute what the checkpoint does: in {runtime} it differs by "
            f"{comparison.difference:.2g} (allowed: {tolerance:.2g}), {comparison.agreed}; "
            "nothing was written."
        )
