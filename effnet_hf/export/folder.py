"""The whole way: open a checkpoint, write the file, prove it, describe it, put the folder in place."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..files import atomic_folder
from .card import write_card
from .checkpoint import Checkpoint, describe, open_checkpoint
from .float_file import verify_float, write_file
from .int8_file import write_int8
from .options import INT8_TARGETS, ExportOptions
from .pictures import CheckPictures, FolderPictures, GeneratedPictures
from .result import Exported


GENERATED, FROM_FOLDER = 16, 64


def export_model(
    model: str | Checkpoint,
    output: str | Path,
    *,
    data_dir: str | None = None,
    val_fraction: float = 0.0,
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
        val_fraction: the share that training held out of a `data_dir` without `val/`.
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
    _refuse(checkpoint, options, data_dir)
    if options.dynamic_image_size and checkpoint.model.config.padding == "same":
        raise UserError("--dynamic_image_size: this network pads by the picture's size (padding: same); leave it out.")
    pictures = check_pictures(checkpoint, data_dir, val_fraction, num_pictures, options)
    with _disk_errors(output), atomic_folder(output, overwrite) as folder:
        file = folder / options.file_name
        if options.int8:
            exported = write_int8(checkpoint, file, options, pictures, data_dir, val_fraction)
        else:
            write_file(checkpoint, file, options)
            exported = verify_float(checkpoint, file, options, pictures)
        describe(checkpoint, folder)
        write_card(checkpoint, exported, command=command, model_id=model_id)
    return _in_place(exported, Path(output))


def _refuse(checkpoint: Checkpoint, options: ExportOptions, data_dir: str | None) -> None:
    if options.int8 and not checkpoint.quantized:
        raise UserError(
            f"--int8 {options.int8}: {checkpoint.name} is a float checkpoint; quantize it first: python qat.py --help"
        )
    if checkpoint.quantized and not options.int8:
        raise UserError(f"{checkpoint.name} is a quantized checkpoint; add --int8 {' or --int8 '.join(INT8_TARGETS)}.")
    if options.int8 == "ort-cpu" and data_dir is None:
        raise UserError("--int8 ort-cpu needs --data_dir DIR: it takes ranges of activations from DIR/train.")


def check_pictures(
    checkpoint: Checkpoint, data_dir: str | None, val_fraction: float, count: int | None, options: ExportOptions
) -> CheckPictures:
    if count is not None and count < 2:
        raise UserError(f"--num_pictures {count}: at least two, for a batch of one and another.")
    if data_dir is None:
        return GeneratedPictures(count or GENERATED, side=checkpoint.image_size + 32)
    count = count or (None if options.int8 else FROM_FOLDER)
    return FolderPictures(data_dir, checkpoint.labels, count, val_fraction)


def _in_place(exported: Exported, output: Path) -> Exported:
    return replace(exported, folder=output, file=output / exported.file.name)


@contextmanager
def _disk_errors(output) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}; nothing was left there.") from error
