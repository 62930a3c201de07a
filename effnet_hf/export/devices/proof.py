"""The way of a file for a device: written by its converter, proved in its runtime, measured beside float."""

import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ...checkpoint import Checkpoint
from ...data import Split
from ...errors import UserError
from ...image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ...modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ...multi_label import is_multi_label
from ..check import (
    LEAST_SNR,
    CheckImages,
    Feed,
    FolderImages,
    accuracies,
    accuracy,
    compare,
    deciding,
    pixels_of,
    require_equal,
    run_all,
    size_of,
)
from ..describe import Exported, Row, properties
from ..network import ExportedNetwork, save_program
from ..options import ExportOptions
from ..runners import Runner, torch_runner
from . import CALIBRATED, DEVICES
from .bench import Bench


CALIBRATION = 128  # images
PYTORCH = "the checkpoint, PyTorch"
REPEATS = 15
ONE_IMAGE = "The file takes one image at a time."
NOT_ON_A_MAC = (
    "It was not run by Core ML, which is for macOS and iOS only: the program in the saved package was computed in"
    " PyTorch, and its input, outputs and labels were looked at. Try it on a device before you rely on it."
)


class FromBytes(nn.Module):
    """A network that takes 0 to 255, rescaled and normalized as a processor does it."""

    def __init__(self, network: nn.Module, processor: EfficientNetNVImageProcessor):
        super().__init__()
        factor = processor.rescale_factor if processor.do_rescale else 1.0
        plain = [0.0] * 3, [1.0] * 3
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else plain
        self.network = network
        self.register_buffer("scale", torch.tensor([factor / one for one in std]).view(1, 3, 1, 1))
        self.register_buffer("shift", torch.tensor([-a / b for a, b in zip(mean, std)]).view(1, 3, 1, 1))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.network(image * self.scale + self.shift)


class ChannelsLast(nn.Module):
    """A network that takes (1, height, width, 3), and whose output has a name."""

    def __init__(self, network: nn.Module, output: str):
        super().__init__()
        self.network, self.output = network, output

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {self.output: self.network(pixel_values.permute(0, 3, 1, 2))}


def write_for_device(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    file: Path,
    options: ExportOptions,
    images: CheckImages,
    calibration: Split | None,
) -> Exported:
    """Writes, proves and measures a file for a device; its labels go into labels.txt beside it.

    Args:
        file: in a folder that is put in place by the caller, or removed.
        calibration: training images to take ranges of activations from; None where none are needed.

    Raises:
        UserError: the network cannot be converted, or the file computes something else.
    """
    work = file.parent / "work"
    work.mkdir()
    with Bench(options.format, work, file) as bench:
        program = work / "program.pt2"
        _write_program(checkpoint, model, program, options)
        bench.ask("start", str(program), _job(checkpoint, options))
        files = {"file": file}
        if options.int8 and options.format != "coreml":  # for the comparison, and for LiteRT's quantizer
            files = {"float": work / file.name} | files
            bench.ask("write", str(files["float"]), None)
        if options.int8 == CALIBRATED:
            assert calibration is not None
            found = FolderImages.of(calibration, CALIBRATION, images.reading)
            feed = _feed(checkpoint.processor, options)
            for batch in found.batches((1,)):
                bench.ask("observe", feed(batch))
        bench.ask("write", str(file), options.int8)
        program.unlink()
        for which, path in files.items():
            bench.ask("open", which, str(path), options.dtype)
        exported = _measure(checkpoint, model, bench, files, options, images)
    shutil.rmtree(work)
    labels = [" ".join(name.split()) for name in checkpoint.class_names]
    (file.parent / "labels.txt").write_text("\n".join(labels) + "\n", "utf-8")
    return exported


def _write_program(
    checkpoint: Checkpoint, model: EfficientNetNVForImageClassification, path: Path, options: ExportOptions
) -> None:
    network: nn.Module = ExportedNetwork(model, replace(options, dtype="fp32"))  # others are the converter's matter
    image = torch.zeros(1, model.config.num_channels, *size_of(checkpoint.processor))
    named = {}
    if options.format == "coreml":
        network = FromBytes(network, checkpoint.processor)
    elif options.format == "litert":
        network, named = ChannelsLast(network, options.output_name), {"pixel_values": image.permute(0, 2, 3, 1)}
    save_program(network.eval(), path, () if named else (image,), named)


def _job(checkpoint: Checkpoint, options: ExportOptions) -> dict:
    return {
        "properties": properties(checkpoint, options),
        "labels": distinct(checkpoint.class_names),
        "dtype": options.dtype,
        "output": options.output_name,
        "several": is_multi_label(checkpoint.config),
        "description": f"EfficientNet {checkpoint.config.variant or 'of a custom shape'}, exported by effnet_hf",
    }


