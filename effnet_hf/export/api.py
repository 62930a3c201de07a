"""The whole way: open a checkpoint, write the file, prove it, describe it, put the folder in place.

What needs the onnx package is imported where it is used: `--format pt2` does without it, and where it is missing
`ExportOptions` says so.
"""

from dataclasses import replace
from pathlib import Path

from ..checkpoint import Checkpoint, open_checkpoint
from ..cli import invocation, say
from ..data.opening import open_data
from ..data.pictures import Reading
from ..errors import UserError
from ..files import atomic_folder, refuse_to_remove
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..multi_label import is_multi_label, require_same_task
from ..recipes import Recipe
from .check import (
    CheckImages,
    Feed,
    FolderImages,
    GeneratedImages,
    MirroredPairs,
    accuracies,
    arrays_of,
    compare,
    deciding,
    pixels_of,
    require_equal,
    run_all,
    size_of,
    whole_pixels_of,
)
from .describe import Exported, properties, write_card, write_configuration
from .devices import CALIBRATED, DEVICES
from .devices.proof import write_for_device
from .network import ExportedNetwork, write_pt2
from .options import INT8_TARGETS, LAYOUT, ExportOptions, require
from .runners import Runner, runner_for, torch_runner


GENERATED, FROM_FOLDER = 16, 64


def export_model(
    model: str | Path | Checkpoint,
    output_dir: str | Path,
    *,
    num_images: int | None = None,
    overwrite: bool = False,
    command: str | None = None,
    model_id: str | None = None,
    **settings,
) -> Exported:
    """Writes a checkpoint as a folder that runs elsewhere, after proving that it computes the same.

    Args:
        model: folder, Hub id, or a [`Checkpoint`] that is open already.
        output_dir: the folder: `model.onnx` (or another format's file), config.json, preprocessor_config.json,
            README.md.
        num_images: how many images to check on; 64 of the user's (all of them for INT8), or 16 generated ones.
        overwrite: replace an existing folder.
        command, model_id: for the model card.
        settings: fields of [`ExportOptions`]; and data options of a recipe, such as `data_dir`, for the images to check
            on (those to validate on) and to calibrate with (those to train on). Without them images are generated.

    Raises:
        UserError: the options or the checkpoint cannot be used, the file does not compute what the checkpoint does,
            or the folder cannot be written. Nothing is left behind.
    """
    own = ExportOptions.__dataclass_fields__.keys() & settings.keys()
    options = ExportOptions(**{name: settings.pop(name) for name in own})
    recipe = Recipe(**settings)
    data = recipe if recipe.data_dir or recipe.dataset_name or recipe.labels else None
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    _refuse(checkpoint, options, data)
    if overwrite:
        sources = {f"--{name}": getattr(recipe, name) for name in ("data_dir", "dataset_name", "labels")}
        refuse_to_remove(output_dir, {"--model": checkpoint.name, **sources})
    images = check_images(checkpoint, data, num_images, options)
    for note in images.notes:
        say(note)
    network = checkpoint.load().float().eval()
    with atomic_folder(output_dir, overwrite) as folder:
        file = folder / options.file_name
        file.parent.mkdir(exist_ok=True)
        if options.format in DEVICES:
            calibration = open_data(data).train if options.int8 == CALIBRATED and data is not None else None
            exported = write_for_device(checkpoint, network, file, options, images, calibration)
        elif options.int8:
            from .int8 import write_int8

            calibration = None
            kind = "quantized" if checkpoint.quantized else "float"
            if INT8_TARGETS[options.int8].needs_images[kind] and data is not None:
                calibration = open_data(data).train
            exported = write_int8(checkpoint, network, file, options, images, calibration)
        else:
            write_float(checkpoint, network, file, options)
            exported = verify_float(checkpoint, network, file, options, images)
        exported = replace(exported, folder=folder, temperature=checkpoint.config.softmax_temperature)
        write_configuration(checkpoint, folder, options)
        write_card(checkpoint, exported, command=command, model_id=model_id)
    return replace(exported, folder=Path(output_dir), file=Path(output_dir) / options.file_name)


def _refuse(checkpoint: Checkpoint, options: ExportOptions, data: Recipe | None) -> None:
    name = f"{checkpoint.flag} {checkpoint.name}"
    if not checkpoint.config.num_labels:
        raise UserError(f"{name} has no classes; export needs a classifier.")
    kind = "quantized" if checkpoint.quantized else "float"
    if options.format in DEVICES:
        _refuse_for_device(name, checkpoint.quantized, options, data)
        return
    possible = [int8 for int8, target in INT8_TARGETS.items() if kind in target.needs_images]
    instead = f"--int8 {' or --int8 '.join(possible)}"
    if checkpoint.quantized and not options.int8:
        raise UserError(f"{name} is a quantized checkpoint; add {instead}.")
    if options.int8 in INT8_TARGETS:
        if options.int8 not in possible:
            raise UserError(
                f"--int8 {options.int8}: {name} is a float checkpoint; quantize it first: {invocation('qat')} --help,"
                f" or give {instead}."
            )
        if INT8_TARGETS[options.int8].needs_images[kind] and data is None:
            raise UserError(
                f"--int8 {options.int8} needs --data_dir DIR, --labels FILE or --dataset_name NAME: of a {kind}"
                " checkpoint it takes ranges of activations from the training images."
            )
        if options.int8 == "openvino" and kind == "float":
            require("nncf")
    if options.layout and is_multi_label(checkpoint.config):
        raise UserError(
            f"--layout {LAYOUT}: in {name} an image may have several labels, and the pipeline there always takes a"
            " softmax; leave it out, and run the file by onnxruntime-web."
        )
    if options.dynamic_image_size and checkpoint.config.padding == "same":
        raise UserError("--dynamic_image_size: this network pads by the image's size (padding: same); leave it out.")


