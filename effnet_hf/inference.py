"""Images in, class names and probabilities out, through transformers' image-classification pipeline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from .checkpoint import open_checkpoint
from .configuration import EfficientNetNVConfig
from .data import BadPicture, Picture, Reading, read_file
from .data.pictures import USUAL
from .errors import UserError, printable
from .files import atomic_write
from .multi_label import is_multi_label, thresholds_of
from .quiet import only_errors


PLOT_FORMATS = (".png", ".pdf", ".svg", ".webp")
PIXELS_AT_ONCE = 100_000_000  # 300 MB of RGB
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Prediction:
    """`predictions` as the pipeline gives them, best first: `{"label", "score"}`, and where an image may have several
    labels also `"passed"`, whether it has this one, and those that it has come first; or why the image has none, as the
    end of a sentence about it."""

    path: Path
    predictions: list[dict]
    error: str | None = None


class Classifier:
    """A checkpoint behind `transformers.pipeline`.

    Args:
        model: folder or Hub id.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, …; a GPU if there is one by default.
        precision: `"fp32"`, `"fp16"` (GPU only) or `"bf16"`.
        bit_depth: of deep images that do not state theirs; the image processor's by default.
        max_pixels: of an image.

    Raises:
        UserError: no such model, one without classes, no such device, fp16 on a CPU.
    """

    def __init__(
        self,
        model: str,
        device: str | None = None,
        precision: str = "fp32",
        bit_depth: int | None = None,
        max_pixels: int = Reading.max_pixels,
    ):
        checkpoint = open_checkpoint(model)
        if not checkpoint.config.num_labels:
            raise UserError(f"--model {model} has no classes; classify needs a classifier.")
        place = find_device(device)
        if place.type == "cpu" and precision == "fp16":
            raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16.")
        # Handed over ready-made: given a name, transformers 5 asks whether to run the code saved with the weights.
        # Its weights stay fp32: halved, batch norm's statistics lose digits, and those above 65,504 become infinite.
        network, processor = checkpoint.load(), checkpoint.processor
        self.autocast = torch.autocast(place.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)
        self.model = model
        self.reading = Reading.of(Reading(bit_depth, max_pixels), processor)
        self.config = checkpoint.config
        network.register_forward_hook(self._require_numbers)
        with only_errors():
            self.pipeline = pipeline("image-classification", model=network, image_processor=processor, device=place)

    def __call__(self, paths: list[Path], top_k: int | None = None, batch_size: int = 16) -> Iterator[Prediction]:
        """Predictions in the order of `paths`; an image that cannot be read gets an `error` instead.

        Args:
            top_k: at most so many classes per image; see [`told`].

        Raises:
            UserError: the network answers with NaN or infinity.
        """
        asked = self.config.num_labels if is_multi_label(self.config) else top_k or 5
        for batch in _batches(paths, batch_size, self.reading):
            pictures = [picture for _, picture, _ in batch if picture is not None]
            with self.autocast:
                found = iter(self.pipeline(pictures, top_k=asked, batch_size=batch_size) if pictures else [])
            for path, picture, error in batch:
                predictions = told(next(found), self.config, top_k) if picture is not None else []
                yield Prediction(path, predictions, error)

    def _require_numbers(self, network, images, output) -> None:
        if not output.logits.isfinite().all():  # of which softmax makes NaN, or a certainty
            raise UserError(
                f"--model {self.model} answers with NaN or infinity: its weights or its preprocessing are damaged, or"
                " --precision fp16 is too narrow for them."
            )


def told(predictions: list[dict], config: EfficientNetNVConfig, top_k: int | None = None) -> list[dict]:
    """What a user is told of all classes' `{"label", "score"}`, best first.

    Where an image may have several labels also `"threshold"` and `"passed"`, and those that pass come first.

    Args:
        top_k: at most so many; 5 by default, all where an image may have several labels.
    """
    if not is_multi_label(config):
        return predictions[: top_k or 5]
    thresholds = {config.id2label[i]: least for i, least in enumerate(thresholds_of(config).tolist())}
    least_of = [(each, thresholds[each["label"]]) for each in predictions]
    answers = [each | {"threshold": least, "passed": each["score"] >= least} for each, least in least_of]
    return sorted(answers, key=lambda each: not each["passed"])[:top_k]


def find_device(name: str | None) -> torch.device:
    """The device that `--device` names; a GPU if there is one when it names none.

    Raises:
        UserError: there is no such device.
    """
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if name is None:
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name} is no device; known are cpu, cuda, cuda:1, ….") from None
    if device.type == "cpu":
        return device
    if found is None or found.type != device.type:
        raise UserError(f"--device {name}: this machine has no {device.type.upper()} device; use --device cpu.")
    if (device.index or 0) >= torch.accelerator.device_count():
        raise UserError(f"--device {name}: this machine has {torch.accelerator.device_count()}, counted from 0.")
    return device


def _batches(
    paths: list[Path], size: int, reading: Reading
) -> Iterator[list[tuple[Path, Image.Image | None, str | None]]]:
    """Opened images, at most `size` at once, and fewer where they are large: they are held as they are until then."""
    batch: list[tuple[Path, Image.Image | None, str | None]] = []
    pixels = 0
    for path in paths:
        picture, error = _open(path, reading)
        own = picture.width * picture.height if picture is not None else 0
        if batch and (len(batch) == size or pixels + own > PIXELS_AT_ONCE):
            yield batch
            batch, pixels = [], 0
        batch.append((path, picture, error))
        pixels += own
    if batch:
        yield batch


def _open(path: Path, reading: Reading) -> tuple[Image.Image | None, str | None]:
    try:
        return Picture(read_file(path), reading).rgb(), None
    except BadPicture as error:
        return None, str(error)


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
        picture, _ = _open(result.path, reading)
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
