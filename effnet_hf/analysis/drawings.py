"""The pictures of a report, as PNG: confusion matrix, reliability, coverage, sheets of images, heat maps on images.

By matplotlib's figures without pyplot, which would keep them, and the user's own, in one place.
"""

import io
import warnings
from collections.abc import Callable, Sequence
from functools import wraps

import numpy as np
from PIL import Image, ImageDraw

from ..drawn import SOFTWARE, pillow_font, png_info
from ..errors import printable


THUMBNAIL = 160  # pixels of the longer side
ORDERED = 60  # classes of a matrix whose rows are sorted, and whose cells can be told apart
_NUMBERED = 24  # classes of a matrix with a number in every cell
_TICK = 28  # letters of a class at an axis
_BLUE, _RED, _GREY = "#2563a8", "#b3362b", "#8b939c"


def _drawing(function: Callable) -> Callable[..., bytes]:
    """A figure as the bytes of a PNG. No name is a formula, and a font need not have all letters of the world."""

    @wraps(function)
    def draw(*arguments, **options) -> bytes:
        import matplotlib

        with warnings.catch_warnings(), matplotlib.rc_context({"text.parse_math": False, "font.size": 9}):
            warnings.filterwarnings("ignore", r"Glyph .* missing from")
            warnings.filterwarnings("ignore", r"Matplotlib currently does not support")  # right-to-left letters
            figure, file = function(*arguments, **options), io.BytesIO()
            figure.savefig(file, dpi=110, format="png", metadata={"Software": SOFTWARE})
        return file.getvalue()

    return draw


def short(name: str, length: int = 22) -> str:
    """A name as there is room for it; names that are alike differ at their ends."""
    name, end = printable(name), (length - 1) // 2
    return name if len(name) <= length else f"{name[: length - 1 - end]}…{name[-end:]}"


def order_of(counts: np.ndarray) -> np.ndarray:
    """Numbers of the classes, those beside one another that are taken for one another; as they are where none is."""
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    near = shares + shares.T
    np.fill_diagonal(near, 0)
    if len(counts) < 3 or not near.any():
        return np.arange(len(counts))
    return leaves_list(linkage(squareform(near.max() - near, checks=False), "average", optimal_ordering=True))