def _refuse_for_device(name: str, quantized: bool, options: ExportOptions, data: Recipe | None) -> None:
    if quantized:
        kinds = " or ".join(f"--int8 {kind}" for kind in DEVICES[options.format].int8)
        raise UserError(
            f"{name} is a quantized checkpoint; --format {options.format} takes the float one that it was made of"
            + (f", and quantizes it by itself with {kinds}." if kinds else ".")
        )
    if options.int8 == CALIBRATED and data is None:
        raise UserError(
            f"--int8 {CALIBRATED} needs --data_dir DIR, --labels FILE or --dataset_name NAME: it takes ranges of"
            " activations from the training images."
        )


def check_images(checkpoint: Checkpoint, data: Recipe | None, count: int | None, options: ExportOptions) -> CheckImages:
    if count is not None and count < 2:
        raise UserError(f"--num_images {count}: at least two, for a batch of one and another.")
    if data is None:
        processor = checkpoint.processor
        edge = processor.size["shortest_edge"] if processor.do_resize else 0
        side = max(edge, *size_of(processor)) + 16  # larger, so that resizing is part of the proof
        return GeneratedImages(count or GENERATED, side)
    reading = Reading.of(data, checkpoint.processor)
    images = FolderImages(data, checkpoint.class_names, count or (None if options.int8 else FROM_FOLDER), reading)
    if images.labels is not None:
        require_same_task(checkpoint.config, images.labels.ndim == 2, f"{checkpoint.flag} {checkpoint.name}")
    return images


def write_float(
    checkpoint: Checkpoint, model: EfficientNetNVForImageClassification, file: Path, options: ExportOptions
) -> None:
    """Writes the one file of a float export, unchecked."""
    network, size = ExportedNetwork(model, options), size_of(checkpoint.processor)
    if options.format == "pt2":
        write_pt2(network, file, size, options)
        return
    from .graph import draw_graph, write_openvino, write_properties
    from .preprocessing import preprocessing_graph, put_in_front

    front = None
    if options.with_preprocessing or options.layout:
        front = preprocessing_graph(checkpoint.processor, options)
    graph = draw_graph(network, size, options)
    if front is not None:
        graph = put_in_front(front, graph)
    write_properties(graph, properties(checkpoint, options))
    if options.format == "openvino":
        write_openvino(graph, file, options)
    else:
        file.write_bytes(graph.SerializeToString())


def verify_float(
    checkpoint: Checkpoint,
    model: EfficientNetNVForImageClassification,
    file: Path,
    options: ExportOptions,
    images: CheckImages,
) -> Exported:
    """Proves the one file of a float export against PyTorch, on what the checkpoint's own processor makes of `images`.

    Raises:
        UserError: it is not what was asked for, or computes something else.
    """
    height, width = size_of(checkpoint.processor)
    if options.format == "onnx":
        from .graph import check_structure

        check_structure(file, options, model.config.num_channels, (height, width), model.config.num_labels)
    runtime, run = runner_for(file, options)
    reference, pixels = torch_runner(model, options.probabilities), pixels_of(checkpoint.processor)
    least = deciding(model.config, options)
    runners: dict[str, tuple[Runner, Feed]] = {"file": (run, pixels), "torch": (reference, pixels)}
    any_size = options.with_preprocessing or options.layout
    if any_size:
        runners["file"] = run, whole_pixels_of if options.layout else arrays_of
        outputs = run_all(runners, MirroredPairs(images), (1, 2))
    else:
        outputs = run_all(runners, images)
    comparison = compare(outputs["torch"], outputs["file"], least)
    require_equal(comparison, options, runtime)
    if options.dynamic_image_size:
        larger = {"height": height + 32, "width": width + 32}
        edge = checkpoint.processor.size["shortest_edge"] + 32
        array = pixels_of(checkpoint.processor, size=edge, crop_size=larger)([images.open(0), images.open(1)])
        where = f"{runtime} at {height + 32} x {width + 32} pixels"
        require_equal(compare(reference(array), run(array), least), options, where)
    if any_size:
        outputs = {name: MirroredPairs.without_mirrors(found) for name, found in outputs.items()}
    measured = accuracies(outputs, ("file", "torch"), images.labels)
    size = sum(path.stat().st_size for path in file.parent.iterdir())
    return Exported(file.parent, file, size, options, runtime, images.description, comparison, measured)
