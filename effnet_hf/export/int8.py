"""An INT8 export: the file of its target, then measured beside float and beside the checkpoint in PyTorch."""

import copy
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx

from ..checkpoint import Checkpoint
from ..data import Split
from ..errors import UserError
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from .check import (
    LEAST_SNR,
    CheckImages,
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
from .graph import check_structure, draw_graph, write_properties
from .network import ExportedNetwork
from .options import ExportOptions, installed
from .ort_int8 import fold_weights, for_ort_cpu, take_out
from .preprocessing import preprocessing_graph, put_in_front
from .runners import Runner, onnxruntime_runner, openvino_runner, torch_runner


CALIBRATION = 128
LATENCY_BATCHES = (1, 8)
PYTORCH = "checkpoint, fake-quantized, PyTorch"


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
        calibration: training images to take the ranges of `ort-cpu` from; None for `tensorrt`.

    Raises:
        UserError: its logits are not the checkpoint's.
    """
    size = size_of(checkpoint.processor)
    graph = draw_graph(ExportedNetwork(model, options), size, options)
    plain = copy.deepcopy(graph)
    scales = take_out(plain)
    float_file = file.with_name("float.onnx")  # beside it for the comparison only
    onnx.save(plain, float_file)
    if calibration is None:
        fold_weights(graph)
    else:
        found = FolderImages.of(calibration, CALIBRATION, images.reading)
        graph = for_ort_cpu(plain, scales, map(pixels_of(checkpoint.processor), found.batches((8,))))
    write_properties(graph, properties(checkpoint, options))
    file.write_bytes(graph.SerializeToString())
    check_structure(file, replace(options, layout=None), model.config.num_channels, size, model.config.num_labels)
    try:
        exported = _measure(checkpoint, model, file, float_file, options, images)
    finally:
        float_file.unlink()
    if options.layout:
        _put_preprocessing_in_front(checkpoint, file, graph, options, images)
        check_structure(file, options, model.config.num_channels, size, model.config.num_labels)
    return replace(exported, size=file.stat().st_size)


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
    import onnxruntime

    names = {"float": "the same without quantizers, ONNX Runtime", "int8": f"{options.int8} INT8, ONNX Runtime"}
    runners = {
        PYTORCH: torch_runner(model, options.probabilities),
        names["float"]: onnxruntime_runner(float_file, threads=1),
        names["int8"]: onnxruntime_runner(file, threads=1),
    }
    floats = {names["int8"]: names["float"]}
    sizes = {names["float"]: float_file.stat().st_size, names["int8"]: file.stat().st_size}
    if options.int8 == "tensorrt" and installed("openvino"):
        for kind, path in (("the same without quantizers", float_file), (f"{options.int8} INT8", file)):
            runners[f"{kind}, OpenVINO"] = openvino_runner(path, threads=1)
            sizes[f"{kind}, OpenVINO"] = path.stat().st_size
        floats[f"{options.int8} INT8, OpenVINO"] = "the same without quantizers, OpenVINO"
    feed = pixels_of(checkpoint.processor)
    outputs = run_all({name: (run, feed) for name, run in runners.items()}, images)
    least = deciding(model.config, options)
    comparison = compare(outputs[PYTORCH], outputs[names["int8"]], least)
    if not comparison.snr >= LEAST_SNR[options.int8]:
        raise UserError(
            f"the INT8 file does not compute what the checkpoint does: signal to noise {comparison.snr:.1f} "
            f"dB (wanted: {LEAST_SNR[options.int8]:g}), agreement {comparison.agreement:.2f} %; nothing was written."
        )
    rows = make_rows(outputs, PYTORCH, images.labels, sizes, latencies(runners, feed([images.open(0)])), floats, least)
    return Exported(
        folder=file.parent,
        file=file,
        size=file.stat().st_size,
        options=options,
        runtime=f"ONNX Runtime {onnxruntime.__version__}",
        images=images.description,
        comparison=comparison,
        top1=accuracies(outputs, (names["int8"], PYTORCH), images.labels),
        rows=tuple(rows),
    )


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