@_drawing
def confusion(counts: np.ndarray, names: Sequence[str]):
    """A matrix (label, answer) of numbers of images; the colour is the share of the label's images."""
    from matplotlib.colors import LinearSegmentedColormap

    size = len(names)
    letters = max(len(short(name, _TICK)) for name in names)
    side = float(np.clip(0.4 * size + 0.07 * letters, 4.2, 13))
    figure, axis = _figure(side + 0.6, side)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    wrong = ~np.eye(size, dtype=bool)
    for colour, where in ((_BLUE, ~wrong), (_RED, wrong)):
        # The square root lets a confusion of a few percent be seen.
        colours = LinearSegmentedColormap.from_list("", ["white", colour])
        axis.imshow(np.where(where & (counts > 0), np.sqrt(shares), np.nan), cmap=colours, vmin=0, vmax=1)
    numbers = 8 if size <= 12 else 6
    if size <= _NUMBERED:
        for row, column in zip(*np.nonzero(counts)):
            dark = shares[row, column] > 0.3
            text = f"{counts[row, column]:,}"
            axis.text(column, row, text, ha="center", va="center", fontsize=numbers, color="w" if dark else "k")
    font = 8 if size <= 30 else 5.5
    axis.set_xticks(range(size), [short(name, _TICK) for name in names], rotation=90, fontsize=font)
    axis.set_yticks(range(size), [short(name, _TICK) for name in names], fontsize=font)
    axis.set(xlabel="answer", ylabel="label")
    axis.tick_params(length=0)
    axis.set_xticks(np.arange(size + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(size + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="#e6e9ed", linewidth=0.5)
    axis.tick_params(which="minor", length=0)
    return figure


@_drawing
def reliability(curves: Sequence[tuple[str, np.ndarray, np.ndarray, np.ndarray]]):
    """Share of right answers over what the network gave as their probability, with how many answers there are.

    Args:
        curves: (name, mean confidence, share of right answers, images) of the bins; the first is the network's own.
    """
    figure, (axis, below) = _figure(4.6, 4.6, 2, height_ratios=[4, 1], sharex=True)
    axis.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":")
    for (name, confidence, right, images), colour, mark in zip(curves, (_BLUE, _RED), ("o-", "s--")):
        filled = images > 0
        axis.plot(confidence[filled], right[filled], mark, color=colour, markersize=4, linewidth=1.4, label=name)
        edges = np.linspace(0, 1, len(images) + 1)
        below.stairs(images, edges, color=colour, fill=mark == "o-", alpha=0.5 if mark == "o-" else 1)
    axis.set(ylabel="share that is right", xlim=(0, 1), ylim=(0, 1.02))
    axis.legend(frameon=False, fontsize=8)
    axis.grid(alpha=0.25)
    below.set(xlabel="probability that the network gives its answer", ylabel="images")
    return figure


@_drawing
def coverage(share: np.ndarray, right: np.ndarray):
    """Top-1 over the share of the images that is answered, the surest first; both from 0 to 1."""
    figure, axis = _figure(4.6, 3.6)
    axis.plot(100 * share, 100 * right, color=_BLUE, linewidth=1.8)
    low = 100 * float(np.min(right, initial=1))
    axis.set(xlabel="images that are answered, the surest first, %", ylabel="right of these, %")
    axis.set(xlim=(0, 100), ylim=(max(0, low - 0.15 * max(100 - low, 2)), 100 + 0.05 * max(100 - low, 2)))
    axis.grid(alpha=0.25)
    return figure


def sheet(pictures: Sequence[tuple[Image.Image, str]], columns: int = 6) -> bytes:
    """PNG of images beside one another, the lines of its caption below each. By Pillow: matplotlib takes seconds for
    so many axes."""
    lines = max(caption.count("\n") for _, caption in pictures) + 1
    wide, high, columns = THUMBNAIL + 12, THUMBNAIL + 12 + 14 * lines, min(columns, len(pictures))
    canvas = Image.new("RGB", (wide * columns, high * -(-len(pictures) // columns)), "white")
    pen, letters = ImageDraw.Draw(canvas), pillow_font(11)
    for number, (picture, caption) in enumerate(pictures):
        left, top = number % columns * wide + 6, number // columns * high + 6
        times = max(1, THUMBNAIL // max(picture.size))
        picture = picture.resize((picture.width * times, picture.height * times), Image.Resampling.NEAREST)
        canvas.paste(picture, (left, top + THUMBNAIL - picture.height))
        pen.multiline_text((left, top + THUMBNAIL + 2), caption, "black", letters, spacing=2)
    file = io.BytesIO()
    canvas.save(file, "PNG", pnginfo=png_info())
    return file.getvalue()


def heat(picture: Image.Image, map_: np.ndarray) -> Image.Image:
    """A map (rows, columns) of numbers from 0 to 1 as colours over an image: what is 0 keeps its grey."""
    import matplotlib

    large = Image.fromarray((255 * map_).astype(np.uint8)).resize(picture.size, Image.Resampling.BICUBIC)
    strength = np.asarray(large, np.float32)[..., None] / 255
    colours = matplotlib.colormaps["turbo"](strength[..., 0])[..., :3] * 255
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32)
    share = 0.65 * np.sqrt(strength)
    return Image.fromarray((grey * (1 - share) + colours * share).clip(0, 255).astype(np.uint8))


def thumbnail(picture: Image.Image, side: int = THUMBNAIL) -> Image.Image:
    """The whole image, small; never larger than it is."""
    picture = picture.copy()
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **options):
    """A figure of so many inches and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
