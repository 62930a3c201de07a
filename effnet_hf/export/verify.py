"""Proof before anything is put in place: the file is valid, its shapes are what was promised, its answers PyTorch's."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from PIL import Image, ImageOps

from ..errors import UserError
from .onnx import shape_of
from .options import ExportOptions
from .pictures import CheckPictures
from .runners import Runner


BATCH_SIZES = (1, 8)
# Largest allowed difference of a logit, for logits up to 10; it grows with them. float16 has 11 bits, bfloat16 8.
TOLERANCE = {"fp32": 1e-4, "fp16": 5e-2, "bf16": 5e-1}
# Least signal-to-noise ratio of the logits against fake quantization, decibels. Measured on B0: 28 and 18; a graph with
# a mistake in it has about 0.
LEAST_SNR = {"tensorrt": 12.0, "ort-cpu": 5.0}
# The graph's own resizing differs from Pillow's by one in some thousands of bytes: of a probability.
PREPROCESSING_TOLERANCE = 2e-2

Feed = Callable[[list[Image.Image]], np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """Outputs of two runtimes on the same pictures.

    Attributes:
        difference: largest absolute difference of any output.
        agreement: share of pictures with the same best class, percent.
        certain_agreement: the same among pictures whose two best outputs lie further apart than twice `difference`
            in the reference: where they do not, rounding may decide.
        snr: signal to noise, decibels: power of the reference's outputs over power of the differences.
    """

    difference: float
    agreement: float
    certain_agreement: float
    snr: float
    scale: float


def compare(reference: np.ndarray, outputs: np.ndarray) -> Comparison:
    """Both (pictures, classes)."""
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
    """Percent of pictures whose best class is the label."""
    return 100 * float((outputs.argmax(1) == labels).mean())


def run_all(
    runners: Mapping[str, tuple[Runner, Feed]], pictures: CheckPictures, batch_sizes: Sequence[int] = BATCH_SIZES
) -> dict[str, np.ndarray]:
    """Every runner's outputs (pictures, classes) on all pictures, in batches of 1, 8, 8, …"""
    outputs: dict[str, list[np.ndarray]] = {name: [] for name in runners}
    for batch in pictures.batches(batch_sizes):
        fed: dict[int, np.ndarray] = {}
        for name, (run, feed) in runners.items():
            if id(feed) not in fed:
                fed[id(feed)] = feed(batch)
            outputs[name].append(np.array(run(fed[id(feed)])))
    return {name: np.concatenate(parts) for name, parts in outputs.items()}


def check_structure(path: Path, options: ExportOptions, num_channels: int, image_size: int, num_labels: int) -> None:
    """The ONNX checker, strict shape inference, and inputs and outputs as promised.

    Raises:
        UserError: the file is not what was asked for; nothing a user did wrong, but nothing to rely on either.
    """
    try:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"the exported graph is not valid ONNX: {str(error).strip().splitlines()[0]}") from error
    side = ["height", "width"] if options.dynamic_image_size or options.with_preprocessing else [image_size] * 2
    wanted_in = ["batch", *side, 3] if options.with_preprocessing else ["batch", num_channels, *side]
    for value, name, shape in (
        (model.graph.input[0], options.input_name, wanted_in),
        (model.graph.output[0], options.output_name, ["batch", num_labels]),
    ):
        if value.name != name or shape_of(value) != shape:
            raise UserError(f"the exported graph has {value.name} {shape_of(value)} instead of {name} {shape}.")
    if len(model.graph.input) != 1 or len(model.graph.output) != 1:
        raise UserError("the exported graph has more than one input or output.")


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


def mirrored_pairs(pictures: CheckPictures) -> CheckPictures:
    """For graphs that take pictures of any size, which only make a batch with their like: each beside its mirror image,
    the first one alone."""
    return _MirroredPairs(pictures)


class _MirroredPairs(CheckPictures):
    def __init__(self, pictures: CheckPictures):
        super().__init__(pictures.description, None)
        self._pictures = pictures

    def __len__(self) -> int:
        return 2 * len(self._pictures) - 1

    def open(self, index: int) -> Image.Image:
        picture = self._pictures.open((index + 1) // 2)
        return picture if index == 0 or index % 2 else ImageOps.mirror(picture)
