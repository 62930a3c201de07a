"""Images in, class names and probabilities out, through transformers' image-classification pipeline."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import pipeline

from ..checkpoint import open_checkpoint
from ..configuration import EfficientNetNVConfig
from ..data import BadPicture, Picture, Reading, read_file
from ..errors import UserError
from ..flips import use_test_time_flip
from ..multi_label import is_multi_label, thresholds_of
from ..quiet import only_errors
from ..training import allow_tf32


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
        runtime: what computes: PyTorch, or what `load_for_inference` offers, `"auto"` for the fastest.
        batch_size: images in a usual call, for `runtime`; [`default_batch_size`].
        test_time_flip: answers with the mean of the probabilities of an image and its mirror image; see
            [`effnet_hf.flips.use_test_time_flip`].

    Attributes:
        network: in evaluation mode on `device`.
        processor: how its images are prepared.
        reading: how files are read.
        choice: of a runtime, see [`effnet_hf.export.fastest.Choice`]; None for PyTorch.
        config: of the network.

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
        test_time_flip: bool = False,
        runtime: str = "torch",
        batch_size: int | None = None,
    ):
        checkpoint = open_checkpoint(model)
        if not checkpoint.config.num_labels:
            raise UserError(f"--model {model} has no classes; classify needs a classifier.")
        place = find_device(device)
        if place.type == "cpu" and precision == "fp16":
            raise UserError("--precision fp16 needs a GPU; on a CPU use fp32 or bf16.")
        # Handed over ready-made: given a name, transformers 5 asks whether to run the code saved with the weights.
        # Its weights stay fp32: halved, batch norm's statistics lose digits, and those above 65,504 become infinite.
        if runtime == "torch":
            network, within = checkpoint.load(), precision in DTYPES
        else:
            from ..export import load_for_inference  # which asks this package how answers are told

            given = None if checkpoint.quantized and precision == "fp32" else precision
            usual, within = batch_size or default_batch_size(place), False
            network = load_for_inference(checkpoint, runtime, place, precision=given, batch_size=usual)
        processor = checkpoint.processor
        self.autocast = torch.autocast(place.type, dtype=DTYPES.get(precision), enabled=within)
        self.model, self.precision, self.device, self.test_time_flip = model, precision, place, test_time_flip
        self.reading = Reading.of(Reading(bit_depth, max_pixels), processor)
        self.config, self.network, self.processor = checkpoint.config, network, processor
        self.choice = getattr(network, "choice", None)
        if test_time_flip:
            use_test_time_flip(network)
        # No bound method: a copy of the network would copy this object with it.
        network.register_forward_hook(lambda network, images, output: self._require_numbers(output.logits))
        with only_errors():
            self.pipeline = pipeline("image-classification", model=network, image_processor=processor, device=place)

    def __call__(self, paths: list[Path], top_k: int | None = None, batch_size: int = 16) -> Iterator[Prediction]:
        """Predictions in the order of `paths`; an image that cannot be read gets an `error` instead.

        Args:
            top_k: at most so many classes per image; see [`told`].

        Raises:
            UserError: the network answers with NaN or infinity.
        """
        allow_tf32(False)  # fp32 is fp32, as in `answers`
        asked = self.config.num_labels if is_multi_label(self.config) else top_k or 5
        for batch in _batches(paths, batch_size, self.reading):
            pictures = [picture for _, picture, _ in batch if picture is not None]
            with self.autocast:
                found = iter(self.pipeline(pictures, top_k=asked, batch_size=batch_size) if pictures else [])
            for path, picture, error in batch:
                predictions = told(next(found), self.config, top_k) if picture is not None else []
                yield Prediction(path, predictions, error)

    def _require_numbers(self, logits: torch.Tensor) -> None:
        if not logits.isfinite().all():  # of which softmax makes NaN, or a certainty
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


def default_batch_size(device: torch.device) -> int:
    """Images at once: a CPU is fastest with few, whose maps fit its caches."""
    return 16 if device.type == "cpu" else 128


def _batches(
    paths: list[Path], size: int, reading: Reading
) -> Iterator[list[tuple[Path, Image.Image | None, str | None]]]:
    """Opened images, at most `size` at once, and fewer where they are large: they are held as they are until then."""
    batch: list[tuple[Path, Image.Image | None, str | None]] = []
    pixels = 0
    for path in paths:
        picture, error = open_picture(path, reading)
        own = picture.width * picture.height if picture is not None else 0
        if batch and (len(batch) == size or pixels + own > PIXELS_AT_ONCE):
            yield batch
            batch, pixels = [], 0
        batch.append((path, picture, error))
        pixels += own
    if batch:
        yield batch


def open_picture(path: Path, reading: Reading) -> tuple[Image.Image | None, str | None]:
    """In RGB, or why not, as the end of a sentence about it."""
    try:
        return Picture(read_file(path), reading).rgb(), None
    except BadPicture as error:
        return None, str(error)
