"""An INT8 export: the file of its target, then measured beside float and beside the checkpoint in PyTorch."""

import copy
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx

from ..checkpoint import Checkpoint
from ..data import Reading, Split
from ..errors import UserError
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from .check import (
    LEAST_SNR,
    CheckImages,
    Feed,
    FolderImages,
    accuracies,
    accuracy,
    compare,
    deciding,
    pixels_of,
    run_all,
    size_of,
    whole_pixels_of,
)
from .describe import Exported, Row, properties
from .graph import check_structure, draw_graph, save_openvino, write_properties
from .network import ExportedNetwork
from .options import ExportOptions, installed
from .ort_int8 import fold_weights, for_ort_cpu, take_out
from .preprocessing import preprocessing_graph, put_in_front
from .runners import Runner, onnxruntime_runner, openvino_runner, runtime_of, torch_runner


CALIBRATION = 128
LATENCY_BATCHES = (1, 8)
PYTORCH, PYTORCH_FLOAT = "checkpoint, fake-quantized, PyTorch", "checkpoint, float, PyTorch"


@dataclass
class Batches:
    """Images as `pixel_values` in batches of `size`; opened anew each time they are read, those that can be."""

    images: FolderImages
    feed: Feed
    size: int

    def __iter__(self) -> Iterator[np.ndarray]:
        return map(self.feed, self.images.batches((self.size,)))

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)


def write_int8(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    file: Path,
    options: ExportOptions,
    images: CheckImages,
    calibration: Split | None,
) -> Exported:
    """Writes and measures the file.

    Args:
        calibration: training images to take ranges from, where the target needs some of such a checkpoint
            (`INT8_TARGETS`); else None.

    Raises:
        UserError: its logits are not the checkpoint's.
    """
    size = size_of(checkpoint.processor)
    float_file = file.with_name("float.onnx")  # beside it for the comparison only
    graph = write_unproved(checkpoint, model, file, options, calibration, images.reading, float_file)
    if options.format == "onnx":
        check_structure(file, replace(options, layout=None), model.config.num_channels, size, model.config.num_labels)
    try:
        exported = _measure(checkpoint, model, file, float_file, options, images)
    finally:
        float_file.unlink()
    if options.layout:
        _put_preprocessing_in_front(checkpoint, file, graph, options, images)
        check_structure(file, options, model.config.num_channels, size, model.config.num_labels)
    return replace(exported, size=_bytes(file))


def write_unproved(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    file: Path,
    options: ExportOptions,
    calibration: Split | None = None,
    reading: Reading = CheckImages.reading,
    float_file: Path | None = None,
) -> onnx.ModelProto:
    """Writes the file alone; what runs it is `runner_for(file, options)`.

    Args:
        calibration: as of [`write_int8`].
        reading: how those images are opened.
        float_file: where the same network goes without quantizers, as ONNX.

    Returns:
        The network's ONNX graph, for OpenVINO the one that it was made of.
    """
    graph = draw_graph(ExportedNetwork(model, options), size_of(checkpoint.processor), options)
    plain = copy.deepcopy(graph)
    scales = take_out(plain)
    if float_file is not None:
        onnx.save(plain, float_file)
    feed = pixels_of(checkpoint.processor)
    write_properties(graph, properties(checkpoint, options))
    if options.int8 == "openvino":
        from .openvino_int8 import from_float, from_pairs

        if calibration is None:
            converted = from_pairs(graph, options.reduce_range)
        else:
            batches = Batches(FolderImages.of(calibration, CALIBRATION, reading), feed, 1)
            converted = from_float(graph, batches, options.reduce_range)
        save_openvino(converted, file, options)
        return graph
    if calibration is None:
        fold_weights(graph)
    else:
        batches = Batches(FolderImages.of(calibration, CALIBRATION, reading), feed, 8)
        graph = for_ort_cpu(plain, scales, iter(batches), options.reduce_range)
        write_properties(graph, properties(checkpoint, options))
    file.write_bytes(graph.SerializeToString())
    return graph


def _bytes(file: Path) -> int:
    """Of a file, and of an IR's weights beside it."""
    return sum(path.stat().st_size for path in {file, file.with_suffix(".bin")} if path.is_file())


def _put_preprocessing_in_front(
    checkpoint: Checkpoint, file: Path, graph: onnx.ModelProto, options: ExportOptions, images: CheckImages
) -> None:
    image = [images.open(0)]
    wanted = onnxruntime_runner(file)(pixels_of(checkpoint.processor)(image))
    front = preprocessing_graph(checkpoint.processor, options)
    whole = put_in_front(front, graph)
    write_properties(whole, properties(checkpoint, options))
    file.write_bytes(whole.SerializeToString())
    # Of the same pixels; a rounding of the normalised ones may lie at the edge of a step of the quantizer.
    found = compare(wanted, onnxruntime_runner(file)(whole_pixels_of(image)))
    if not found.snr >= 20:
        raise UserError(f"the graph's own preprocessing changes the logits by {found.difference:.2g}; nothing written.")


