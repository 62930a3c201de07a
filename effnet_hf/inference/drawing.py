"""A picture of what was predicted."""

from pathlib import Path

from ..data import Reading
from ..data.pictures import USUAL
from ..errors import UserError, printable
from ..files import atomic_write
from .classifier import Prediction, open_picture


PLOT_FORMATS = (".png", ".pdf", ".svg", ".webp")


def draw_predictions(
    results: list[Prediction],
    path: str,
    most: int = 12,
    reading: Reading = USUAL,
) -> None:
    """Draws up to `most` images, each beside the bars of its classes, into a file of one of `PLOT_FORMATS`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [result for result in results if result.predictions][:most]
    if not shown:
        raise UserError("--save_plot: no image could be classified, so there is nothing to draw.")
    figure, axes = plt.subplots(len(shown), 2, figsize=(7, 1.9 * len(shown)), squeeze=False, layout="constrained")
    for (left, right), result in zip(axes, shown):
        picture, _ = open_picture(result.path, reading)
        if picture is not None:  # it was there when it was classified
            picture.thumbnail((600, 600))
            left.imshow(picture)
        left.set_title(printable(result.path.name), fontsize=8, parse_math=False)
        left.axis("off")
        # Of several labels those that it has, or the one that is nearest to it.
        bars_of = [each for each in result.predictions if each.get("passed", True)] or result.predictions[:1]
        labels = [printable(prediction["label"].split(",")[0])[:28] for prediction in bars_of][::-1]
        scores = [100 * prediction["score"] for prediction in bars_of][::-1]
        bars = right.barh(range(len(labels)), scores, color="#76b900")
        right.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        right.bar_label(bars, fmt="%.1f %%", fontsize=7, padding=2)
        right.set_xlim(0, 115)
        right.set_xticks([])
        right.spines[:].set_visible(False)
    try:
        with atomic_write(path, "wb") as file:
            figure.savefig(file, dpi=110, format=Path(path).suffix[1:])
    finally:
        plt.close(figure)
