"""The one file of a float export: written, then proved against PyTorch."""

from pathlib import Path

import numpy as np

from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from .checkpoint import Checkpoint, properties
from .network import ExportedNetwork
from .onnx import draw_graph, write_properties
from .options import ExportOptions
from .other_formats import write_openvino, write_pt2
from .pictures import CheckPictures
from .preprocessing import preprocessing_graph, put_in_front
from .result import Exported
from .runners import runner_for, torch_runner
from .verify import BATCH_SIZES, check_structure, compare, mirrored_pairs, require_equal, run_all, top1


def write_file(checkpoint: Checkpoint, path: Path, options: ExportOptions) -> None:
    """Writes the one file of a float export, unchecked."""
    network = ExportedNetwork(checkpoint.model, options)
    if options.format == "pt2":
        write_pt2(network, path, checkpoint.image_size, options)
        return
    model = draw_graph(network, checkpoint.image_size, options)
    if options.with_preprocessing:
        model = put_in_front(preprocessing_graph(checkpoint.processor, options.opset), model)
    write_properties(model, properties(checkpoint, options))
    if options.format == "openvino":
        write_openvino(model.SerializeToString(), path, options)
    else:
        path.write_bytes(model.SerializeToString())


def verify_float(checkpoint: Checkpoint, file: Path, options: ExportOptions, pictures: CheckPictures) -> Exported:
    config, processor = checkpoint.model.config, checkpoint.processor
    if options.format == "onnx":
        check_structure(file, options, config.num_channels, checkpoint.image_size, config.num_labels)
    runtime, run = runner_for(file, options)
    reference = torch_runner(checkpoint.model, options.softmax)

    def processed(images):
        return np.stack(processor(images)["pixel_values"])

    labels, sizes, feed = pictures.labels, BATCH_SIZES, processed
    shown = pictures
    if options.with_preprocessing:
        shown, sizes, feed = mirrored_pairs(pictures), (1, 2), np.stack
    outputs = run_all({"file": (run, feed), "torch": (reference, processed)}, shown, sizes)
    comparison = compare(outputs["torch"], outputs["file"])
    require_equal(comparison, options, runtime)
    if options.dynamic_image_size:
        larger = EfficientNetNVImageProcessor.for_image_size(checkpoint.image_size + 32)
        array = np.stack(larger([pictures.open(0), pictures.open(1)])["pixel_values"])
        require_equal(compare(reference(array), run(array)), options, f"{runtime} at {checkpoint.image_size + 32} px")
    accuracy = None
    if labels is not None and not options.with_preprocessing:
        accuracy = top1(outputs["file"], labels), top1(outputs["torch"], labels)
    size = sum(path.stat().st_size for path in file.parent.iterdir())
    return Exported(file.parent, file, size, options, runtime, pictures.description, comparison, accuracy)
