"""The whole way: open a checkpoint, write the file, prove it, describe it, put the folder in place."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic_folder
from ..image_processing_efficientnet_nv import EfficientNetNVImageProcessor
from ..modeling_efficientnet_nv import EfficientNetNVForImageClassification
from ..training import check_checkpoint, load_model, load_processor
from .card import write_card
from .network import ExportedNetwork
from .onnx import draw_graph, write_properties
from .options import ExportOptions
from .other_formats import write_openvino, write_pt2
from .pictures import CheckPictures, FolderPictures, GeneratedPictures
from .preprocessing import preprocessing_graph, put_in_front
from .runners import runner_for, torch_runner
from .verify import BATCH_SIZES, Comparison, check_structure, compare, mirrored_pairs, require_equal, run_all, top1


GENERATED, FROM_FOLDER = 16, 64


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: everything an export needs of it."""

    name: str
    model: EfficientNetNVForImageClassification
    processor: EfficientNetNVImageProcessor
    recipe: str | None = None

    @property
    def labels(self) -> list[str]:
        config = self.model.config
        return [config.id2label[i] for i in range(config.num_labels)]

    @property
    def image_size(self) -> int:
        return self.processor.crop_size["height"]


@dataclass(frozen=True)
class Exported:
    """What was written, and how it was checked.

    Attributes:
        folder, file: where it is; `file` lies in `folder`.
        size: of the file (and its weights beside it), bytes.
        runtime: what ran it.
        pictures: how many of what, for a sentence.
        comparison: against PyTorch.
        top1: of the file and of the checkpoint in PyTorch, percent; None without labelled pictures.
    """

    folder: Path
    file: Path
    size: int
    options: ExportOptions
    runtime: str
    pictures: str
    comparison: Comparison
    top1: tuple[float, float] | None = None
    tables: list = field(default_factory=list)

    def summary(self) -> str:
        """What `export.py` prints."""
        options, checked = self.options, self.comparison
        graph = f"opset {options.opset}, " if options.format == "onnx" else ""
        lines = [
            f"wrote    {self.file}   {self.size / 1e6:.1f} MB, {graph}{options.int8 or options.dtype}",
            f"graph    {options.input_name} -> {options.output_name}",
            f"checked  {self.runtime} against PyTorch on {self.pictures}:"
            f" largest difference {checked.difference:.2g}, top-1 agreement {checked.agreement:.2f} %",
        ]
        if self.top1:
            lines.append(f"top1     {self.top1[0]:.2f} %, the checkpoint in PyTorch {self.top1[1]:.2f} %")
        return "\n".join(lines)


def open_checkpoint(model: str) -> Checkpoint:
    """Raises `UserError` when it is not one of our classifiers."""
    config = check_checkpoint(model)
    if not config.num_labels:
        raise UserError(f"--model {model} has no classes; export needs a classifier.")
    network, recipe = load_model(model).float().eval(), Path(model, "recipe.yaml")
    return Checkpoint(model, network, load_processor(model), recipe.read_text("utf-8") if recipe.is_file() else None)


def export_onnx(model, output, **options) -> Exported:
    """`export_model` with ONNX, e.g. `export_onnx("runs/b0", "runs/b0-onnx", with_softmax=True)`."""
    return export_model(model, output, **options)


def export_model(
    model: str | Checkpoint,
    output: str | Path,
    *,
    data_dir: str | None = None,
    num_pictures: int | None = None,
    overwrite: bool = False,
    command: str | None = None,
    model_id: str | None = None,
    **settings,
) -> Exported:
    """Writes a checkpoint as a folder that runs elsewhere, after proving that it computes the same.

    Args:
        model: folder, Hub id, or an opened [`Checkpoint`].
        output: the folder: `model.onnx` (or another format's file), config.json, preprocessor_config.json, README.md.
        data_dir: pictures to check on, `DIR/val/<class>/…`; generated ones without it.
        num_pictures: how many; 64 of a folder, or 16 generated ones.
        overwrite: replace an existing folder.
        command, model_id: for the model card.
        settings: fields of [`ExportOptions`].

    Raises:
        UserError: the options or the checkpoint cannot be used, the file does not compute what the checkpoint does,
            or the folder cannot be written. Nothing is left behind.
    """
    options = ExportOptions(**settings)
    checkpoint = model if isinstance(model, Checkpoint) else open_checkpoint(str(model))
    if options.dynamic_image_size and checkpoint.model.config.padding == "same":
        raise UserError("--dynamic_image_size: this network pads by the picture's size (padding: same); leave it out.")
    pictures = check_pictures(checkpoint, data_dir, num_pictures)
    with _disk_errors(output), atomic_folder(output, overwrite) as folder:
        file = folder / options.file_name
        write_file(checkpoint, file, options)
        exported = _verify(checkpoint, file, options, pictures)
        describe(checkpoint, folder)
        write_card(checkpoint, exported, command=command, model_id=model_id)
    return _in_place(exported, Path(output))


def check_pictures(checkpoint: Checkpoint, data_dir: str | None, count: int | None) -> CheckPictures:
    if count is not None and count < 2:
        raise UserError(f"--num_pictures {count}: at least two, for a batch of one and another.")
    if data_dir is None:
        return GeneratedPictures(count or GENERATED, side=checkpoint.image_size + 32)
    return FolderPictures(data_dir, checkpoint.labels, count or FROM_FOLDER)


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


def properties(checkpoint: Checkpoint, options: ExportOptions) -> dict[str, object]:
    """What somebody needs who has nothing but the file."""
    processor, config = checkpoint.processor, checkpoint.model.config
    facts = {
        "labels": checkpoint.labels,
        "variant": config.variant or "custom",
        "image_size": checkpoint.image_size,
        "resize_shortest_edge": processor.size["shortest_edge"],
        "resample": "bilinear" if processor.resample == 2 else "bicubic",
        "image_mean": processor.image_mean,
        "image_std": processor.image_std,
        "dtype": options.dtype,
    }
    if checkpoint.recipe:
        facts["recipe"] = checkpoint.recipe
    return facts


def describe(checkpoint: Checkpoint, folder: Path) -> None:
    """config.json and preprocessor_config.json, each with the code that opens it where this package is missing."""
    checkpoint.model.config.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    # The file replaces the weights that a model class would look for.
    config = json.loads((folder / "config.json").read_text("utf-8"))
    automatic = {name: place for name, place in config.get("auto_map", {}).items() if name == "AutoConfig"}
    config["auto_map"] = automatic or {"AutoConfig": "configuration.EfficientNetNVConfig"}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def _verify(checkpoint: Checkpoint, file: Path, options: ExportOptions, pictures: CheckPictures) -> Exported:
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


def _in_place(exported: Exported, output: Path) -> Exported:
    return replace(exported, folder=output, file=output / exported.file.name)


@contextmanager
def _disk_errors(output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; nothing was left there.") from error