def _measure(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    file: Path,
    float_file: Path,
    options: ExportOptions,
    images: CheckImages,
) -> Exported:
    own = "OpenVINO" if options.format == "openvino" else "ONNX Runtime"
    quantized = checkpoint.quantized
    reference, plain = (PYTORCH, "the same without quantizers") if quantized else (PYTORCH_FLOAT, "float")
    runners = {reference: torch_runner(model, options.probabilities)}
    floats, sizes = {}, {}
    for runtime, opened in (("ONNX Runtime", onnxruntime_runner), ("OpenVINO", openvino_runner)):
        if runtime != own and (options.int8 == "ort-cpu" or not installed("openvino")):
            continue
        name = f"{plain}, {runtime}"
        runners[name], sizes[name] = opened(float_file, threads=1), float_file.stat().st_size
        if runtime == own or options.format == "onnx":
            int8 = f"{options.int8} INT8, {runtime}"
            runners[int8], sizes[int8] = opened(file, threads=1), _bytes(file)
            floats[int8] = name
    feed = pixels_of(checkpoint.processor)
    outputs = run_all({name: (run, feed) for name, run in runners.items()}, images)
    least = deciding(model.config, options)
    int8 = f"{options.int8} INT8, {own}"
    comparison = compare(outputs[reference], outputs[int8], least)
    wanted = LEAST_SNR[options.int8 if quantized else "nncf"]
    spoilt = options.int8 == "openvino" and not options.reduce_range and overflows()
    if not comparison.snr >= wanted:
        found = f"signal to noise {comparison.snr:.1f} dB (wanted: {wanted:g}), agreement {comparison.agreement:.2f} %"
        if spoilt:
            raise UserError(
                f"--int8 openvino: this CPU has no VNNI, and sums of INT8 products overflow on it: {found}; add"
                " --reduce_range. Nothing was written."
            )
        raise UserError(f"the INT8 file does not compute what the checkpoint does: {found}; nothing was written.")
    rows = make_rows(
        outputs, reference, images.labels, sizes, latencies(runners, feed([images.open(0)])), floats, least
    )
    return Exported(
        folder=file.parent,
        file=file,
        size=_bytes(file),
        options=options,
        runtime=runtime_of(options),
        images=images.description,
        comparison=comparison,
        top1=accuracies(outputs, (int8, reference), images.labels),
        rows=tuple(rows),
        notes=_notes(options, quantized, spoilt),
        least_snr=wanted,
    )


def overflows() -> bool:
    """Whether this machine spoils an `openvino` file that was written without `--reduce_range`."""
    from . import openvino_int8

    return openvino_int8.overflows()


def _notes(options: ExportOptions, quantized: bool, spoilt: bool) -> tuple[str, ...]:
    if options.int8 != "openvino":
        return ()
    if quantized:
        way = "INT8 is the quantized checkpoint's own: its grids and ranges."
    else:
        way = f"INT8 is NNCF's, of a float checkpoint: ranges and biases from up to {CALIBRATION} training images."
    where = "on an x86 CPU without VNNI (before 2019, or AVX2 alone)"
    if options.reduce_range:
        told = f"Weights are coarser where sums would overflow {where}: the file is right on every CPU."
    elif spoilt:
        told = "This CPU has no VNNI, and sums of INT8 products overflow on it: with --reduce_range they do not."
    else:
        told = f"Its sums overflow {where}, and answers are wrong: for such machines write it with --reduce_range."
    return way, told


def latencies(runners: Mapping[str, Runner], image: np.ndarray, repeats=(15, 7)) -> dict[str, tuple[float, float]]:
    """Median milliseconds of a call at batch 1 and 8, all runners taking turns, after one call that is not counted."""
    taken: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runners}
    for position, (batch, count) in enumerate(zip(LATENCY_BATCHES, repeats)):
        array = np.repeat(image, batch, axis=0)
        for repeat in range(count + 1):
            for name, run in runners.items():
                started = time.perf_counter()
                run(array)
                if repeat:
                    taken[name][position].append(1e3 * (time.perf_counter() - started))
    return {name: (float(np.median(one)), float(np.median(eight))) for name, (one, eight) in taken.items()}


def make_rows(
    outputs: Mapping[str, np.ndarray],
    reference: str,
    labels: np.ndarray | None,
    sizes: Mapping[str, int],
    times: Mapping[str, tuple[float, float]],
    floats: Mapping[str, str],
    least: np.ndarray | None = None,
) -> list[Row]:
    """One row per entry of `outputs`; `floats` names the float row that a row is compared with."""
    rows = []
    for name, found in outputs.items():
        float_row = floats.get(name)
        own, other = times[name], times[float_row or name]
        ratio = None if float_row is None else (other[0] / own[0], other[1] / own[1])
        rows.append(
            Row(
                name=name,
                top1=accuracy(found, labels),
                agreement=compare(outputs[reference], found, least).agreement,
                megabytes=sizes[name] / 1e6 if name in sizes else None,
                latency=times[name],
                times_float=ratio,
            )
        )
    return rows
