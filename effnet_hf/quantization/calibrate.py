"""Ranges of quantizers: weights by the largest magnitude per output channel, activations from what they are shown."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ..errors import UserError
from ..quantization_efficientnet_nv import quantizers


@dataclass(frozen=True)
class Calibration:
    """What a calibration did: `images` of all processes, `seconds`, and the quantizers that saw only zeros."""

    images: int
    seconds: float
    silent: tuple[str, ...] = ()

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


@torch.no_grad()
def calibrate(model, batches: Iterable[torch.Tensor]) -> Calibration:
    """Sets the range of every quantizer, by the method that `model.config.quantization` names. A collective call.

    The float network (quantizers switched off, batch norm in evaluation mode) runs over `batches` once, and every
    quantizer in it gathers a histogram of the magnitudes it sees, on the model's device. With several processes each
    brings its own batches, as many as the others; the statistics are added, so all get the same ranges.

    Args:
        batches: normalised images, (N, 3, S, S), on the model's device.

    Raises:
        UserError: no batch, or a range that is not finite (the network has diverged).
    """
    from .histogram import Histogram, Maximum, merge_over_processes

    settings, found = model.config.quantization, quantizers(model)
    method = settings["calibration_method"]
    activations = {name: q for name, q in found.items() if not name.endswith(".weight")}
    statistics = []
    for quantizer in activations.values():
        quantizer._calibrator = Maximum() if method == "max" else Histogram(settings["num_bits"])
        statistics.append(quantizer._calibrator)
        quantizer.enable_calib()
    for quantizer in found.values():
        quantizer.disable_quant()
    was_training, images, started = model.training, 0, time.perf_counter()
    model.eval()
    try:
        for batch in batches:
            model(pixel_values=batch)
            images += len(batch)
        if not images:
            raise UserError("there is no image to calibrate on; give --calibration_batches at least 1.")
        images = _sum_over_processes(images, batch.device)
        merge_over_processes(statistics)
        for quantizer, entry in zip(activations.values(), statistics):
            _set(quantizer, entry.amax(method, settings["calibration_percentile"]))
        calibrate_weights(model)
    finally:
        for quantizer in found.values():
            quantizer.disable_calib()
            quantizer.enable_quant()
            quantizer._calibrator = None
        model.train(was_training)
    bad = [name for name, quantizer in found.items() if not quantizer._amax.isfinite().all()]
    if bad:
        raise UserError(f"{len(bad)} quantizers saw NaN or infinity, e.g. {bad[0]}: the model has diverged.")
    settings["calibration_pictures"] = images
    silent = tuple(name for name, quantizer in activations.items() if quantizer._amax == 0)
    return Calibration(images, time.perf_counter() - started, silent)


@torch.no_grad()
def calibrate_weights(model) -> None:
    """Sets every weight quantizer's range to the largest magnitude of each output channel."""
    for name, quantizer in quantizers(model).items():
        if name.endswith(".weight"):
            weight = model.get_parameter(name)
            _set(quantizer, weight.detach().abs().amax(tuple(range(1, weight.dim())), keepdim=True))


def _set(quantizer, amax: torch.Tensor) -> None:
    quantizer._amax.copy_(amax)


def _sum_over_processes(count: int, device: torch.device) -> int:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return count
    total = torch.tensor(count, device=device)
    dist.all_reduce(total)
    return int(total)
