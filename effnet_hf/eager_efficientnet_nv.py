"""Inference in eager mode in fewer calls of Python: torch's own operations, past the modules that hold their tensors.

At batch 1 a tenth of B0's time on a CPU is the interpreter's: some 280 calls of modules, each with its looks for hooks.
Where gradients are off and nobody can be watching, a layer and a squeeze-excite therefore call torch's functions
themselves, activations overwriting their input. Whoever has a hook on one of their modules, has replaced one, or
traces, compiles or intercepts operations gets the modules' own calls, and sees the same values.

This file travels inside every saved checkpoint: it imports only torch, transformers and its flat siblings.
"""

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from transformers.activations import ACT2FN

from .configuration import EfficientNetNVConfig
from .quantization_efficientnet_nv import FoldedBatchNorm, GlobalAvgPool2d, ScaleByGate


_torch, _functional = torch._C, nn.functional
_GATE = (GlobalAvgPool2d, nn.Linear, nn.Linear, ScaleByGate)
# Activations that can overwrite their input.
_IN_PLACE = {nn.SiLU: _functional.silu, nn.ReLU: _functional.relu, nn.ReLU6: _functional.relu6}


def activation(config: EfficientNetNVConfig) -> nn.Module:
    """torch's own SiLU, which can overwrite its input; transformers' cannot."""
    return nn.SiLU() if config.hidden_act in ("silu", "swish") else ACT2FN[config.hidden_act]


def _doors() -> tuple:
    """Where a tool may stand that watches every layer of a kind: functions of torch's, which it has replaced then."""
    return (
        nn.BatchNorm2d.forward, nn.Conv2d.forward, nn.Linear.forward, nn.SiLU.forward, nn.Module.__call__,
        nn.Module._call_impl, nn.Conv2d._conv_forward, _functional.batch_norm, _functional.conv2d, _functional.linear,
        _functional.adaptive_avg_pool2d, _functional.silu, _functional.relu, _functional.relu6,
    )  # fmt: skip


_DOORS = _doors()


def layer_past_modules(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """`block.act(block.bn(block.conv(x)))` without gradients, or None where the modules have to be called."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    modules = block._modules  # past `Module.__getattr__`, here and below: it runs once a layer
    conv, norm, act = modules.get("conv"), modules.get("bn"), modules.get("act")
    if act is None and block.act is not None:  # a function in the place of the module
        return None
    if type(norm) is FoldedBatchNorm:
        if norm._modules.get("output_quantizer") is not None:
            return None
    elif type(norm) not in (nn.BatchNorm2d, nn.SyncBatchNorm):  # it may hand on its input, or keep its output
        return None
    if type(conv) is not nn.Conv2d or _is_watched(x, conv, norm, act):
        return None
    kernel, scale, statistics = conv._parameters, norm._parameters, norm._buffers
    try:
        weight, bias = kernel["weight"], kernel["bias"]
        if normalizes := type(norm) is nn.BatchNorm2d and not norm.training:
            gamma, beta, mean, variance = (
                scale["weight"], scale["bias"], statistics["running_mean"], statistics["running_var"],
            )  # fmt: skip
    except KeyError:  # tensors of another kind in their place, as in the replicas of DataParallel
        return None
    if "_conv_forward" in conv.__dict__ or conv.padding_mode != "zeros":
        x = conv(x)
    else:
        x = _functional.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if normalizes and mean is not None:
        x = torch.batch_norm(x, gamma, beta, mean, variance, False, 0.0, norm.eps, torch.backends.cudnn.enabled)
    elif type(norm) is not FoldedBatchNorm:
        x = norm(x)
    if act is None:
        return x
    return _IN_PLACE[type(act)](x, inplace=True) if type(act) in _IN_PLACE else act(x)


def gate_past_modules(block: nn.Module, x: torch.Tensor) -> torch.Tensor | None:
    """What a squeeze-excite makes of (N, C, H, W) without gradients, or None as above."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    modules = block._modules
    pool, reduce, act, expand, scale = (modules.get(name) for name in ("pool", "reduce", "act", "expand", "scale"))
    plain = (type(pool), type(reduce), type(expand), type(scale)) == _GATE and type(act) in _IN_PLACE
    if not plain or _is_watched(x, pool, reduce, act) or _is_watched(x, expand, scale, None):
        return None
    linear, inner, outer = _functional.linear, reduce._parameters, expand._parameters
    try:
        first, second = (inner["weight"], inner["bias"]), (outer["weight"], outer["bias"])
    except KeyError:  # as above
        return None
    gate = _functional.adaptive_avg_pool2d(x, 1).flatten(1)
    gate = _IN_PLACE[type(act)](linear(gate, *first), inplace=True)
    return linear(gate, *second).sigmoid_()[:, :, None, None] * x


def _is_watched(x: torch.Tensor, one: nn.Module, other: nn.Module, act: nn.Module | None) -> bool:
    # Written out: it runs once a layer, and whatever it touches has left the processor's cache since the last one.
    first, second = one.__dict__, other.__dict__
    third = second if act is None else act.__dict__
    return bool(
        first["_forward_hooks"]
        or first["_forward_pre_hooks"]
        or second["_forward_hooks"]
        or second["_forward_pre_hooks"]
        or third["_forward_hooks"]
        or third["_forward_pre_hooks"]
        or "forward" in first  # of this one instance
        or "forward" in second
        or "forward" in third
        or type(x) is not torch.Tensor
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or _doors() != _DOORS
        or _torch._is_tracing()
        or _torch._len_torch_function_stack()  # modes, which see every operation
        or _torch._len_torch_dispatch_stack()
    )
