"""What each layer's quantizers cost: one layer quantized at a time, everything else in float."""

import itertools
import json
import math
from pathlib import Path

import torch

from ..files import atomic_write
from ..quantization_efficientnet_nv import quantizers
from ..run_folder import RunFolder
from .insert import set_quantizers


@torch.inference_mode()
def sensitivity(model, batches, measure: str, reduce=lambda sums: sums) -> list[dict]:
    """One row per layer that has quantizers, and one, `"all"`, for all of them together; the most sensitive first.

    Args:
        batches: called for every pass; yields `{"pixel_values", "labels"}`.
        measure: `"sqnr"`, signal to quantization noise of the logits in decibels (lower is worse), or `"accuracy"`,
            top-1 in percent, or with several labels per image the share of labels that 0.5 tells right; a row also has
            the `drop` from float then.
        reduce: adds a tensor of sums over processes.

    Returns:
        Rows `{"layer", measure, "n"}`; with `"accuracy"` also `"drop"`.
    """
    layers: dict[str, set] = {}
    for name in quantizers(model):
        layers.setdefault(name.rpartition(".")[0], set()).add(name)
    was_training = model.training
    model.eval()
    set_quantizers(model, False)
    reference = [model(pixel_values=batch["pixel_values"]).logits for batch in batches()]
    rows = []
    try:
        base = _measure(reference, reference, batches(), reduce)
        for layer, names in [("all", None), *layers.items()]:
            set_quantizers(model, True, only=names)
            found = [model(pixel_values=batch["pixel_values"]).logits for batch in batches()]
            figures = _measure(found, reference, batches(), reduce)
            row = {"layer": layer, measure: figures[measure], "n": figures["n"]}
            rows.append(row | ({"drop": base["accuracy"] - row["accuracy"]} if measure == "accuracy" else {}))
            set_quantizers(model, False)
    finally:
        set_quantizers(model, True)
        model.train(was_training)
    return sorted(rows, key=lambda row: row[measure])


def _measure(found: list, reference: list, batches, reduce) -> dict:
    sums = torch.zeros(4, dtype=torch.float64)  # signal, noise, right, images
    for logits, wanted, batch in zip(found, reference, batches):
        labels = batch["labels"]
        several = ((logits > 0) == (labels > 0)).double().mean(-1) if labels.is_floating_point() else None
        right = (logits.argmax(-1) == labels if several is None else several).sum()
        sums += torch.stack([wanted.double().square().sum(), (logits - wanted).double().square().sum(),
                             right.double(), torch.tensor(float(len(logits)), device=right.device)]).cpu()  # fmt: skip
    signal, noise, right, n = reduce(sums).tolist()
    sqnr = 10 * math.log10(signal / noise) if noise and signal else math.inf
    return {"sqnr": sqnr, "accuracy": 100 * right / n, "n": int(n)}


def take(loader, count: int):
    """For `batches`: the first `count` batches of a validation loader, all of them if it is 0."""
    return lambda: itertools.islice(loader.epoch(0), count or None)


def write_report(rows: list[dict], measure: str, folder: RunFolder) -> list[Path]:
    """Writes the rows and a plot of them (the thirty most sensitive layers) and returns both paths."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    document, plot = folder.sensitivity, folder.sensitivity_plot
    with atomic_write(document) as file:
        finite = [{k: v if v != math.inf else None for k, v in row.items()} for row in rows]
        json.dump(finite, file, indent=1, allow_nan=False)
    shown = [row for row in rows if row[measure] != math.inf][:31][::-1]
    figure, axis = plt.subplots(figsize=(8, 1 + 0.22 * len(shown)), layout="constrained")
    colours = ["#444444" if row["layer"] == "all" else "#76b900" for row in shown]
    axis.barh([short_name(row["layer"]) for row in shown], [row[measure] for row in shown], color=colours)
    axis.tick_params(axis="y", labelsize=7)
    unit = "signal to noise of the logits, dB (less is worse)" if measure == "sqnr" else "right, %"
    axis.set_xlabel(f"{unit}; only this layer quantized; {rows[0]['n']:,} images")
    if measure == "accuracy" and shown:
        values = [row[measure] for row in shown]
        axis.set_xlim(max(0.0, min(values) - 1), max(values) + 0.2)
    with atomic_write(plot, "wb") as file:
        figure.savefig(file, dpi=110, format="png")
    plt.close(figure)
    return [document, plot]


def short_name(layer: str) -> str:
    """A layer's name without what all names share: `stages.1.blocks.0.se.scale`."""
    return layer.removeprefix("efficientnet.").removeprefix("encoder.")
