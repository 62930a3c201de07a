"""Triton kernels: batch norm, SiLU, squeeze-excite and depthwise convolution with fewer passes over memory.

A map (N, C, H, W) in channels-last memory is a matrix of N·H·W rows and C columns, and every kernel walks over tiles of
ROWS x CHANNELS of it. Maps may be float32, bfloat16 or float16; all arithmetic and all statistics are float32. With
x̂ = (y - mean) · rstd, u = weight · x̂ + bias and the gate of squeeze-excite g(mean over H and W of silu(u)):

    statistics    reads y                              mean and variance of a channel, by Welford's sums
    depthwise     reads x, writes y                    the convolution, with the same sums of what it writes
    pooled        reads y                              mean of silu(u), which is written nowhere
    activated     reads y, writes silu(u) · gate
    sums          reads y, gradient                    all that the gradients of weight, bias and gate need
    gradient      reads y, gradient, writes its own    of y; silu is computed again

Kept for the backward pass: y, the statistics, the pooled means and the gate. That is 8 passes over the output of a
depthwise convolution with squeeze-excite, where a compiler needs 11, because a gradient has to be summed for the gate,
again for batch norm, and read a third time; here one pass brings five sums, of which both follow:

    Σ d·silu(u)   Σ d·silu'(u)   Σ silu'(u)   Σ d·silu'(u)·x̂   Σ silu'(u)·x̂      d: the gradient that arrives

Without squeeze-excite it is 8 passes for both, so there only a better kernel could gain. For B0 at 224 pixels in bf16
that is 3 passes x 2 bytes x 2.3 million elements, 14 MB of the 193 MB that a compiled step moves for an image at best:
1.08 times as fast if memory alone decides. `python benchmark.py fused` prints this for any network.
"""

import triton
import triton.language as tl


@triton.jit
def _add_to_moments(count, mean, m2, values, inside):
    """Welford's step for every place of a tile: count (ROWS, 1), mean, m2 and values (ROWS, CHANNELS)."""
    count += inside.to(tl.float32)
    away = tl.where(inside, values - mean, 0.0)
    mean += away / tl.maximum(count, 1.0)
    m2 += away * (values - mean)
    return count, mean, m2


@triton.jit
def _moments_of_rows(count, mean, m2):
    """Chan's sums over the rows of a tile, of 1 or CHANNELS counts; of no rows at all they are 1, 0 and 0."""
    total = tl.maximum(tl.sum(count, axis=0), 1.0)
    whole = tl.sum(count * mean, axis=0) / total
    away = mean - whole[None, :]
    return total, whole, tl.sum(m2 + count * away * away, axis=0)


@triton.jit
def _store_moments(partial, count, mean, m2, channel, channels):
    """Into row `program_id(0)` of partial (programs, 3, C)."""
    total, mean, m2 = _moments_of_rows(count, mean, m2)
    partial += tl.program_id(0) * 3 * channels + channel
    known = channel < channels
    tl.store(partial, tl.broadcast_to(total, mean.shape), mask=known)
    tl.store(partial + channels, mean, mask=known)
    tl.store(partial + 2 * channels, m2, mask=known)


