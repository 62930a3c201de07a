"""The one file of an INT8 export: written for its target, then measured beside float and the checkpoint in PyTorch."""

import copy
from pathlib import Path

import numpy as np
import onnx

from ..data import DataSource
from ..errors import UserError
from .checkpoint import Checkpoint, properties
from .int8 import for_ort_cpu
from .int8_report import latencies, make_rows
from .network import ExportedNetwork
from .onnx import draw_graph, write_properties
from .options import ExportOptions, installed
from .pictures import CheckPictures, FolderPictures
from .qdq import fold_weights, take_out
from .result import Exported
from .runners import onnxruntime_runner, openvino_runner, torch_runner
from .verify import LEAST_SNR, check_structure, compare, run_all, top1


CALIBRATION = 128
PYTORCH = "checkpoint, fake-quantized, PyTorch"


def write_int8(
    checkpoint: Checkpoint,
    file: Path,
    options: ExportOptions,
    pictures: CheckPictures,
    data_dir: str | None,
    val_fraction: float = 0.0,
) -> Exported:
    """Writes and measures the file; `ort-cpu` takes its ranges from the training pictures of `data_dir`.

    Raises:
        UserError: its logits are not the checkpoint's.
    """
    drawn = draw_graph(ExportedNetwork(checkpoint.model, options), checkpoint.image_size, options)
    unquantized = copy.deepcopy(drawn)
    take_out(unquantized)
    float_file = file.with_name("float.onnx")  # beside it for the comparison only
    onnx.save(unquantized, float_file)
    if options.int8 == "tensorrt":
        model = drawn
        fold_weights(model)
    else:
        model = for_ort_cpu(drawn, _calibration(checkpoint, data_dir, val_fraction))
    write_properties(model, properties(checkpoint, options))
    file.write_bytes(model.SerializeToString())
    try:
        return _measure(checkpoint, file, float_file, options, pictures)
    finally:
        float_file.unlink()


def _calibration(checkpoint: Checkpoint, data_dir: str, val_fraction: float) -> list[np.ndarray]:
    found = FolderPictures.of(DataSource.from_folder(data_dir, val_fraction).train, CALIBRATION)
    return [np.stack(checkpoint.processor(batch)["pixel_values"]) for batch in found.batches((8,))]


def _measure(
    checkpoint: Checkpoint, file: Path, float_file: Path, options: ExportOptions, pictures: CheckPictures
) -> Exported:
    import onnxruntime

    config = checkpoint.model.config
    check_structure(file, options, config.num_channels, checkpoint.image_size, config.num_labels)
    names = {"float": "the same without quantizers, ONNX Runtime", "int8": f"{options.int8} INT8, ONNX Runtime"}
    runners = {
        PYTORCH: torch_runner(checkpoint.model, options.softmax),
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

    def processed(images):
        return np.stack(checkpoint.processor(images)["pixel_values"])

    outputs = run_all({name: (run, processed) for name, run in runners.items()}, pictures)
    comparison = compare(outputs[PYTORCH], outputs[names["int8"]])
    if not comparison.snr >= LEAST_SNR[options.int8]:
        raise UserError(
            f"the INT8 file does not compute what the checkpoint does: signal to noise {comparison.snr:.1f} "
            f"dB (wanted: {LEAST_SNR[options.int8]:g}), agreement {comparison.agreement:.2f} %; nothing was written."
        )
    times = latencies(runners, processed([pictures.open(0)]))
    rows = make_rows(outputs, PYTORCH, pictures.labels, sizes, times, floats)
    accuracy = None
    if pictures.labels is not None:
        accuracy = top1(outputs[names["int8"]], pictures.labels), top1(outputs[PYTORCH], pictures.labels)
    runtime = f"ONNX Runtime {onnxruntime.__version__}"
    return Exported(
        file.parent,
        file,
        file.stat().st_size,
        options,
        runtime,
        pictures.description,
        comparison,
        accuracy,
        tuple(rows),
    )
