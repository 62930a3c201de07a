"""Putting a temperature into a checkpoint's folder, where every way of opening it finds it."""

import json
import os
from pathlib import Path

from .. import configuration, image_processing_efficientnet_nv, modeling_efficientnet_nv, quantization_efficientnet_nv
from ..checkpoint import CONFIG, Checkpoint
from ..cli import invocation
from ..errors import UserError, printable
from ..files import atomic_write, lock_beside
from ..lock import held
from ..manifest import MANIFEST, described_anew, problem
from ..multi_label import is_multi_label
from ..reading import read_json
from ..run_folder import RunFolder, made_by_a_run


_CODE = tuple(
    Path(str(each.__file__))
    for each in (
        configuration,
        modeling_efficientnet_nv,
        quantization_efficientnet_nv,
        image_processing_efficientnet_nv,
    )
)


def require_storable(checkpoint: Checkpoint) -> None:
    """Raises `UserError` where no temperature can be stored: of several labels per image, of the Hub, or in a folder
    whose own copy of the model's code would pass over it and may not be replaced."""
    folder, where = Path(checkpoint.name), f"{checkpoint.flag} {printable(checkpoint.name)}"
    if is_multi_label(checkpoint.config):
        raise UserError(
            f"--calibrate: {where} has several labels per image, each with a threshold of its own, which training"
            " chooses; a temperature is for one label per image."
        )
    if not folder.is_dir():
        raise UserError(
            f"--calibrate writes into the checkpoint's folder, and {where} is on the Hub; download it first:"
            f" hf download {printable(checkpoint.name)} --local-dir DIR"
        )
    if not os.access(folder, os.W_OK):
        raise UserError(f"--calibrate writes into the checkpoint's folder, and {where} cannot be written to.")
    names = [path.name for path in _outdated(folder)]
    if names and (not (folder / MANIFEST).is_file() or problem(folder, only=tuple(names))):
        raise UserError(
            f"{where} has a {names[0]} of another version, or an edited one, which would pass over a temperature; write"
            f" the model anew first: {invocation('convert')} {printable(checkpoint.name)} --output_dir DIR"
        )


def store_temperature(checkpoint: Checkpoint, temperature: float) -> list[str]:
    """Writes it into the folder's config.json and brings its manifest up to date; the names of what was written.

    A copy of the model's code that an earlier version wrote there is replaced by this one's.

    Raises:
        UserError: see `require_storable`; or the folder cannot be written, or a run is writing it.
    """
    require_storable(checkpoint)
    folder = Path(checkpoint.name).resolve()
    lock = RunFolder(folder).lock if made_by_a_run(folder) else lock_beside(folder)
    with held(lock, str(folder)):
        written = put_temperature(folder, temperature)
    checkpoint.config.softmax_temperature = temperature
    return written


def put_temperature(folder: Path, temperature: float) -> list[str]:
    """`store_temperature` for who has locked the folder and has written all of it."""
    outdated = _outdated(folder)
    for path in outdated:
        with atomic_write(folder / path.name) as file:
            file.write(path.read_text("utf-8"))
    fields = read_json(folder / CONFIG) | {"softmax_temperature": temperature}
    with atomic_write(folder / CONFIG) as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    written = [*(path.name for path in outdated), CONFIG]
    if (folder / MANIFEST).is_file():
        text = described_anew(folder, written)
        with atomic_write(folder / MANIFEST) as file:
            file.write(text)
    return written


def _outdated(folder: Path) -> list[Path]:
    """Our files of which the folder has other copies: all that it has, as each needs the others."""
    there = [path for path in _CODE if (folder / path.name).is_file()]
    return there if any((folder / path.name).read_bytes() != path.read_bytes() for path in there) else []