def distinct(names: list[str]) -> list[str]:
    """Class names to look probabilities up by: of those that occur twice the later ones get their number."""
    found: list[str] = []
    taken = set(names)
    for number, name in enumerate(names):
        if name in found:
            name = f"{name} ({number})"
            while name in taken:
                name += "'"
            taken.add(name)
        found.append(name)
    return found


def _feed(processor: EfficientNetNVImageProcessor, options: ExportOptions) -> Feed:
    if options.format == "coreml":
        return pixels_of(processor, do_rescale=False, do_normalize=False)
    pixels = pixels_of(processor)
    if options.format == "litert":
        return lambda images: np.ascontiguousarray(pixels(images).transpose(0, 2, 3, 1))
    return pixels


def _measure(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    bench: Bench,
    files: Mapping[str, Path],
    options: ExportOptions,
    images: CheckImages,
) -> Exported:
    device = DEVICES[options.format]
    runtime = f"{device.name} {bench.ask('version')}"
    if options.format == "coreml":
        runtime = f"the saved program (coremltools {bench.ask('version')}), computed in PyTorch,"
    # Of a Core ML program what goes into its softmax is compared: probabilities hide what logits show.
    compared = ExportOptions(format="pt2") if options.format == "coreml" else options
    reference, feed = torch_runner(model, compared.probabilities), _feed(checkpoint.processor, options)
    pixels = pixels_of(checkpoint.processor)
    runners: dict[str, tuple[Runner, Feed]] = {PYTORCH: (reference, pixels)}
    runners |= {which: (_runner(bench, which), feed) for which in files}
    outputs = run_all(runners, images, (1,))
    least = deciding(model.config, compared)
    comparison = compare(outputs[PYTORCH], outputs["file"], least)
    if options.int8:
        if not comparison.snr >= LEAST_SNR[options.int8]:
            raise UserError(
                f"the INT8 file does not compute what the checkpoint does: signal to noise {comparison.snr:.1f} dB"
                f" (wanted: {LEAST_SNR[options.int8]:g}), agreement {comparison.agreement:.2f} %; nothing was written."
            )
    else:
        require_equal(comparison, options, runtime)
    rows: tuple[Row, ...] = ()
    if options.format != "coreml":
        times = _latencies(bench, files, reference, pixels([images.open(0)]), feed([images.open(0)]))
        rows = tuple(_rows(outputs, images.labels, files, times, options, least))
    return Exported(
        folder=files["file"].parent,
        file=files["file"],
        size=size_on_disk(files["file"]),
        options=options,
        runtime=runtime,
        images=images.description,
        comparison=comparison,
        top1=accuracies(outputs, ("file", PYTORCH), images.labels),
        rows=rows,
        notes=(ONE_IMAGE, *([NOT_ON_A_MAC] if options.format == "coreml" else [])),
    )


def _runner(bench: Bench, which: str) -> Runner:
    return lambda array: bench.run(which, array)[0]


def size_on_disk(file: Path) -> int:
    """Bytes of a file, of a package's folder, or of ncnn's two files."""
    if file.is_dir():
        return sum(path.stat().st_size for path in file.rglob("*") if path.is_file())
    beside = file.with_suffix(".bin") if file.suffix == ".param" else None
    return file.stat().st_size + (beside.stat().st_size if beside else 0)


def _latencies(
    bench: Bench, files: Iterable[str], reference: Runner, pixels: np.ndarray, fed: np.ndarray
) -> dict[str, float]:
    """Median milliseconds of an image, all taking turns, after one that is not counted."""
    taken: dict[str, list[float]] = {PYTORCH: [], **{which: [] for which in files}}
    for repeat in range(REPEATS + 1):
        started = time.perf_counter()
        reference(pixels)
        seconds = {PYTORCH: time.perf_counter() - started}
        seconds |= {which: bench.run(which, fed)[1] for which in files}
        for name, value in seconds.items():
            taken[name] += [1e3 * value] if repeat else []
    return {name: float(np.median(values)) for name, values in taken.items()}


def _rows(
    outputs: Mapping[str, np.ndarray],
    labels: np.ndarray | None,
    files: Mapping[str, Path],
    times: Mapping[str, float],
    options: ExportOptions,
    least: np.ndarray | None,
) -> Iterable[Row]:
    name = DEVICES[options.format].name
    names = {PYTORCH: PYTORCH, "float": f"float, {name}"}
    names["file"] = f"int8 ({options.int8}), {name}" if options.int8 else f"{options.dtype}, {name}"
    for which, found in outputs.items():
        yield Row(
            name=names[which],
            top1=accuracy(found, labels),
            agreement=compare(outputs[PYTORCH], found, least).agreement,
            megabytes=size_on_disk(files[which]) / 1e6 if which in files else None,
            latency=(times[which],),
            times_float=(times["float"] / times["file"],) if which == "file" and "float" in files else None,
        )
