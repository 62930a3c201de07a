"""`plots/first_batch.png`: the first batch of a run as the network sees it, so that a wrong pipeline is seen at once.

Pixels are mapped back by ImageNet's mean and standard deviation whatever the image processor says: what was normalised
otherwise looks otherwise. Nothing is drawn at random here, and the batch is the one that the first step trains on.
"""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..drawn import pillow_font, png_info
from ..errors import UserError, printable
from ..files import atomic_write
from ..image_processing_efficientnet_nv import IMAGENET_MEAN, IMAGENET_STD, EfficientNetNVImageProcessor
from ..multi_label import is_multi_label
from ..run_folder import RunFolder


if TYPE_CHECKING:
    from .run import Run

FILE = "first_batch.png"
_MOST, _COLUMNS, _CELL, _GAP, _LINE = 32, 8, 112, 8, 13  # pictures; the rest in pixels
_CHART = (248, 96)
# Black and white are -2.1 and 2.6 by ImageNet's figures. Some beyond ±3 may be: photographs of a band that are all but
# dark have a small deviation and so a far white.
_FAR, _MANY_FAR, _HIGHEST = 3.0, 0.05, 8.0
_ONE_COLOUR = 0.02  # a channel's range, all in all; what two bytes differ by is 0.017
_COMMON = ((IMAGENET_MEAN, IMAGENET_STD), ([0.5] * 3, [0.5] * 3))


def show_first_batch(run: "Run", batch: dict) -> None:
    """Draws a device batch and says where, and says so if its values are far from those that networks are trained on.
    On the first process; no run ends because of its picture."""
    run.first_batch_shown = True
    if not run.accelerator.is_main_process:
        return
    folder = RunFolder(run.recipe.output_dir)
    pixels, labels = batch["pixel_values"].detach().float().cpu(), batch["labels"][:_MOST].cpu()
    path = folder.plots / FILE
    try:
        run.checkpoints.owner.adds(folder.plots.name)
        draw_batch(pixels, label_texts(labels, run.loaders.class_names, is_multi_label(run.bare_model.config)), path)
    except UserError as error:
        run.report.line(f"         no picture of the first batch: {error}")
        return
    run.report.line(f"batch    the first one, as the network sees it: {path}")
    run.report.picture(path, run.progress.total_updates)
    if fault := odd_values(pixels, run.processor):
        files = "image_mean, image_std and rescale_factor in preprocessor_config.json"
        run.report.line(f"         WARNING: {fault}; look at the picture, and at {files}")


def odd_values(pixels: torch.Tensor, processor: EfficientNetNVImageProcessor) -> str:
    """Says why the values of a batch (N, 3, H, W) are no normalised pixels; empty where nothing is wrong with them.

    Whether the mean is near 0 and the deviation near 1 says little: dark photographs have a mean of -1.6. Far values
    are wrong, and pictures that hardly differ. Values on both sides of 0 are right. Those on one side, or near 0, may
    be of dark, bright or grey pictures, or not normalised: there it counts what the processor makes of black and white.
    """
    low, high, far = pixels.min().item(), pixels.max().item(), (pixels.abs() > _FAR).float().mean().item()
    mean, deviation = pixels.mean().item(), pixels.std().item()
    fault = f"its values lie between {low:.3g} and {high:.3g}, {mean:.3g} ± {deviation:.3g}, where 0 ± 1 is expected"
    if not (far <= _MANY_FAR and max(-low, high) < _HIGHEST):  # not a number is neither
        return fault
    drawn = [channel[channel != 0] for channel in pixels.transpose(0, 1)]  # without what random erasing made 0
    if all(not values.numel() or (values.max() - values.min()).item() < _ONE_COLOUR for values in drawn):
        return f"{fault}, and hardly differ"
    if low < -0.5 and high > 0.5:
        return ""
    black, white = _ends(processor)
    for usual in _COMMON:
        ends = _ends(EfficientNetNVImageProcessor(image_mean=usual[0], image_std=usual[1]))
        if np.allclose((black, white), ends, atol=0.1):
            return ""
    return (
        f"{fault}; the image processor makes {black.mean():.3g} of black and {white.mean():.3g} of white, which neither"
        " ImageNet's mean and deviation do nor 0.5 and 0.5"
    )


def _ends(processor: EfficientNetNVImageProcessor) -> tuple[np.ndarray, np.ndarray]:
    """What black and white become, of every channel."""
    whole = 255 * (processor.rescale_factor if processor.do_rescale else 1)
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0] * 3, [1.0] * 3)
    return -np.array(mean) / std, (whole - np.array(mean)) / std