@triton.jit
def statistics_kernel(y, partial, rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    count = tl.zeros((ROWS, 1), tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < rows) & (channel < channels)[None, :]
        values = tl.load(y + row * channels + channel[None, :], mask=inside, other=0.0).to(tl.float32)
        count, mean, m2 = _add_to_moments(count, mean, m2, values, row < rows)
    _store_moments(partial, count, mean, m2, channel, channels)


@triton.jit
def depthwise_kernel(
    x, weight, y, partial, rows, channels, height, width, out_height, out_width, STRIDE: tl.constexpr,
    KERNEL: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """x (N, H, W, C), weight (C, KERNEL, KERNEL), y (N, H', W', C) of `rows` pixels."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    count = tl.zeros((ROWS, 1), tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        image = row // (out_height * out_width)
        top = row // out_width % out_height * STRIDE - KERNEL // 2
        left = row % out_width * STRIDE - KERNEL // 2
        total = tl.zeros((ROWS, CHANNELS), tl.float32)
        for i in tl.static_range(KERNEL):
            for j in tl.static_range(KERNEL):
                down, right = top + i, left + j
                inside = (row < rows) & (down >= 0) & (down < height) & (right >= 0) & (right < width) & known[None, :]
                place = ((image * height + down) * width + right) * channels + channel[None, :]
                tap = tl.load(weight + (channel * KERNEL + i) * KERNEL + j, mask=known, other=0.0).to(tl.float32)
                total += tl.load(x + place, mask=inside, other=0.0).to(tl.float32) * tap[None, :]
        rounded = total.to(y.dtype.element_ty)  # whose statistics count, as in torch
        tl.store(y + row * channels + channel[None, :], rounded, mask=(row < rows) & known[None, :])
        count, mean, m2 = _add_to_moments(count, mean, m2, rounded.to(tl.float32), row < rows)
    _store_moments(partial, count, mean, m2, channel, channels)


@triton.jit
def merge_kernel(
    partial, moments, running_mean, running_var, momentum, eps, programs, channels, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """partial (programs, 3, C) to moments (2, C): mean, 1 / sqrt(variance + eps). Moves the running statistics on."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    known = channel < channels
    count = tl.zeros((ROWS, CHANNELS), tl.float32)
    mean = tl.zeros((ROWS, CHANNELS), tl.float32)
    m2 = tl.zeros((ROWS, CHANNELS), tl.float32)
    for start in range(0, programs, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < programs) & known[None, :]
        place = partial + row * 3 * channels + channel[None, :]
        more = tl.load(place, mask=inside, other=0.0)
        away = tl.load(place + channels, mask=inside, other=0.0) - mean
        total = count + more
        share = more / tl.maximum(total, 1.0)
        mean += away * share
        m2 += tl.load(place + 2 * channels, mask=inside, other=0.0) + away * away * count * share
        count = total
    total, mean, m2 = _moments_of_rows(count, mean, m2)
    tl.store(moments + channel, mean, mask=known)
    tl.store(moments + channels + channel, 1.0 / tl.sqrt(m2 / total + eps), mask=known)
    before = tl.load(running_mean + channel, mask=known)
    tl.store(running_mean + channel, (1 - momentum) * before + momentum * mean, mask=known)
    before = tl.load(running_var + channel, mask=known)
    tl.store(running_var + channel, (1 - momentum) * before + momentum * m2 / tl.maximum(total - 1, 1.0), mask=known)


@triton.jit
def _normalized(y, inside, moments, weight, bias, channel, channels):
    """x̂ and u of a tile: y its addresses, channel (1, CHANNELS)."""
    known = channel < channels
    mean = tl.load(moments + channel, mask=known, other=0.0)
    rstd = tl.load(moments + channels + channel, mask=known, other=0.0)
    normal = (tl.load(y, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
    weight = tl.load(weight + channel, mask=known, other=0.0)
    return normal, normal * weight + tl.load(bias + channel, mask=known, other=0.0)


# The kernels below go image by image: program (image * SPLITS + part, block of channels).


@triton.jit
def pool_kernel(
    y, moments, weight, bias, partial, pixels, channels, SPLITS: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """y (N, pixels, C) to partial (N * SPLITS, C), sums of silu(u)."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    first = tl.program_id(0) // SPLITS * pixels
    for start in range(tl.program_id(0) % SPLITS * ROWS, pixels, SPLITS * ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        inside = (pixel < pixels) & (channel < channels)
        _, u = _normalized(y + (first + pixel) * channels + channel, inside, moments, weight, bias, channel, channels)
        total += tl.where(inside, u * tl.sigmoid(u), 0.0)
    place = partial + tl.program_id(0) * channels + channel
    tl.store(place, tl.sum(total, axis=0, keep_dims=True), mask=channel < channels)


@triton.jit
def apply_kernel(
    y, moments, weight, bias, gate, output, pixels, channels, GATED: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y and output (N, pixels, C), gate (N, C): silu(u), times the gate if GATED."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    image = tl.program_id(0) // SPLITS
    for start in range(tl.program_id(0) % SPLITS * ROWS, pixels, SPLITS * ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        inside = (pixel < pixels) & (channel < channels)
        place = (image * pixels + pixel) * channels + channel
        _, u = _normalized(y + place, inside, moments, weight, bias, channel, channels)
        z = u * tl.sigmoid(u)
        if GATED:
            z *= tl.load(gate + image * channels + channel, mask=channel < channels, other=0.0)
        tl.store(output + place, z.to(output.dtype.element_ty), mask=inside)


@triton.jit
def sums_kernel(
    gradient, y, moments, weight, bias, partial, pixels, channels, SUMS: tl.constexpr, SPLITS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """gradient and y (N, pixels, C) to partial (N * SPLITS, SUMS, C): Σ d·s', Σ d·s'·x̂ and, if SUMS is 5, Σ s',
    Σ s'·x̂, Σ d·s, where s = silu(u) and s' its derivative."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    by_bias = tl.zeros((ROWS, CHANNELS), tl.float32)
    by_weight = tl.zeros((ROWS, CHANNELS), tl.float32)
    slope_alone = tl.zeros((ROWS, CHANNELS), tl.float32)
    slope_normal = tl.zeros((ROWS, CHANNELS), tl.float32)
    by_gate = tl.zeros((ROWS, CHANNELS), tl.float32)
    first = tl.program_id(0) // SPLITS * pixels
    for start in range(tl.program_id(0) % SPLITS * ROWS, pixels, SPLITS * ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        inside = (pixel < pixels) & (channel < channels)
        place = (first + pixel) * channels + channel
        normal, u = _normalized(y + place, inside, moments, weight, bias, channel, channels)
        arriving = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(u)
        slope = tl.where(inside, sigmoid * (1 + u * (1 - sigmoid)), 0.0)
        by_bias += arriving * slope
        by_weight += arriving * slope * normal
        if SUMS == 5:
            slope_alone += slope
            slope_normal += slope * normal
            by_gate += arriving * u * sigmoid
    place, known = partial + tl.program_id(0) * SUMS * channels + channel, channel < channels
    tl.store(place, tl.sum(by_bias, axis=0, keep_dims=True), mask=known)
    tl.store(place + channels, tl.sum(by_weight, axis=0, keep_dims=True), mask=known)
    if SUMS == 5:
        tl.store(place + 2 * channels, tl.sum(slope_alone, axis=0, keep_dims=True), mask=known)
        tl.store(place + 3 * channels, tl.sum(slope_normal, axis=0, keep_dims=True), mask=known)
        tl.store(place + 4 * channels, tl.sum(by_gate, axis=0, keep_dims=True), mask=known)


@triton.jit
def gradient_kernel(
    gradient, y, moments, weight, bias, gate, of_pooled, of_bias, of_weight, output, images, pixels, channels,
    GATED: tl.constexpr, SPLITS: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """gradient, y, output (N, pixels, C); gate and of_pooled (N, C); of_bias and of_weight (C,): the gradient of y,
    whose statistics are functions of y, too."""
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    image = tl.program_id(0) // SPLITS
    count = images * pixels
    mean_of_bias = tl.load(of_bias + channel, mask=known, other=0.0) / count
    mean_of_weight = tl.load(of_weight + channel, mask=known, other=0.0) / count
    scale = tl.load(weight + channel, mask=known, other=0.0)
    scale *= tl.load(moments + channels + channel, mask=known, other=0.0)
    for start in range(tl.program_id(0) % SPLITS * ROWS, pixels, SPLITS * ROWS):
        pixel = start + tl.arange(0, ROWS)[:, None]
        inside = (pixel < pixels) & known
        place = (image * pixels + pixel) * channels + channel
        normal, u = _normalized(y + place, inside, moments, weight, bias, channel, channels)
        arriving = tl.load(gradient + place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            arriving *= tl.load(gate + image * channels + channel, mask=known, other=0.0)
            arriving += tl.load(of_pooled + image * channels + channel, mask=known, other=0.0)
        sigmoid = tl.sigmoid(u)
        of_u = arriving * sigmoid * (1 + u * (1 - sigmoid))
        result = scale * (of_u - mean_of_bias - normal * mean_of_weight)
        tl.store(output + place, result.to(output.dtype.element_ty), mask=inside)


INTERPRETED = not isinstance(apply_kernel, triton.JITFunction)  # TRITON_INTERPRET=1: they run on a CPU, for tests
