"""Layer norm and RMS norm over rows, of x or of x + residual, forward and backward.

Layer norm: https://arxiv.org/abs/1607.06450; RMS norm: https://arxiv.org/abs/1910.07467. One family of kernels, of
which flags leave out what an op has not. Forward, a row is read for its statistics and, from cache, again for its
result: few registers, so many rows in flight. Backward, dx needs one row, while the parameters' gradients are sums over
all of them, taken without atomics: each program keeps its own, and a second kernel adds those up in a fixed order, so
that results are bitwise repeatable. Arithmetic and the saved statistics are float32. Not supported: float64.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import await_previous, cdiv, launches_early, multiprocessors, new_like, next_power_of_2, rows_apart
from ._launch import Variant
from ._sums import sum_partials

# Up to this row length the forward kernel reads a row once, into registers.
SHORT_ROW: tl.constexpr = tl.constexpr(1024)
# Up to this one the backward kernel does; above it, it works on blocks of columns, and a kernel before it takes the
# sums along rows.
MAX_HELD_ROW = 8192


class Tile(NamedTuple):
    """What a program works on at a time, and the warps it does it with."""

    rows: int
    block: int
    warps: int


@triton.jit
def _read(X, Residual, col, inside, HAS_RESIDUAL: tl.constexpr, EVICTION: tl.constexpr):
    """Elements of what is normalised: x, or x + residual rounded to their dtype."""
    x = tl.load(X + col, mask=inside, other=0.0, eviction_policy=EVICTION)
    if HAS_RESIDUAL:
        residual = tl.load(Residual + col, mask=inside, other=0.0, eviction_policy=EVICTION)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(x.dtype)
    return x


@triton.jit
def _norm_fwd_kernel(
    X, Residual, W, B, Y, Total, Mean, Rstd, x_stride, residual_stride, n_rows, eps, offset,
    N: tl.constexpr, RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """X, Residual: (n_rows, N) with row strides; W, B: (N,); Y, Total: (n_rows, N), contiguous; Mean, Rstd: (n_rows,).

    A lane's sums for the variance are of differences from its own first element: those of squares would lose their
    digits where the mean is large, and a mean taken first would cost one more reading of the row.
    """
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    X += row * x_stride
    Residual += row * residual_stride
    Y += row * N
    Total += row * N
    lane = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (lane < N)
    piece = _read(X, Residual, lane, inside, HAS_RESIDUAL, "evict_last")
    first = piece.to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    squares = first * first if RMS else tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(BLOCK, N, BLOCK):
        col = start + lane
        inside = (row < n_rows) & (col < N)
        x = _read(X, Residual, col, inside, HAS_RESIDUAL, "evict_last").to(tl.float32)
        if not RMS:
            x = tl.where(col < N, x - first, 0.0)
            sums += x
        squares += x * x
    mean = 0.0
    error = 0.0
    if not RMS:
        count = ((N - lane + BLOCK - 1) // BLOCK).to(tl.float32)  # of a lane's elements
        mean = tl.sum(count * first + sums, 1)[:, None] / N
        centred = first - mean
        if X.dtype.element_ty == tl.float32:  # what the sum rounded off, where inputs are fine enough to show it
            error = tl.sum(count * centred + sums, 1)[:, None] / N
            centred -= error
        squares += centred * (2.0 * sums + count * centred)
        tl.store(Mean + row, mean + error, mask=row < n_rows)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 1)[:, None] / N + eps))
    tl.store(Rstd + row, rstd, mask=row < n_rows)
    for start in range(0, N, BLOCK):
        col = start + lane
        inside = (row < n_rows) & (col < N)
        x = piece if N <= BLOCK else _read(X, Residual, col, inside, HAS_RESIDUAL, "evict_first")
        if HAS_RESIDUAL:
            tl.store(Total + col, x, mask=inside)
        y = ((x.to(tl.float32) - mean) - error) * rstd
        if HAS_WEIGHT:
            y *= tl.load(W + col, mask=col < N, other=0.0).to(tl.float32) + offset
        if HAS_BIAS:
            y += tl.load(B + col, mask=col < N, other=0.0).to(tl.float32)
        tl.store(Y + col, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _norm_bwd_kernel(
    DY, DTotal, X, W, Mean, Rstd, Correlation, Shift, DX, PartialW, PartialB,
    dy_stride, dtotal_stride, x_stride, n_rows, offset,
    N: tl.constexpr, RMS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (wdy - mean(wdy) - x^ * mean(wdy * x^)) + dtotal, wdy = w * dy, x^ = (x - mean) * rstd, without
    mean(wdy) for RMS norm; and sums over the program's rows of dy * x^ and dy.

    DY, DTotal, X: (n_rows, N) with row strides; DX: contiguous; Correlation, Shift: (n_rows,), the two means of each
    row, read where it is longer than BLOCK; PartialW, PartialB: (programs, N) fp32.
    """
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    col = column[None, :]
    w = 1.0
    if HAS_WEIGHT:
        w = tl.load(W + col, mask=col < N, other=0.0).to(tl.float32) + offset
    dw = tl.zeros([BLOCK], tl.float32)
    db = tl.zeros([BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < n_rows) & (col < N)
        dy = tl.load(DY + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(Rstd + row, mask=row < n_rows, other=0.0)
        if not RMS:
            x -= tl.load(Mean + row, mask=row < n_rows, other=0.0)
        x_hat = x * rstd
        wdy = dy * w
        shift = 0.0
        if BLOCK >= N:
            correlation = tl.sum(wdy * x_hat, 1)[:, None] / N
            if not RMS:
                shift = tl.sum(wdy, 1)[:, None] / N
        else:
            correlation = tl.load(Correlation + row, mask=row < n_rows, other=0.0)
            if not RMS:
                shift = tl.load(Shift + row, mask=row < n_rows, other=0.0)
        dx = (wdy - shift - x_hat * correlation) * rstd
        if HAS_RESIDUAL:
            dx += tl.load(DTotal + row * dtotal_stride + col, mask=inside, other=0.0).to(tl.float32)
        tl.store(DX + row * N + col, dx.to(DX.dtype.element_ty), mask=inside)
        if HAS_WEIGHT:
            dw += tl.sum(dy * x_hat, 0)
        if HAS_BIAS:
            db += tl.sum(dy, 0)
    partial = tl.program_id(0).to(tl.int64) * N + column
    if HAS_WEIGHT:
        tl.store(PartialW + partial, dw, mask=column < N)
    if HAS_BIAS:
        tl.store(PartialB + partial, db, mask=column < N)


@triton.jit
def _norm_bwd_row_sums_kernel(
    DY, X, W, Mean, Rstd, Correlation, Shift, dy_stride, x_stride, offset,
    N: tl.constexpr, RMS: tl.constexpr, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Correlation = mean(wdy * x^) and Shift = mean(wdy) of a row, for the kernel above."""
    row = tl.program_id(0).to(tl.int64)
    DY += row * dy_stride
    X += row * x_stride
    mean = 0.0
    if not RMS:
        mean = tl.load(Mean + row)
    rstd = tl.load(Rstd + row)
    products = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        col = start + tl.arange(0, BLOCK)
        wdy = tl.load(DY + col, mask=col < N, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + col, mask=col < N, other=0.0).to(tl.float32) + offset
        products += wdy * ((tl.load(X + col, mask=col < N, other=0.0).to(tl.float32) - mean) * rstd)
        sums += wdy
    tl.store(Correlation + row, tl.sum(products, 0) / N)
    if not RMS:
        tl.store(Shift + row, tl.sum(sums, 0) / N)


def _forward_tile(n_cols: int, rms: bool, has_residual: bool) -> Tile:
    """Short rows whole, 32 elements a lane; of others as many pieces as were measured fastest, or as divide the row
    evenly. Layer norm, whose two sums along a row wait for each other, needs more programs at once, of fewer warps;
    with a residual, that is more bytes for each sum, fewer do."""
    block = max(16, next_power_of_2(n_cols))
    if n_cols <= SHORT_ROW.value:
        return Tile(SHORT_ROW.value // block, block, 1)
    pieces = 1 if has_residual else 2 if rms else 4
    block = min(16384, block // pieces)
    divisor = n_cols & -n_cols
    if n_cols % block and divisor >= 256 and n_cols // divisor <= 2 * pieces + 1:
        block = divisor
    return Tile(1, block, block // (256 if block <= 4096 else 512))


def _backward_tile(n_cols: int) -> Tile:
    """32 elements a lane; a warp for each 256 columns, up to 8, or for 512 of a short row, so that no sum over rows
    crosses warps."""
    block = max(16, next_power_of_2(n_cols)) if n_cols <= MAX_HELD_ROW else 2048
    warps = max(1, block // 512) if block <= 1024 else min(8, block // 256)
    return Tile(1024 * warps // block, block, warps)


@functools.lru_cache(maxsize=1024)
def _forward_variant(
    n_cols: int, rms: bool, has_residual: bool, has_weight: bool, has_bias: bool, early: bool
) -> tuple[int, Variant]:
    """Rows that a program takes, and the kernel that does."""
    tile = _forward_tile(n_cols, rms, has_residual)
    return tile.rows, Variant(
        _norm_fwd_kernel, N=n_cols, RMS=rms, HAS_RESIDUAL=has_residual, HAS_WEIGHT=has_weight, HAS_BIAS=has_bias,
        ROWS=tile.rows, BLOCK=tile.block, EARLY=early, num_warps=tile.warps,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def _backward_variants(
    n_cols: int, rms: bool, has_residual: bool, has_weight: bool, has_bias: bool, stages: int
) -> tuple[Tile, Variant, Variant]:
    """What the kernel of the gradients works on, that kernel, and the one before it for the sums along long rows."""
    tile, flags = _backward_tile(n_cols), {"N": n_cols, "RMS": rms, "HAS_WEIGHT": has_weight}
    gradients = Variant(
        _norm_bwd_kernel, **flags, HAS_RESIDUAL=has_residual, HAS_BIAS=has_bias,
        ROWS=tile.rows, BLOCK=tile.block, STAGES=stages, num_warps=tile.warps,
    )  # fmt: skip
    return tile, gradients, Variant(_norm_bwd_row_sums_kernel, **flags, BLOCK=2048, num_warps=4)


def _vector(p: Tensor | None, x: Tensor) -> Tensor:
    """The parameter p, contiguous; where there is none, x, which the kernel then never reads through this pointer."""
    return x if p is None else p.contiguous()


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> y and x + residual as x, contiguous (y again where there is no residual); mean (1/std again for RMS norm) and
    1/std, (rows,) float32."""
    y = new_like(x)
    total = y if residual is None else new_like(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    rstd = x.new_empty(n_rows, dtype=torch.float32)
    mean = rstd if rms else x.new_empty(n_rows, dtype=torch.float32)
    if n_rows > 0:
        rows, apart = rows_apart(x)
        residual_rows, residual_apart = (rows, apart) if residual is None else rows_apart(residual)
        flags = (rms, residual is not None, weight is not None, bias is not None)
        per_program, kernel = _forward_variant(n_cols, *flags, launches_early(x.device))
        kernel.launch(
            (cdiv(n_rows, per_program),),
            rows, residual_rows, _vector(weight, rows), _vector(bias, rows), y, total, mean, rstd,
            apart, residual_apart, n_rows, eps, offset,
        )  # fmt: skip
    return y, total, mean, rstd


def _backward(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, offset: float,
    rms: bool, has_bias: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx as x, of which x is the sum where there is a residual; dweight, dbias (N,) float32 or None."""
    dx = new_like(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    n_sums = (weight is not None) + has_bias
    new = x.new_empty if n_rows else x.new_zeros
    sums = [new(n_cols, dtype=torch.float32) for _ in range(n_sums)]
    gradients = dx, sums[0] if weight is not None else None, sums[-1] if has_bias else None
    if n_rows == 0:
        return gradients
    (x_rows, x_apart), (dy_rows, dy_apart) = rows_apart(x), rows_apart(dy)
    dtotal_rows, dtotal_apart = (dy_rows, dy_apart) if dtotal is None else rows_apart(dtotal)
    # Rows of 8192 of three tensors, two ahead in 16 bits or one in 32, fit the 99 KB of shared memory of small GPUs.
    stages = 3 if x.element_size() == 2 else 2
    flags = (rms, dtotal is not None, weight is not None, has_bias)
    tile, kernel, row_sums = _backward_variants(n_cols, *flags, stages)
    w = _vector(weight, x_rows)
    n_blocks = cdiv(n_cols, tile.block)
    # Eight warps a multiprocessor, and 8 partials where blocks alone are as many: one long sum would round off more.
    n_partials = max(8, 8 // tile.warps * multiprocessors(x.device) // n_blocks)
    n_partials = min(n_partials, cdiv(n_rows, tile.rows))
    partials = x.new_empty((max(1, n_sums), n_partials, n_cols), dtype=torch.float32)
    correlation, shift = mean, mean
    if n_blocks > 1:
        correlation, shift = (x.new_empty(n_rows, dtype=torch.float32) for _ in range(2))
        row_sums.launch((n_rows,), dy_rows, x_rows, w, mean, rstd, correlation, shift, dy_apart, x_apart, offset)
    kernel.launch(
        (n_partials, n_blocks),
        dy_rows, dtotal_rows, x_rows, w, mean, rstd, correlation, shift, dx, partials, partials[-1],
        dy_apart, dtotal_apart, x_apart, n_rows, offset,
    )  # fmt: skip
    if n_sums:
        sum_partials(partials, sums)
    return gradients


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: (..., N); weight, bias: (N,) or None -> y as x, contiguous; mean and 1/std, (rows,) float32."""
    y, _, mean, rstd = _forward(x, None, weight, bias, eps, 0.0, False)
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, x: (..., N); mean, rstd as the forward gave them -> dx as x; dweight, dbias (N,) float32 or None."""
    return _backward(dy, None, x, weight, mean, rstd, 0.0, False, has_bias)


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x: (..., N); weight: (N,) or None -> y as x, contiguous; 1/rms, (rows,) float32."""
    y, _, _, rstd = _forward(x, None, weight, None, eps, offset, True)
    return y, rstd


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor | None]:
    """-> dx as x; dweight (N,) float32 or None."""
    dx, dw, _ = _backward(dy, None, x, weight, rstd, rstd, offset, True, False)
    return dx, dw


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> the norm of x + residual and that sum; mean and 1/std, (rows,) float32."""
    return _forward(x, residual, weight, bias, eps, 0.0, False)


def add_layer_norm_bwd(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> the gradient of x and of the residual; dweight, dbias (N,) float32 or None."""
    return _backward(dy, dtotal, total, weight, mean, rstd, 0.0, False, has_bias)


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> the norm of x + residual and that sum; 1/rms, (rows,) float32."""
    y, total, _, rstd = _forward(x, residual, weight, None, eps, offset, True)
    return y, total, rstd


def add_rms_norm_bwd(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor | None]:
    """-> the gradient of x and of the residual; dweight (N,) float32 or None."""
    dx, dw, _ = _backward(dy, dtotal, total, weight, rstd, rstd, offset, True, False)
    return dx, dw