def label_texts(labels: torch.Tensor, class_names: list[str], several: bool = False) -> list[str]:
    """What stands below each picture: its class, `cat 0.7 dog 0.3` where two were mixed, or all of several labels.

    Args:
        labels: class indices (N,), or shares (N, classes).
    """
    if labels.dim() == 1:
        return [class_names[number] for number in labels.tolist()]
    texts = []
    for row in labels:
        present = (row >= 0.005).nonzero().flatten()
        shares, order = row[present].sort(descending=True, stable=True)
        whole = bool((shares > 0.995).all())
        pairs = zip(present[order].tolist(), shares.tolist())
        words = [class_names[number] + ("" if whole else f" {share:.2g}") for number, share in pairs]
        texts.append((", " if several else " ").join(words) or "no label")
    return texts


def draw_batch(pixels: torch.Tensor, labels: list[str], path: Path) -> None:
    """Writes up to 32 pictures of a batch with their labels, and the distribution of every channel of the whole batch.

    Args:
        pixels: float32 (N, 3, H, W), on the CPU.

    Raises:
        UserError: the file cannot be written.
    """
    shown = pixels[:_MOST]
    mean, std = (torch.tensor(figures).view(1, 3, 1, 1) for figures in (IMAGENET_MEAN, IMAGENET_STD))
    # Not a number is black: such values would be anything as bytes.
    images = (((shown * std + mean) * 255).nan_to_num(0, 255, 0).clamp(0, 255)).round().byte().permute(0, 2, 3, 1)
    columns = min(_COLUMNS, max(len(shown), 7))
    width = columns * (_CELL + _GAP) + _GAP
    cell_height, top = _CELL + 2 * _LINE + _GAP, 2 * _GAP + _LINE
    height = top + math.ceil(len(shown) / columns) * cell_height + _CHART[1] + 3 * _LINE + _GAP
    sheet = Image.new("RGB", (width, height), "white")
    draw, letters = ImageDraw.Draw(sheet), pillow_font(10)
    title = f"{len(shown)} of {len(pixels)} pictures of the first batch, {shown.shape[-1]} x {shown.shape[-2]} pixels"
    draw.text((_GAP, _GAP), title, "black", letters)
    for number, (image, label) in enumerate(zip(images.numpy(), labels)):
        x, y = _GAP + number % columns * (_CELL + _GAP), top + number // columns * cell_height
        picture = Image.fromarray(image)
        scale = _CELL / max(picture.size)
        size = tuple(max(round(side * scale), 1) for side in picture.size)
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX
        sheet.paste(picture.resize(size, method), (x, y))  # type: ignore[arg-type]
        for line, text in enumerate(_lines(printable(label), letters)):
            draw.text((x, y + _CELL + line * _LINE), text, "black", letters)
    for channel, color in enumerate(("#c0392b", "#27ae60", "#2471a3")):
        values = pixels[:, channel].flatten()
        place = (_GAP + channel * (_CHART[0] + 4 * _GAP), height - _CHART[1] - 2 * _LINE - _GAP)
        _draw_channel(draw, letters, values, place, "RGB"[channel], color)
    with atomic_write(path, "wb") as file:
        content = io.BytesIO()
        sheet.save(content, "png", pnginfo=png_info())
        file.write(content.getvalue())


def _draw_channel(draw, letters, values: torch.Tensor, place: tuple[int, int], name: str, color: str) -> None:
    """A histogram from -4 to 4 with its figures; what lies outside is counted in the words."""
    (x, y), (width, height) = place, _CHART
    counts = torch.histc(values, bins=width // 2, min=-4, max=4).numpy()
    bars = np.round(counts / max(counts.max(), 1) * (height - 1)).astype(int)
    for number, bar in enumerate(bars.tolist()):
        if bar:
            draw.rectangle((x + 2 * number, y + height - bar, x + 2 * number + 1, y + height), color)
    draw.line((x, y + height, x + width, y + height), "black")
    for tick in (-4, -2, 0, 2, 4):
        at = x + (tick + 4) * width // 8
        draw.line((at, y + height, at, y + height + 3), "black")
        draw.text((at, y + height + 3), str(tick), "black", letters, anchor="ma")
    words = f"{name}: {values.mean():.2f} ± {values.std():.2f}, 0 ± 1 expected"
    if outside := (values.abs() > 4).float().mean().item():
        words += f"; {outside:.0%} not shown"
    draw.text((x, y - _LINE - 2), words, "black", letters)


def _lines(text: str, letters) -> list[str]:
    """At most two lines that fit below a picture."""
    lines = []
    for _ in range(2):
        fits = next((n for n in range(len(text), 0, -1) if letters.getlength(text[:n]) <= _CELL + _GAP - 2), 0)
        if fits < len(text) and (space := text.rfind(" ", 0, fits + 1)) > 0:
            fits = space
        lines.append(text[:fits].strip())
        text = text[fits:].strip()
    if text and lines[1]:
        lines[1] = lines[1][:-1] + "…"
    return [line for line in lines if line]
