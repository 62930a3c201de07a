"""Layers that go through the kernels where they may, and torch's way everywhere else."""

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from ..modeling_efficientnet_nv import ConvNormAct, MBConv, SqueezeExcite
from ..quantization_efficientnet_nv import GlobalAvgPool2d, ScaleByGate


try:
    from . import functions
    from .kernels import INTERPRETED
except ImportError:  # triton comes with torch for NVIDIA's and AMD's GPUs only
    functions, INTERPRETED = None, False  # type: ignore[assignment]

_MAPS = (torch.float32, torch.bfloat16, torch.float16)


def _torchs_own() -> tuple:
    """Functions of torch's that a tool replaces to watch every layer of a kind."""
    return (
        nn.Module.__call__, nn.Conv2d.forward, nn.BatchNorm2d.forward, nn.SiLU.forward, nn.Linear.forward,
        nn.functional.batch_norm, nn.functional.silu,
    )  # fmt: skip


_TORCHS_OWN = _torchs_own()


def fuse_for_gpu_training(model: nn.Module, depthwise: bool = True) -> nn.Module:
    """In place: batch norm, SiLU and squeeze-excite of a training step in fewer passes over memory, on a CUDA device
    and in channels-last. Weights, their names, configuration and mathematics stay; results differ by rounding.

    Each layer looks at every call whether it may, and goes torch's way otherwise: in evaluation mode, on a CPU, without
    triton, in NCHW or float64, with another activation, padding or batch norm (frozen, synchronized, quantized), with
    hooks on a layer that would not be called, under vmap, forward-mode derivatives and tracing. Gradients of gradients
    are torch's, too.

    Args:
        depthwise: also the convolutions, with batch norm's statistics taken while their output is written.
    """
    for layer in model.modules():
        if type(layer) is ConvNormAct:
            layer.__class__ = FusedConvNormAct
            layer.own_depthwise = depthwise
        elif type(layer) is MBConv:
            layer.__class__ = FusedMBConv
    return model


class FusedConvNormAct(ConvNormAct):
    own_depthwise: bool

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not _may_fuse(self, x):
            return super().forward(x)
        y, moments = _convolved(self, x)
        return functions.Activated.apply(y, moments, self.bn.weight, self.bn.bias, self.bn.eps)


class FusedMBConv(MBConv):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = x if self.expand is None else self.expand(x)
        norm, se = self.depthwise.bn, self.se
        if (
            se is not None
            and _is_usual(se)
            and _is_bare(self.depthwise, FusedConvNormAct)
            and _may_fuse(self.depthwise, branch)
        ):
            y, moments = _convolved(self.depthwise, branch)
            branch = functions.Gated.apply(
                y, moments, norm.weight, norm.bias, se.reduce.weight, se.reduce.bias, se.expand.weight, se.expand.bias,
                norm.eps,
            )  # fmt: skip
        else:
            branch = self.depthwise(branch)
            branch = branch if se is None else se(branch)
        branch = self.project(branch)
        if self.stochastic_depth is not None:
            branch = self.stochastic_depth(branch)
        return branch if self.add is None else self.add(branch, x)


def _convolved(layer: FusedConvNormAct, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The convolution's output, and its statistics as `functions.merged` gives them."""
    if layer.own_depthwise and _is_depthwise(layer.conv):
        weight = layer.conv.weight
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight = x.to(dtype), weight.to(dtype)
        y, partial = functions.Depthwise.apply(x, weight, layer.conv.stride[0])
    else:
        y = layer.conv(x).contiguous(memory_format=torch.channels_last)
        partial = functions.statistics(y.detach())
    return y, functions.merged(partial, layer.bn)


def _may_fuse(layer: ConvNormAct, x: torch.Tensor) -> bool:
    """Whether this call of `layer` may leave out its batch norm and activation, as modules."""
    norm = layer.bn
    return (
        functions is not None
        and layer.pad is None
        and _is_bare(layer.act, nn.SiLU)
        and _is_bare(norm, nn.BatchNorm2d)
        and norm.training
        and norm.affine
        and norm.momentum is not None
        and norm.running_mean is not None
        and norm.running_mean.dtype == norm.weight.dtype == torch.float32
        and x.dtype in _MAPS
        and x.dim() == 4
        and x.is_contiguous(memory_format=torch.channels_last)
        and 4 < x.numel() // x.shape[1]  # torch refuses batch norm of a single value
        and max(x.numel(), x.numel() // x.shape[1] * layer.conv.out_channels) < 2**31  # 32-bit addresses
        and _is_reached(x)
    )


def _is_reached(x: torch.Tensor) -> bool:
    """Whether kernels can run where `x` is, and nobody wants to see or to transform torch's own operations."""
    if torch.compiler.is_compiling():
        return x.device.type == "cuda" and not torch.compiler.is_exporting()
    here = x.device.type == "cuda" and x.get_device() == torch.cuda.current_device() or INTERPRETED
    return (
        here
        and type(x) is torch.Tensor
        and _torchs_own() == _TORCHS_OWN
        and not torch_module._has_any_global_hook()
        and not torch._C._is_tracing()
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_bare(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether it is a `kind` as torch or we wrote it, and nobody notices that it is not called."""
    return (
        module is not None
        and module.__class__ is kind
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        )
    )


def _is_depthwise(conv: nn.Module) -> bool:
    if not _is_bare(conv, nn.Conv2d) or "_conv_forward" in conv.__dict__:
        return False
    side = conv.kernel_size[0]
    return (
        conv.groups == conv.in_channels == conv.out_channels
        and conv.kernel_size in ((3, 3), (5, 5))
        and conv.stride in ((1, 1), (2, 2))
        and conv.padding == (side // 2, side // 2)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.bias is None
    )


def _is_usual(se: SqueezeExcite) -> bool:
    return (
        _is_bare(se, SqueezeExcite)
        and _is_bare(se.pool, GlobalAvgPool2d)
        and _is_bare(se.reduce, nn.Linear)
        and _is_bare(se.act, nn.SiLU)
        and _is_bare(se.expand, nn.Linear)
        and _is_bare(se.scale, ScaleByGate)
        and se.reduce.weight.dtype == se.expand.weight.dtype == torch.float32
    )
