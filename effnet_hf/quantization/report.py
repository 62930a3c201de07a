"""Float, calibrated, fine-tuned: the figures side by side."""

import json
import logging
from collections.abc import Mapping

from ..errors import UserError
from ..files import atomic_write
from ..multi_label import shown
from ..quantization_efficientnet_nv import quantizers
from ..reading import read_json
from ..run_folder import RunFolder


log = logging.getLogger(__name__)
STAGES = {"float": "float", "ptq": "PTQ, calibrated only", "qat": "QAT, fine-tuned"}


def model_bytes(model, quantized: bool = True) -> int:
    """Bytes of a model's numbers: one per quantized weight and four per range; four for everything else.

    What an int8 file needs, without its container; batch norm counts as it is, though an export folds it.
    """
    ranges = {f"{name.rpartition('.')[0]}.{name.rpartition('.')[2]}_quantizer._amax" for name in quantizers(model)}
    int8 = {name for name in quantizers(model) if name.endswith(".weight")} if quantized else set()
    total = 0
    for name, tensor in model.state_dict().items():
        if name.endswith("num_batches_tracked") or (name in ranges and not quantized):
            continue
        total += tensor.numel() * (1 if name in int8 else 4)
    return total


def figures_of(results: Mapping, size: int) -> dict:
    """What the table shows of a validation: `top1` and top-k, or `map` and `f1`, `loss`, `n`; and `bytes`."""
    wanted = ("loss", "n", "map", "f1")
    return {name: value for name, value in results.items() if name[:3] == "top" or name in wanted} | {"bytes": size}


def save_figures(folder: RunFolder, figures: Mapping) -> None:
    with atomic_write(folder.quantization) as file:
        json.dump(figures, file, indent=1, allow_nan=False)


def load_figures(folder: RunFolder, top_k: int) -> dict:
    """Those of an earlier launch of the same run; empty if there are none, or none that can be read, which is said."""
    path = folder.quantization
    if not path.exists():
        return {}
    try:
        figures = read_json(path)
        if all(stage in STAGES and _are_figures(entry, top_k) for stage, entry in figures.items()):
            return figures
        reason = f"{path} holds no figures of quantization."
    except UserError as error:
        reason = str(error)
    log.warning("the table leaves out what earlier launches measured: %s", reason)
    return {}


def _are_figures(entry: object, top_k: int) -> bool:
    return isinstance(entry, dict) and all(
        isinstance(entry.get(name), (int, float)) and 0 <= entry[name] < 2**53
        for name in (*_names(entry, top_k), "loss", "n", "bytes")
    )


def _names(entry: Mapping, top_k: int) -> tuple[str, str]:
    """Of the two figures beside the loss."""
    return ("map", "f1") if "map" in entry else ("top1", f"top{top_k}")


def rows(figures: Mapping, top_k: int) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one per stage that was measured."""
    known = [(title, figures[stage]) for stage, title in STAGES.items() if stage in figures]
    names = _names(known[0][1] if known else {}, top_k)
    n = next((entry["n"] for _, entry in known), 0)
    first, second = (shown(name).replace("top", "top-") for name in names)
    header = ["", f"{first}, % (n = {n:,})", f"{second}, %", "loss", "MB"]
    lines = [
        [
            title,
            *(f"{entry[name]:.2f}" for name in names),
            f"{entry['loss']:.4f}",
            f"{entry['bytes'] / 1e6:.2f}",
        ]
        for title, entry in known
    ]
    return header, lines
