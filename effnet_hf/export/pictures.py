"""The pictures an export is checked on: a validation folder's, or generated ones that look like photographs."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ..data import DataSource, Split
from ..data.pictures import BadPicture, Picture
from ..data.source import map_labels
from ..errors import UserError


class CheckPictures:
    """Upright RGB pictures, opened one at a time.

    Attributes:
        description: for a sentence, e.g. "64 pictures of imagenette/val".
        labels: class indices, or None where they are not known.
    """

    def __init__(self, description: str, labels: np.ndarray | None):
        self.description, self.labels = description, labels

    def __len__(self) -> int:
        raise NotImplementedError

    def open(self, index: int) -> Image.Image:
        raise NotImplementedError

    def batches(self, sizes: Sequence[int]) -> Iterator[list[Image.Image]]:
        """All pictures in order, in batches of these sizes; the last size repeats."""
        start, sizes = 0, list(sizes)
        while start < len(self):
            size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
            yield [self.open(i) for i in range(start, min(start + size, len(self)))]
            start += size


class FolderPictures(CheckPictures):
    """Of `DIR/val/<class>/…`, or of the `val_fraction` that training held out of `DIR/<class>/…`.

    Every n-th, so that `count` of them cover all classes; all with `count=None`.

    `labels` is None when the folders are other classes than the model's.

    Raises:
        UserError: no such folder.
    """

    def __init__(self, data_dir: str, class_names: list[str], count: int | None = None, val_fraction: float = 0.0):
        source = DataSource.from_folder(data_dir, val_fraction, train=False)
        split = _thinned(source.val, count)
        try:
            labels = map_labels(source.class_names, class_names, data_dir, by_position=True)[split.labels]
        except UserError:
            labels = None
        self._split = split
        super().__init__(f"{len(split):,} pictures of {Path(data_dir).resolve().name}", labels)

    @classmethod
    def of(cls, split: Split, count: int | None = None) -> "FolderPictures":
        """Of a split that is open already, labels unknown."""
        found = cls.__new__(cls)
        found._split = _thinned(split, count)
        CheckPictures.__init__(found, f"{len(found._split):,} pictures", None)
        return found

    def __len__(self) -> int:
        return len(self._split)

    def open(self, index: int) -> Image.Image:
        try:
            return Picture(self._split.read(index)).rgb()
        except BadPicture as error:
            raise UserError(f"{self._split.name(index)} {error}; take it out of the folder.") from None


def _thinned(split: Split, count: int | None) -> Split:
    if count is None or count >= len(split):
        return split
    return split.subset(np.linspace(0, len(split) - 1, count).round().astype(int))


class GeneratedPictures(CheckPictures):
    """Photograph-like noise: power falling with the square of the frequency, as in nature, plus a few flat shapes.

    Landscape and portrait, the short side `side` pixels. Every picture is another; the same on every machine.
    """

    def __init__(self, count: int, side: int):
        super().__init__(f"{count} generated pictures", None)
        self._count, self._side = count, side

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
