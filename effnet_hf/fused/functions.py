"""From maps to the kernels and back: what differentiates them. Importing it needs triton."""

import torch
from torch import nn

from . import kernels


aten = torch.ops.aten
# Elements and channels of a tile, at most; an interpreter takes its time for each operation, however large.
_TILE, _CHANNELS = (2**15, 1024) if kernels.INTERPRETED else (2048, 64)


def _blocks(channels: int, widest: int) -> tuple[int, int]:
    """How many blocks of how many channels, a power of two."""
    block = min(widest, 1 << (channels - 1).bit_length())
    return -(-channels // block), block


def _by_rows(y: torch.Tensor) -> tuple[tuple[int, int], dict, torch.Tensor]:
    """Grid, sizes, and room for the moments of each program: enough of them to keep a card busy, few to merge."""
    channels, rows = y.shape[1], y.numel() // y.shape[1]
    blocks, block = _blocks(channels, _CHANNELS)
    programs = min(-(-rows * block // _TILE), max(2048 // blocks, 256))
    partial = torch.empty(programs, 3, channels, dtype=torch.float32, device=y.device)
    return (programs, blocks), {"rows": rows, "channels": channels, "ROWS": _TILE // block, "CHANNELS": block}, partial


def _by_images(y: torch.Tensor) -> tuple[tuple[int, int], dict, int]:
    """Grid, sizes, and into how many parts an image is split."""
    images, channels, height, width = y.shape
    blocks, block = _blocks(channels, _CHANNELS)
    splits = max(1, min(height * width // 1024, 8))
    sizes = {
        "pixels": height * width,
        "channels": channels,
        "SPLITS": splits,
        "ROWS": _TILE // block,
        "CHANNELS": block,
    }
    return (images * splits, blocks), sizes, splits


def statistics(y: torch.Tensor) -> torch.Tensor:
    """Moments of a channels-last map (N, C, H, W), for [`merged`]: (programs, 3, C)."""
    grid, sizes, partial = _by_rows(y)
    kernels.statistics_kernel[grid](y, partial, **sizes)
    return partial


def merged(partial: torch.Tensor, norm: nn.BatchNorm2d) -> torch.Tensor:
    """Mean and 1 / sqrt(variance + eps) of the batch, (2, C); `norm` takes note of the batch as in torch."""
    programs, _, channels = partial.shape
    blocks, block = _blocks(channels, _CHANNELS // 4)
    moments = torch.empty(2, channels, dtype=torch.float32, device=partial.device)
    if norm.num_batches_tracked is not None:  # which gradient checkpointing takes away for its second run
        norm.num_batches_tracked.add_(1)
    kernels.merge_kernel[(blocks,)](
        partial, moments, norm.running_mean, norm.running_var, norm.momentum, norm.eps, programs, channels,
        ROWS=128, CHANNELS=block,
    )  # fmt: skip
    return moments


def _applied(y, moments, weight, bias, gate=None):
    grid, sizes, _ = _by_images(y)
    output = torch.empty_like(y)
    kernels.apply_kernel[grid](
        y, moments, weight, bias, moments if gate is None else gate, output, GATED=gate is not None, **sizes
    )
    return output


def _summed(gradient, y, moments, weight, bias, sums):
    """(N, sums, C)."""
    grid, sizes, splits = _by_images(y)
    partial = torch.empty(len(y), splits, sums, y.shape[1], dtype=torch.float32, device=y.device)
    kernels.sums_kernel[grid](gradient, y, moments, weight, bias, partial, SUMS=sums, **sizes)
    return partial.sum(1)


def _gradient(gradient, y, moments, weight, bias, of_bias, of_weight, gate=None, of_pooled=None):
    grid, sizes, _ = _by_images(y)
    output = torch.empty_like(y)
    gated = (moments, moments) if gate is None else (gate, of_pooled)
    kernels.gradient_kernel[grid](
        gradient, y, moments, weight, bias, *gated, of_bias, of_weight, output, len(y), GATED=gate is not None, **sizes
    )
    return output


def _plainly(function, inputs, gradient):
    """The gradients of torch's own operations, for a backward pass that is differentiated itself."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(function(*inputs), wanted, gradient, create_graph=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]


def _is_differentiated() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Depthwise(torch.autograd.Function):
    """x (N, C, H, W), weight (C, 1, k, k), padded by k // 2, to the map and its [`statistics`]."""

    @staticmethod
    def forward(ctx, x, weight, stride):
        images, channels, height, width = x.shape
        kernel = weight.shape[-1]
        shape = (images, channels, (height - 1) // stride + 1, (width - 1) // stride + 1)
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        grid, sizes, partial = _by_rows(y)
        kernels.depthwise_kernel[grid](
            x, weight.contiguous(), y, partial, height=height, width=width, out_height=shape[2], out_width=shape[3],
            STRIDE=stride, KERNEL=kernel, **sizes,
        )  # fmt: skip
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        ctx.mark_non_differentiable(partial)
        return y, partial

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight = ctx.saved_tensors
        padding = 2 * [weight.shape[-1] // 2]
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        gradients = aten.convolution_backward(
            gradient.contiguous(memory_format=torch.channels_last), x, weight, None, 2 * [ctx.stride], padding, [1, 1],
            False, [0, 0], len(weight), wanted,
        )  # fmt: skip
        return gradients[0], gradients[1], None


class Activated(torch.autograd.Function):
    """silu(batch_norm(y)): y (N, C, H, W), moments (2, C), weight and bias (C,)."""

    @staticmethod
    def forward(ctx, y, moments, weight, bias, eps):
        ctx.save_for_backward(y, moments, weight, bias)
        ctx.eps = eps
        return _applied(y, moments, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        y, moments, weight, bias = ctx.saved_tensors
        if _is_differentiated():

            def plain(y, weight, bias):
                return nn.functional.silu(nn.functional.batch_norm(y, None, None, weight, bias, True, 0.0, ctx.eps))

            of_y, of_weight, of_bias = _plainly(plain, (y, weight, bias), gradient)
            return of_y, None, of_weight, of_bias, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        of_bias, of_weight = _summed(gradient, y, moments, weight, bias, 2).sum(0)
        of_y = _gradient(gradient, y, moments, weight, bias, of_bias, of_weight)
        return of_y, None, of_weight, of_bias, None


class Gated(torch.autograd.Function):
    """silu(batch_norm(y)) under the gate that squeeze-excite makes of it: y (N, C, H, W), moments (2, C), weight and
    bias (C,), then weights and biases of its two layers, (S, C), (S,), (C, S), (C,)."""

    @staticmethod
    def forward(ctx, y, moments, weight, bias, reduce, reduce_bias, expand, expand_bias, eps):
        grid, sizes, splits = _by_images(y)
        partial = torch.empty(len(y), splits, y.shape[1], dtype=torch.float32, device=y.device)
        kernels.pool_kernel[grid](y, moments, weight, bias, partial, **sizes)
        with torch.autocast(y.device.type, enabled=False):
            pooled = partial.sum(1) / sizes["pixels"]
            hidden = nn.functional.linear(pooled, reduce, reduce_bias)
            gate = nn.functional.linear(nn.functional.silu(hidden), expand, expand_bias).sigmoid()
        ctx.save_for_backward(
            y, moments, weight, bias, reduce, reduce_bias, expand, expand_bias, pooled, hidden, gate
        )  # fmt: skip
        ctx.eps = eps
        return _applied(y, moments, weight, bias, gate)

    @staticmethod
    def backward(ctx, gradient):
        y, moments, weight, bias, reduce, reduce_bias, expand, expand_bias, pooled, hidden, gate = ctx.saved_tensors
        if _is_differentiated():

            def plain(y, weight, bias, reduce, reduce_bias, expand, expand_bias):
                z = nn.functional.batch_norm(y, None, None, weight, bias, True, 0.0, ctx.eps)
                z = nn.functional.silu(z)
                inner = nn.functional.silu(nn.functional.linear(z.float().mean((2, 3)), reduce, reduce_bias))
                return z * nn.functional.linear(inner, expand, expand_bias).sigmoid()[:, :, None, None].to(z.dtype)

            inputs = (y, weight, bias, reduce, reduce_bias, expand, expand_bias)
            of_y, *others = _plainly(plain, inputs, gradient)
            return of_y, None, *others, None
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        by_bias, by_weight, slope, slope_normal, of_gate = _summed(gradient, y, moments, weight, bias, 5).unbind(1)
        of_expanded = aten.sigmoid_backward(of_gate, gate)
        of_hidden = aten.silu_backward(of_expanded @ expand, hidden)
        of_pooled = of_hidden @ reduce / y[0, 0].numel()  # of every pixel
        of_bias = (gate * by_bias + of_pooled * slope).sum(0)
        of_weight = (gate * by_weight + of_pooled * slope_normal).sum(0)
        of_y = _gradient(gradient, y, moments, weight, bias, of_bias, of_weight, gate, of_pooled)
        return (
            of_y, None, of_weight, of_bias, of_hidden.t() @ pooled, of_hidden.sum(0),
            of_expanded.t() @ nn.functional.silu(hidden), of_expanded.sum(0), None,
        )  # fmt: skip
