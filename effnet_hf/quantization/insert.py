"""From a float model to one with quantizers in it."""

from ..errors import UserError
from ..quantization_efficientnet_nv import insert_quantizers, is_float_layer, quantizers, require_modelopt


def quantize(model, **settings) -> None:
    """Puts quantizers into a float model, in place; `model.config.quantization` then says so. Calibrate it next.

    Args:
        settings: what differs from `effnet_hf.configuration.QUANTIZATION`: `placement`, `calibration_method`,
            `batch_norm`, `float_layers`, …

    Raises:
        UserError: a setting out of range, a name in `float_layers` that is no layer's, or modelopt is missing.
    """
    section = check_settings(model, settings)
    device = next(model.parameters()).device
    model._keep_in_fp32_modules_strict = set(insert_quantizers(model, section))
    model.config.quantization = section
    model.to(device)


def check_settings(model, settings: dict) -> dict:
    """Whether `quantize` would take these settings for this model; returns them completed.

    Raises:
        UserError: see `quantize`.
    """
    if model.config.quantization is not None:
        raise UserError("the model is quantized already.")
    names = [name for name, _ in model.named_modules()]
    for pattern in settings.get("float_layers", ()):
        if not any(is_float_layer(name, [pattern]) for name in names if name):
            raise UserError(f"--float_layers {pattern}: the model has no such layer; a name is e.g. {names[-1]}.")
    try:
        require_modelopt()
        return type(model.config)(quantization=settings).quantization
    except (ImportError, ValueError) as error:
        raise UserError(str(error)) from None


def set_quantizers(model, enabled: bool, only=None) -> None:
    """Switches fake quantization on or off, of all quantizers or of the names in `only`; off is the float network."""
    for name, quantizer in quantizers(model).items():
        if only is None or name in only:
            quantizer.enable() if enabled else quantizer.disable()
