"""Where quantizers stand in the network, and the layers that carry them.

A quantizer is NVIDIA Model Optimizer's `TensorQuantizer`: it rounds a tensor to `round(x * 127 / amax)`, clamps, and
scales back ("fake" quantization, so that it trains); gradients pass straight through where |x| <= amax. Its range
`_amax` is a plain buffer, so weights and ranges are one safetensors file and nothing pickled is read or written.

`PLACEMENTS` says in front of which argument of a module's `forward` one stands; `weight` and `output` are the module's
own weight and result. A quantizer is called by both: `….se.scale.gate` is the `gate` of `ScaleByGate.forward(gate, x)`.

This file travels inside every saved checkpoint: it imports only torch, and modelopt where a model is quantized.
"""

import logging
import warnings
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import wraps

import torch
from torch import nn


class ScaleByGate(nn.Module):
    """`gate * x`: gate (N, C, 1, 1), x (N, C, H, W)."""

    def forward(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return gate * x


class ResidualAdd(nn.Module):
    """`branch + identity`, both (N, C, H, W)."""

    def forward(self, branch: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        return branch + identity


class SamePad2d(nn.Module):
    """TensorFlow's "SAME" zero padding: `ceil(size / stride)` outputs, the odd pixel on the right and bottom."""

    def __init__(self, kernel_size: int, stride: int):
        super().__init__()
        self.kernel_size, self.stride = kernel_size, stride

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((size - 1) // self.stride * self.stride + self.kernel_size - size, 0)
            pads += [total // 2, total - total // 2]
        return nn.functional.pad(x, pads)


class StochasticDepth(nn.Module):
    """Drops a residual branch in training with probability `1 - survival_prob` and scales a kept one by its inverse.

    `mode="batch"` draws once for the whole batch (NVIDIA), `"row"` once per image (paper, section 4 of
    arXiv:1603.09382).
    """

    def __init__(self, survival_prob: float, mode: str):
        super().__init__()
        self.survival_prob, self.mode = survival_prob, mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        draws = x.shape[0] if self.mode == "row" else 1
        keep = x.new_empty(draws, 1, 1, 1).bernoulli_(self.survival_prob)
        return x * (keep / self.survival_prob)

    def extra_repr(self) -> str:
        return f"survival_prob={self.survival_prob:.5g}, mode={self.mode}"


class GlobalAvgPool2d(nn.AdaptiveAvgPool2d):
    """Squeeze-excite's mean over all positions: (N, C, H, W) to (N, C, 1, 1).

    Its gradient is one number per channel, and stays that: a broadcast view. torch's own writes it out at full size
    with the layout of NCHW, and the sum with the gate's channels-last gradient then reads two layouts. Same values to
    the bit. A compiler fuses both by itself.
    """

    def __init__(self):
        super().__init__(1)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        plain = torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled()
        return super().forward(input) if plain else _GlobalMean.apply(input)


class _GlobalMean(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input):
        return nn.functional.adaptive_avg_pool2d(input, 1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx, gradient):
        return (gradient / (ctx.shape[-2] * ctx.shape[-1])).expand(ctx.shape)

    @staticmethod
    def jvp(ctx, tangent):
        return nn.functional.adaptive_avg_pool2d(tangent, 1)


# NVIDIA's own (DeepLearningExamples): the sum's branch stays float, so that TensorRT fuses convolution and sum.
_NVIDIA = {
    nn.Conv2d: ("input", "weight"),
    nn.Linear: ("input", "weight"),
    nn.AdaptiveAvgPool2d: ("input",),
    GlobalAvgPool2d: ("input",),
    ScaleByGate: ("gate", "x"),
    ResidualAdd: ("identity",),
}
PLACEMENTS = {
    "nvidia": _NVIDIA,
    # ONNX Runtime's CPU kernels fuse a layer only with a quantizer right behind it, before the activation; a
    # convolution ends with its batch norm, which is folded into it on export. The classifier's logits stay float.
    "cpu": {**_NVIDIA, nn.Linear: ("input", "weight", "output"), nn.BatchNorm2d: ("output",)},
}


def _through(quantizer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`quantizer(x)`. modelopt copies a tensor that is not contiguous; a channels-last one is permuted first, so that
    it is contiguous and needs no copy."""
    # ONNX's exporter knows modelopt's own function.
    if torch.compiler.is_exporting() or (torch.jit.is_tracing() and not torch.onnx.is_in_onnx_export()):
        return _through_in_a_graph(quantizer, x)
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return quantizer(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return quantizer(x)


def _through_in_a_graph(quantizer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The same to the bit, without modelopt's looks at values, which a graph cannot have, and its call of Python."""
    if quantizer._disabled or not quantizer._if_quant:
        return x
    top = 2 ** (quantizer._num_bits - 1) - 1
    low = -top - (not quantizer._narrow_range)
    amax = quantizer._amax.detach().float()
    zero = amax <= 2.0**-24
    scale = (amax.new_tensor(top) / amax).masked_fill(zero, 0.0)  # a number over a tensor would round twice
    steps = (x.float() * scale).clamp(low, top)
    steps = steps + (steps.round() - steps).detach()  # exact, and gradients pass straight through
    return (steps / scale.masked_fill(zero, 1.0)).to(x.dtype)


class QuantizedConv2d(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = _through(self.weight_quantizer, self.weight)
        return self._conv_forward(_through(self.input_quantizer, input), weight, self.bias)


class QuantizedLinear(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = _through(self.weight_quantizer, self.weight)
        output = nn.functional.linear(_through(self.input_quantizer, input), weight, self.bias)
        return output if self.output_quantizer is None else _through(self.output_quantizer, output)


class QuantizedAdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(_through(self.input_quantizer, input))


class QuantizedGlobalAvgPool2d(QuantizedAdaptiveAvgPool2d, GlobalAvgPool2d):
    pass


class QuantizedScaleByGate(ScaleByGate):
    def forward(self, gate: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return super().forward(_through(self.gate_quantizer, gate), _through(self.x_quantizer, x))


class QuantizedResidualAdd(ResidualAdd):
    def forward(self, branch: torch.Tensor, identity: torch.Tensor) -> torch.Tensor:
        return super().forward(branch, _through(self.identity_quantizer, identity))


class QuantizedBatchNorm2d(nn.BatchNorm2d):
    """Also the frozen form: always in evaluation mode, so its statistics stay what they were."""

    def train(self, mode: bool = True):
        return super().train(mode and not self.frozen)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = super().forward(input)
        return output if self.output_quantizer is None else _through(self.output_quantizer, output)


class FoldedBatchNorm(nn.Module):
    """What is left of a batch norm whose scale and shift went into the convolution before it."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self.output_quantizer is None else _through(self.output_quantizer, input)


_QUANTIZED = {
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
    nn.AdaptiveAvgPool2d: QuantizedAdaptiveAvgPool2d,
    GlobalAvgPool2d: QuantizedGlobalAvgPool2d,
    ScaleByGate: QuantizedScaleByGate,
    ResidualAdd: QuantizedResidualAdd,
    nn.BatchNorm2d: QuantizedBatchNorm2d,
    FoldedBatchNorm: FoldedBatchNorm,
}


def insert_quantizers(model: nn.Module, quantization: dict | None) -> list[str]:
    """Turns the layers of `model` into quantized ones, in place, as `config.quantization` describes; weights stay.

    The new quantizers' ranges are NaN until they are calibrated or loaded. Modules that carry quantizers already are
    left alone. Returns the names that quantizers have within their modules.

    Raises:
        ImportError: modelopt is not installed.
    """
    if quantization is None:
        return []
    make_quantizer = _quantizer_maker(quantization)
    ports = PLACEMENTS[quantization["placement"]]
    batch_norm = quantization["batch_norm"]
    if batch_norm == "folded":
        for module in model.modules():
            if type(getattr(module, "bn", None)) is nn.BatchNorm2d:
                fold_into_convolution(module)
                del module.bn.output_quantizer  # not decided yet
    for name, module in list(model.named_modules()):
        kind = type(module)
        if kind not in _QUANTIZED or hasattr(module, "output_quantizer"):
            continue
        wanted = ports.get(nn.BatchNorm2d if kind is FoldedBatchNorm else kind, ())
        if is_float_layer(name, quantization["float_layers"]):
            wanted = ()
        elif name.endswith("classifier"):
            wanted = tuple(port for port in wanted if port != "output")
        frozen = kind is nn.BatchNorm2d and batch_norm == "frozen"
        if not wanted and not frozen and kind is not FoldedBatchNorm:
            continue
        module.__class__ = _QUANTIZED[kind]
        module.register_module("output_quantizer", None)
        for port in wanted:
            shape = ()
            if port == "weight":
                shape = (module.weight.shape[0], *[1] * (module.weight.dim() - 1))
            module.register_module(f"{port}_quantizer", make_quantizer(port, shape, module))
        if isinstance(module, QuantizedBatchNorm2d):
            module.frozen = frozen
            module.train(module.training)
    return sorted({f"{name.rsplit('.', 1)[-1]}_quantizer" for name in quantizers(model)})


def is_float_layer(name: str, patterns: list[str]) -> bool:
    """Whether a module's name is meant by one of `patterns` (shell wildcards, with or without `efficientnet.`)."""
    name = name.removeprefix("efficientnet.")
    return any(fnmatchcase(name, pattern.removeprefix("efficientnet.")) for pattern in patterns)


def quantizers(model: nn.Module) -> dict[str, nn.Module]:
    """Every quantizer by its name, `module.port`, in the network's order."""
    return {
        f"{name}.{port}" if name else port: quantizer
        for name, module in model.named_modules()
        for port, quantizer in _own_ports(module)
    }


def uncalibrated(model: nn.Module) -> list[str]:
    """Names of the quantizers that have no range yet."""
    return [name for name, quantizer in quantizers(model).items() if not quantizer._amax.isfinite().all()]


@torch.no_grad()
def fold_into_convolution(block: nn.Module) -> None:
    """Moves the scale and shift of `block.bn` into `block.conv` and leaves a [`FoldedBatchNorm`] in its place.

    With k = gamma / sqrt(var + eps): weight * k, bias = beta - mean * k, computed in float64 and rounded once. A weight
    quantizer's range, one value per output channel, is multiplied by |k|, so that no weight changes its integer.
    """
    conv, bn = block.conv, block.bn
    mean, variance = (tensor.to(bn.weight.device) for tensor in (bn.running_mean, bn.running_var))  # from meta, too
    scale = bn.weight.double() * (variance.double() + bn.eps).rsqrt()
    shift = bn.bias.double() - mean.double() * scale
    per_channel = scale.view(-1, *[1] * (conv.weight.dim() - 1))
    conv.weight.copy_(conv.weight.double() * per_channel)
    if hasattr(conv, "weight_quantizer"):
        amax = conv.weight_quantizer._amax
        amax.copy_(amax.double() * per_channel.abs())
    conv.bias = nn.Parameter(shift.to(conv.weight.dtype), requires_grad=conv.weight.requires_grad)
    folded = FoldedBatchNorm()
    folded.train(bn.training)
    folded.register_module("output_quantizer", getattr(bn, "output_quantizer", None))
    block.bn = folded


def may_be_tuple(func: Callable) -> Callable:
    """A forward's decorator: tuples for `return_dict=False`, passed or in the configuration, and for its `torchscript`,
    which transformers' `can_return_tuple` forgets.

    torch.fx, and with it `transformers.utils.fx`, traces such a forward for pixel values alone.

    Raises:
        NotImplementedError: torch.fx is to trace it with other arguments than these.
    """

    @wraps(func)
    def wrapper(self, *args, **kwargs):
        if not isinstance(kwargs, dict):  # torch.fx calls without stars: its arguments are our first locals, in order
            given = {**locals()}
            del given["self"], given["func"]
            pixel_values, *others, _ = given.values()
            if any(other is not None for other in others):
                raise NotImplementedError(
                    f"torch.fx traces {type(self).__name__} for pixel values alone: name its other arguments with None "
                    "in concrete_args, or use torch.export.export(model, (images,))."
                )
            args, kwargs = (pixel_values,), {}
        return_dict = kwargs.pop("return_dict", None)
        if return_dict is None:
            return_dict = self.config.return_dict
            torchscript = getattr(self.config, "torchscript", False)  # gone in transformers 5
            return_dict = return_dict and not torchscript
        output = func(self, *args, **kwargs)
        return output if return_dict else output.to_tuple()

    return wrapper


def _own_ports(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        if name.endswith("_quantizer"):
            yield name.removesuffix("_quantizer"), child


def _quantizer_maker(quantization: dict):
    attributes, quantizer_class = require_modelopt()
    settings = {"num_bits": quantization["num_bits"], "narrow_range": quantization["narrow_range"]}
    # No gradient to what is clamped, as in NVIDIA's original library.
    per_tensor, per_channel = (attributes(**settings, axis=axis, pass_through_bwd=False) for axis in (None, 0))

    def make(port: str, shape: tuple, module: nn.Module) -> nn.Module:
        quantizer = quantizer_class(per_channel if port == "weight" else per_tensor)
        owner = next(module.parameters(), None)
        device = None if owner is None else owner.device
        quantizer.register_buffer("_amax", torch.full(shape, float("nan"), device=device))
        return quantizer.train(module.training)

    return make


def require_modelopt() -> tuple:
    """modelopt's description of a quantizer, and its quantizer. Imported late: that takes seconds."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # it tells everyone that there is no GPU
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from modelopt.torch.quantization.config import QuantizerAttributeConfig
            from modelopt.torch.quantization.nn import TensorQuantizer
    except ImportError as error:
        raise ImportError(
            "This model is quantized and needs NVIDIA's Model Optimizer:"
            f" pip install nvidia-modelopt requests ({error})."
        ) from error
    return QuantizerAttributeConfig, TensorQuantizer
