"""A picture of some images of every class."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError, printable
from ..files import atomic_write
from .pictures import BadPicture, Picture, Reading
from .scan import Part, Scan


if TYPE_CHECKING:
    from matplotlib.figure import SubFigure


_CLASSES = 20  # rows
_IMAGES = 10  # in a row
_SIDE = 128  # pixels of one


def draw_samples(scan: Scan, path: str, reading: Reading) -> None:
    """Draws images of every split, spread over each class, a class to a row; of many classes some. Labels that are
    swapped in one split show beside the other's.

    Args:
        path: a file of any kind that matplotlib writes.

    Raises:
        UserError: no image can be read.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    blocks = []
    for part in scan.parts:
        filled = np.flatnonzero(part.counts)
        shown = filled[np.unique(np.linspace(0, len(filled) - 1, min(len(filled), _CLASSES)).astype(int))]
        strips = [(int(number), _strip(part, int(number), reading)) for number in shown]
        if any(strip is not None for _, strip in strips):
            blocks.append((part, strips))
    if not blocks:
        raise UserError("--save_plot: no image could be read, so there is nothing to draw.")
    heights = [0.74 * len(strips) + 0.5 for _, strips in blocks]
    figure = plt.figure(figsize=(9, sum(heights)))
    for place, height, block in zip(figure.subfigures(len(blocks), 1, squeeze=False, height_ratios=heights)[:, 0],
                                    heights, blocks):  # fmt: skip
        _draw(place, height, *block)
    try:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=110, format=Path(path).suffix[1:])
    finally:
        plt.close(figure)


def _draw(figure: "SubFigure", height: float, part: Part, strips: list[tuple[int, np.ndarray | None]]) -> None:
    """Fills a part of the page, `height` inches of it."""
    axes = figure.subplots(len(strips), 1, squeeze=False)
    for axis, (number, strip) in zip(axes[:, 0], strips):
        axis.axis("off")
        if strip is not None:
            axis.imshow(strip)
        axis.set(xlim=(0, _IMAGES * _SIDE), ylim=(_SIDE, 0))
        name = printable(part.class_names[number].split(",")[0])
        label = f"{name if len(name) <= 18 else name[:17] + '…'}\n{part.counts[number]:,}"
        axis.text(
            -12, _SIDE / 2, label, ha="right", va="center", fontsize=10, linespacing=1.4, parse_math=False
        )  # fmt: skip
    some = f"{len(strips)} of " if len(strips) < len(part.counts) else ""
    title = f"{Path(part.title).name}: {len(part.split):,} images, {some}{len(part.counts):,} classes"
    figure.suptitle(printable(title), fontsize=11, x=0.01, ha="left", parse_math=False)
    figure.subplots_adjust(left=0.17, right=0.995, top=1 - 0.42 / height, bottom=0.005, hspace=0.06)


def _strip(part: Part, label: int, reading: Reading) -> np.ndarray | None:
    """Up to `_IMAGES` of a class beside one another, uint8 (height, width, 3)."""
    own = part.split.labels == label
    if part.label_sets is not None:
        own = part.label_sets[part.split.labels, label] > 0
    readable = [number for number in np.flatnonzero(own).tolist() if number in part.sizes]
    chosen = sorted({int(i) for i in np.linspace(0, len(readable) - 1, min(len(readable), _IMAGES))})
    strip = np.full((_SIDE, _IMAGES * _SIDE, 3), 255, np.uint8)
    for place, number in enumerate(readable[i] for i in chosen):
        try:
            picture = Picture(part.split.read(number), reading).rgb()
        except BadPicture:  # it was one when it was scanned
            continue
        square = ImageOps.fit(picture, (_SIDE - 4, _SIDE - 4), Image.Resampling.LANCZOS)
        strip[2:-2, place * _SIDE + 2 : (place + 1) * _SIDE - 2] = np.asarray(square)
    return strip if readable else None
