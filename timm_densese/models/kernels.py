"""Triton kernels for dense blocks on a GPU, which read feature maps less often than operators do.

A feature map (B, C, H, W) in channels_last is a matrix of pixels and channels, whose rows may be apart: some channels
of a wider map. Norms and sums compute in float32, and sums are added in an order that does not change.

Statistics of C channels are a tensor (5, C) of float32: mean, unbiased variance, 1 / std, and the scale and the shift
that make of x what the norm makes of it.
"""
from typing import Any, Optional, Tuple

import torch
import triton
import triton.language as tl

__all__ = [
    'MOST_OUTPUTS', 'affine', 'affine_backward', 'affine_conv', 'affine_conv_backward', 'affine_conv_norm',
    'norm_relu_backward', 'normalise', 'normalise_backward']


@triton.jit
def _load(x, rows, columns, M, C, stride):
    """A tile of a feature map, in float32; 0 outside."""
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    return tl.load(x + rows[:, None] * stride + columns[None, :], mask, 0).to(tl.float32)


@triton.jit
def _store(x, tile, rows, columns, M, C, stride):
    mask = (rows < M)[:, None] & (columns < C)[None, :]
    tl.store(x + rows[:, None] * stride + columns[None, :], tile.to(x.dtype.element_ty), mask)


@triton.jit
def _load_channels(x, columns, C):
    """Numbers of a tile's channels, as a row."""
    return tl.load(x + columns, columns < C, 0).to(tl.float32)[None, :]


@triton.jit
def _relu(x):
    return tl.maximum(x, 0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _pooled_rows(rows, H, W):
    """The row of the average over 2x2 pixels that a pixel belongs to, and whether it belongs to one."""
    image, i, j = rows // (H * W), rows // W % H // 2, rows % W // 2
    return (image * (H // 2) + i) * (W // 2) + j, (i < H // 2) & (j < W // 2)


@triton.jit
def _affine_kernel(x, scale, shift, out, M, C, H, W, stride, stride_out, RELU: tl.constexpr, POOL: tl.constexpr,
                   BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    a, b = _load_channels(scale, columns, C), _load_channels(shift, columns, C)
    if POOL:  # rows are those of the output
        h, w = H // 2, W // 2
        first = (rows // (h * w) * H + rows // w % h * 2) * W + rows % w * 2
        first = tl.where(rows < M, first, 0)
        y = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
        for i in tl.static_range(2):
            for j in tl.static_range(2):
                y += _relu(_load(x, first + i * W + j, columns, M // (h * w) * H * W, C, stride) * a + b)
        y *= .25
    else:
        y = _load(x, rows, columns, M, C, stride) * a + b
        if RELU:
            y = _relu(y)
    _store(out, y, rows, columns, M, C, stride_out)


@triton.jit
def _moments(tile, rows, M):
    """Number of rows, mean and sum of squared deviations of a tile's columns; rows from M on do not count."""
    n = tl.sum((rows < M).to(tl.float32), 0)
    mean = tl.sum(tile, 0) / tl.maximum(n, 1)
    deviations = tl.where((rows < M)[:, None], tile - mean[None, :], 0)
    return n, mean, tl.sum(deviations * deviations, 0)


@triton.jit
def _moments_kernel(x, partial, M, C, stride, rows_each, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    split = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = 0.
    mean = tl.zeros((BLOCK_C,), tl.float32)
    squares = tl.zeros((BLOCK_C,), tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = split * rows_each + start + tl.arange(0, BLOCK_M)
        n, m, s = _moments(_load(x, rows, columns, M, C, stride), rows, M)
        total = tl.maximum(count + n, 1)
        squares += s + (m - mean) * (m - mean) * (count * n / total)
        mean += (m - mean) * (n / total)
        count += n
    tl.store(partial + split * 2 * C + columns, mean, columns < C)
    tl.store(partial + split * 2 * C + C + columns, squares, columns < C)


@triton.jit
def _stats_kernel(partial, weight, bias, stats, M, C, stride, rows_each, splits, eps, AFFINE: tl.constexpr,
                  BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr):
    """Statistics of all rows from means and squared deviations of each `rows_each`."""
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = columns < C
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        parts = start + tl.arange(0, BLOCK_S)
        n = tl.minimum(tl.maximum(M - parts.to(tl.int64) * rows_each, 0), rows_each).to(tl.float32)
        total += _load(partial, parts, columns, splits, C, 2 * C) * n[:, None]
    mean = tl.sum(total, 0) / M
    total = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        parts = start + tl.arange(0, BLOCK_S)
        n = tl.minimum(tl.maximum(M - parts.to(tl.int64) * rows_each, 0), rows_each).to(tl.float32)
        away = _load(partial, parts, columns, splits, C, 2 * C) - mean[None, :]
        total += _load(partial + C, parts, columns, splits, C, 2 * C) + away * away * n[:, None]
    squares = tl.sum(total, 0)
    invstd = 1 / tl.sqrt_rn(squares / M + eps)
    scale, shift = invstd, -mean * invstd
    if AFFINE:
        scale *= tl.load(weight + columns, inside, 0).to(tl.float32)
        shift = tl.load(bias + columns, inside, 0).to(tl.float32) - mean * scale
    tl.store(stats + columns, mean, inside)
    tl.store(stats + stride + columns, squares / tl.maximum(M - 1, 1), inside)
    tl.store(stats + 2 * stride + columns, invstd, inside)
    tl.store(stats + 3 * stride + columns, scale, inside)
    tl.store(stats + 4 * stride + columns, shift, inside)


@triton.jit
def _load_grad(grad, x, stats, rows, columns, M, C, stride_grad, stride_x, stride_stats, ACTIVATED: tl.constexpr):
    """Gradient of what a norm gave and what it normalised; where activated, the gradient before ReLU."""
    g = _load(grad, rows, columns, M, C, stride_grad)
    x_hat = _load(x, rows, columns, M, C, stride_x)
    if ACTIVATED:  # else x is normalised already
        scale = _load_channels(stats + 3 * stride_stats, columns, C)
        g = tl.where(x_hat * scale + _load_channels(stats + 4 * stride_stats, columns, C) <= 0, 0, g)
        invstd = _load_channels(stats + 2 * stride_stats, columns, C)
        x_hat = (x_hat - _load_channels(stats, columns, C)) * invstd
    return g, x_hat


@triton.jit
def _grad_sums_kernel(grad, x, stats, partial, M, C, stride_grad, stride_x, stride_stats, rows_each,
                      ACTIVATED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    split = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = split * rows_each + start + tl.arange(0, BLOCK_M)
        g, x_hat = _load_grad(
            grad, x, stats, rows, columns, M, C, stride_grad, stride_x, stride_stats, ACTIVATED)
        sums += g
        products += g * x_hat
    tl.store(partial + split * 2 * C + columns, tl.sum(sums, 0), columns < C)
    tl.store(partial + split * 2 * C + C + columns, tl.sum(products, 0), columns < C)


@triton.jit
def _norm_backward_kernel(grad, x, stats, partial, sums, out, M, C, stride_grad, stride_x, stride_stats, stride_out,
                          splits, rows_each, ACTIVATED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr,
                          BLOCK_C: tl.constexpr):
    split = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    parts = tl.arange(0, BLOCK_S)
    first = tl.sum(_load(partial, parts, columns, splits, C, 2 * C), 0)
    second = tl.sum(_load(partial + C, parts, columns, splits, C, 2 * C), 0)
    if split == 0:
        tl.store(sums + columns, first, columns < C)
        tl.store(sums + C + columns, second, columns < C)
    scale = _load_channels(stats + 3 * stride_stats, columns, C)
    for start in range(0, rows_each, BLOCK_M):
        rows = split * rows_each + start + tl.arange(0, BLOCK_M)
        g, x_hat = _load_grad(
            grad, x, stats, rows, columns, M, C, stride_grad, stride_x, stride_stats, ACTIVATED)
        y = scale * (g - first[None, :] / M - x_hat * (second[None, :] / M))
        _store(out, y, rows, columns, M, C, stride_out)


@triton.jit
def _affine_backward_kernel(grad, x, scale, shift, out, partial, M, C, H, W, stride_grad, stride_x, stride_out,
                            rows_each, POOL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    split = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    a, b = _load_channels(scale, columns, C), _load_channels(shift, columns, C)
    sums = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = split * rows_each + start + tl.arange(0, BLOCK_M)
        x_hat = _load(x, rows, columns, M, C, stride_x)
        if POOL:
            pooled, belongs = _pooled_rows(rows, H, W)
            g = _load(grad, tl.where((rows < M) & belongs, pooled, M), columns, M, C, stride_grad) * .25
        else:
            g = _load(grad, rows, columns, M, C, stride_grad)
        g = tl.where(x_hat * a + b <= 0, 0, g)
        sums += g
        products += g * x_hat
        _store(out, g * a, rows, columns, M, C, stride_out)
    tl.store(partial + split * 2 * C + columns, tl.sum(sums, 0), columns < C)
    tl.store(partial + split * 2 * C + C + columns, tl.sum(products, 0), columns < C)


@triton.jit
def _affine_conv_kernel(x, scale, shift, weight, bias, out, partial, M, C, N, stride, BIAS: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    outputs = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, C, BLOCK_C):
        columns = start + tl.arange(0, BLOCK_C)
        a, b = _load_channels(scale, columns, C), _load_channels(shift, columns, C)
        y = _relu(_load(x, rows, columns, M, C, stride) * a + b)
        w = tl.load(weight + outputs[None, :] * C + columns[:, None],
                    (outputs < N)[None, :] & (columns < C)[:, None], 0)
        total = tl.dot(y.to(out.dtype.element_ty), w.to(out.dtype.element_ty), total)
    if BIAS:
        total = _relu(total + _load_channels(bias, outputs, N))
    else:
        total = total.to(out.dtype.element_ty).to(tl.float32)  # statistics of what is stored
        _, mean, squares = _moments(tl.where((rows < M)[:, None], total, 0), rows, M)
        tl.store(partial + block * 2 * N + outputs, mean, outputs < N)
        tl.store(partial + block * 2 * N + N + outputs, squares, outputs < N)
    _store(out, total, rows, outputs, M, N, N)


@triton.jit
def _affine_conv_backward_kernel(grad, x, scale, shift, weight, total, partial, M, C, N, stride_x, stride_total,
                                 rows_each, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)  # neighbours read the same gradient
    split = tl.program_id(1).to(tl.int64)
    outputs = tl.arange(0, BLOCK_N)
    a, b = _load_channels(scale, columns, C), _load_channels(shift, columns, C)
    of_weight = (outputs < N)[:, None] & (columns < C)[None, :]
    w = tl.load(weight + outputs[:, None] * C + columns[None, :], of_weight, 0).to(x.dtype.element_ty)
    # With y = scale * x + shift, all that is summed over pixels follows from two products: of the gradient with x where
    # y > 0, and with 1 there.
    times_x = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    times_1 = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, rows_each, BLOCK_M):
        rows = split * rows_each + start + tl.arange(0, BLOCK_M)
        x_hat = _load(x, rows, columns, M, C, stride_x)
        g = tl.load(grad + rows[:, None] * N + outputs[None, :], (rows < M)[:, None] & (outputs < N)[None, :], 0)
        off = x_hat * a + b <= 0
        times_x = tl.dot(tl.trans(g), tl.where(off, 0, x_hat).to(g.dtype), times_x)
        times_1 = tl.dot(tl.trans(g), tl.where(off, 0., 1.).to(g.dtype), times_1)
        y = tl.where(off, 0, tl.dot(g, w)) * a + _load(total, rows, columns, M, C, stride_total)
        _store(total, y, rows, columns, M, C, stride_total)
    partial += split * (N + 2) * C
    tl.store(partial + outputs[:, None] * C + columns[None, :], times_x * a + times_1 * b, of_weight)
    tl.store(partial + N * C + columns, tl.sum(times_1 * w, 0), columns < C)
    tl.store(partial + (N + 1) * C + columns, tl.sum(times_x * w, 0), columns < C)


# The fastest of those tried on an H200.
_CONV = {'BLOCK_M': 128, 'BLOCK_C': 64, 'num_warps': 4, 'num_stages': 3}
_CONV_BACKWARD = {'BLOCK_M': 128, 'BLOCK_C': 32, 'num_warps': 4, 'num_stages': 2}
_POINTWISE = {'BLOCK_M': 64, 'num_warps': 4}
_SUMS = {'BLOCK_M': 256, 'num_warps': 8}
_PROGRAMS = 528
_PROGRAMS_BACKWARD = 1056
_MOST_SPLITS = 128  # of sums that other programs add up
_MOST_STATS = 512  # that a program reads at a time
MOST_OUTPUTS = 256  # of a convolution, whose backward pass holds its weights' gradients in registers


# Python's own arithmetic: Triton's takes microseconds, and a step asks thousands of times.


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The next power of 2, as the sides of tiles are."""
    return 1 << (n - 1).bit_length()


def _matrix(x: torch.Tensor) -> Tuple[int, int, int]:
    """Pixels, channels, and how far apart the pixels are."""
    b, c, h, w = x.shape
    return b * h * w, c, _stride(x)


def _stride(x: torch.Tensor) -> int:
    """How far apart pixels are.

    Raises:
        ValueError: It is not in channels_last, or some channels of what is.
    """
    (b, c, h, w), strides = x.shape, x.stride()
    # That of the last dimension that has two: where there is one, its stride may be anything.
    stride = strides[3] if w > 1 else strides[2] if h > 1 else strides[0]
    for n, found, expected in zip((b, c, h), strides, (h * w * stride, 1, w * stride), strict=False):
        if n > 1 and found != expected:
            raise ValueError(f'Kernels read features in channels_last, not those of strides {strides}.')
    return stride


def _tiles(C: int) -> Tuple[int, int]:
    """Channels of a tile, and how many tiles make C."""
    block = min(64, max(16, _power_of_2(C)))
    return block, _ceil_div(C, block)


def _split(M: int, block: int, most: int) -> Tuple[int, int]:
    """Rows for each program, in whole blocks, and how many programs, at most so many, that makes."""
    each = _ceil_div(_ceil_div(M, most), block) * block
    return each, _ceil_div(M, each)


def _dense(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    """Give weights, which people cut from others, such that kernels can read them."""
    return x if x is None else x.flatten(1).contiguous() if x.ndim > 1 else x.contiguous()


def _empty(shape: Any, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def _float32(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def affine(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        out: torch.Tensor,
        relu: bool = True,
        pool: bool = False,
) -> torch.Tensor:
    """Compute relu(scale * x + shift) into `out`; without ReLU, or averaged over 2x2 pixels."""
    (_, C, stride), (M, _, stride_out) = _matrix(x), _matrix(out)
    block, tiles = _tiles(C)
    _affine_kernel[_ceil_div(M, _POINTWISE['BLOCK_M']), tiles](
        x, _dense(scale), _dense(shift), out, M, C, x.shape[2], x.shape[3], stride, stride_out, RELU=relu, POOL=pool,
        BLOCK_C=block, **_POINTWISE)
    return out


def normalise(x: torch.Tensor, eps: float, out: torch.Tensor, stats: torch.Tensor) -> None:
    """Write (x - mean) / std into `out` and the statistics (5, C) into `stats`."""
    M, C, stride = _matrix(x)
    block, tiles = _tiles(C)
    each, splits = _split(M, _POINTWISE['BLOCK_M'], _PROGRAMS)
    partial = _float32(x, splits, 2, C)
    _moments_kernel[splits, tiles](x, partial, M, C, stride, each, BLOCK_C=block, **_POINTWISE)
    _write_stats(partial, M, each, eps, stats, None, None)
    affine(x, stats[3], stats[4], out, relu=False)


def _write_stats(
        partial: torch.Tensor,
        M: int,
        each: int,
        eps: float,
        stats: torch.Tensor,
        weight: Optional[torch.Tensor],
        bias: Optional[torch.Tensor],
) -> None:
    splits, _, C = partial.shape
    _stats_kernel[(_ceil_div(C, 8),)](
        partial, _dense(weight), _dense(bias), stats, M, C, stats.stride(0), each, splits, eps,
        AFFINE=weight is not None, BLOCK_S=min(_MOST_STATS, _power_of_2(splits)), BLOCK_C=8)


def normalise_backward(grad: torch.Tensor, x_hat: torch.Tensor, stats: torch.Tensor) -> torch.Tensor:
    """Give the gradient of x from that of what `normalise` gave, x_hat."""
    return _norm_backward(grad, x_hat, stats, False)[0]


def norm_relu_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        stats: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the gradients of x, weight and bias from that of relu(norm(x))."""
    grad_x, (grad_bias, grad_weight) = _norm_backward(grad, x, stats, True)
    return grad_x, grad_weight, grad_bias


def _norm_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        stats: torch.Tensor,
        activated: bool,
) -> Tuple[torch.Tensor, torch.Tensor]:
    M, C, stride = _matrix(x)
    block, tiles = _tiles(C)
    each, splits = _split(M, _SUMS['BLOCK_M'], _MOST_SPLITS)
    partial, sums = _float32(x, splits, 2, C), _float32(x, 2, C)
    _grad_sums_kernel[splits, tiles](
        grad, x, stats, partial, M, C, _stride(grad), stride, stats.stride(0), each, ACTIVATED=activated,
        BLOCK_C=block, **_SUMS)
    each, programs = _split(M, _POINTWISE['BLOCK_M'], _ceil_div(_PROGRAMS_BACKWARD, tiles))
    out = _empty(x.shape, x)
    _norm_backward_kernel[programs, tiles](
        grad, x, stats, partial, sums, out, M, C, _stride(grad), stride, stats.stride(0), _stride(out), splits,
        each, ACTIVATED=activated, BLOCK_S=_power_of_2(splits), BLOCK_C=block, **_POINTWISE)
    return out, sums


def affine_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        pool: bool,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give the gradients of x, scale and shift from that of what `affine` gave, with ReLU."""
    M, C, stride = _matrix(x)
    block, tiles = _tiles(C)
    each, splits = _split(M, _POINTWISE['BLOCK_M'], _ceil_div(_PROGRAMS, tiles))
    partial = _float32(x, splits, 2, C)
    out = torch.empty_like(x)
    _affine_backward_kernel[splits, tiles](
        grad, x, _dense(scale), _dense(shift), out, partial, M, C, x.shape[2], x.shape[3], _stride(grad), stride,
        _stride(out), each, POOL=pool, BLOCK_C=block, **_POINTWISE)
    grad_shift, grad_scale = partial.sum(0)
    return out, grad_scale, grad_shift


def affine_conv(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
) -> torch.Tensor:
    """Compute relu(conv(relu(scale * x + shift))) for a 1x1 convolution."""
    return _affine_conv(x, scale, shift, weight, bias)[0]


def affine_conv_norm(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        eps: float,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compute conv(relu(scale * x + shift)) for a 1x1 convolution, and the statistics (5, N) of the norm after it."""
    out, partial = _affine_conv(x, scale, shift, weight, None)
    stats = _float32(x, 5, weight.shape[0])
    _write_stats(partial, _matrix(x)[0], _CONV['BLOCK_M'], eps, stats, norm_weight, norm_bias)
    return out, stats


def _affine_conv(
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        bias: Optional[torch.Tensor],
) -> Tuple[torch.Tensor, Any]:
    M, C, stride = _matrix(x)
    N = weight.shape[0]
    if not weight.shape[1] == len(scale) == len(shift) == C:
        sizes = f'weights for {weight.shape[1]}, {len(scale)} scales and {len(shift)} shifts'
        raise ValueError(f'Features of {C} channels meet {sizes}.')
    block = min(128, max(16, _power_of_2(N)))
    out = _empty((x.shape[0], N, *x.shape[2:]), x)
    blocks = _ceil_div(M, _CONV['BLOCK_M'])
    partial = _float32(x, blocks, 2, N) if bias is None else None
    _affine_conv_kernel[blocks, _ceil_div(N, block)](
        x, _dense(scale), _dense(shift), _dense(weight), _dense(bias), out, partial, M, C, N, stride,
        BIAS=bias is not None, BLOCK_N=block, **_CONV)
    return out, partial


def affine_conv_backward(
        grad: torch.Tensor,
        x: torch.Tensor,
        scale: torch.Tensor,
        shift: torch.Tensor,
        weight: torch.Tensor,
        total: torch.Tensor,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Add the gradient of x to `total`; give those of scale, shift and weight from that of the convolution's output."""
    M, C, stride = _matrix(x)
    N = weight.shape[0]
    tiles = _ceil_div(C, _CONV_BACKWARD['BLOCK_C'])
    each, splits = _split(M, _CONV_BACKWARD['BLOCK_M'], _ceil_div(_PROGRAMS_BACKWARD, tiles))
    partial = _float32(x, splits, N + 2, C)
    _affine_conv_backward_kernel[tiles, splits](
        grad, x, _dense(scale), _dense(shift), _dense(weight), total, partial, M, C, N, stride, _stride(total), each,
        BLOCK_N=max(16, _power_of_2(N)), **_CONV_BACKWARD)
    grad_weight, (grad_shift, grad_scale) = partial.sum(0).split([N, 2])
    return grad_scale, grad_shift, grad_weight.view_as(weight)
