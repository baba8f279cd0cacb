"""Layer normalisation over rows, forward and backward (https://arxiv.org/abs/1607.06450).

The variance is that of the centred row, in float32, as are the saved mean and 1/std. Backward: dx needs one row; the
weight's and bias's gradients are sums over all rows, taken without atomics as one float32 partial per program, then
summed in a fixed order, so that results are bitwise repeatable. Not supported: float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, multiprocessors, row_settings

# Up to this row length one backward kernel holds x, dy and both partials in registers; above it, dx and the weights'
# partials are separate kernels.
MAX_FUSED_BACKWARD_ROW = 8192
MAX_DX_ROW = 16384


@triton.jit
def _layer_norm_fwd_kernel(
    X, W, B, Y, Mean, Rstd, x_stride, n_rows, n_cols, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols), row stride x_stride; W, B: (n_cols,); Y: as X, contiguous; Mean, Rstd: (n_rows,) fp32."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1)[:, None] / n_cols
    centred = tl.where(col < n_cols, x - mean, 0.0)
    if X.dtype.element_ty == tl.float32:  # what the first sum rounded off, where inputs are fine enough to show it
        error = tl.sum(centred, 1)[:, None] / n_cols
        mean += error
        centred = tl.where(col < n_cols, centred - error, 0.0)
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(centred * centred, 1)[:, None] / n_cols + eps))
    y = centred * rstd
    if HAS_WEIGHT:
        y *= tl.load(W + col, mask=col < n_cols, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(B + col, mask=col < n_cols, other=0.0).to(tl.float32)
    tl.store(Y + row * n_cols + col, y.to(Y.dtype.element_ty), mask=inside)
    tl.store(Mean + row, mean, mask=row < n_rows)
    tl.store(Rstd + row, rstd, mask=row < n_rows)


@triton.jit
def _layer_norm_fwd_long_kernel(
    X, W, B, Y, Mean, Rstd, x_stride, n_cols, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for one row per program, walked three times in blocks: mean, variance, result."""
    row = tl.program_id(0).to(tl.int64)
    X += row * x_stride
    Y += row * n_cols
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        total += tl.load(X + col, mask=col < n_cols, other=0.0).to(tl.float32)
    mean = tl.sum(total, 0) / n_cols
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x = tl.load(X + col, mask=col < n_cols, other=0.0).to(tl.float32)
        centred = tl.where(col < n_cols, x - mean, 0.0)
        squares += centred * centred
    rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / n_cols + eps))
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        y = (tl.load(X + col, mask=col < n_cols, other=0.0).to(tl.float32) - mean) * rstd
        if HAS_WEIGHT:
            y *= tl.load(W + col, mask=col < n_cols, other=0.0).to(tl.float32)
        if HAS_BIAS:
            y += tl.load(B + col, mask=col < n_cols, other=0.0).to(tl.float32)
        tl.store(Y + col, y.to(Y.dtype.element_ty), mask=col < n_cols)
    tl.store(Mean + row, mean)
    tl.store(Rstd + row, rstd)


@triton.jit
def _layer_norm_bwd_kernel(
    DY, X, W, Mean, Rstd, DX, PartialW, PartialB, dy_stride, x_stride, n_rows, n_cols,
    HAS_WEIGHT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = rstd * (wdy - mean(wdy) - x^ * mean(wdy * x^)), wdy = w * dy, x^ = (x - mean) * rstd
    and sums of dy * x^ and dy.

    DY, X: (n_rows, n_cols) with row strides; DX: contiguous; PartialW, PartialB: (programs, n_cols) fp32.
    """
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.full([1, BLOCK], 1.0, tl.float32)
    if HAS_WEIGHT:
        w = tl.load(W + col, mask=col < n_cols, other=0.0).to(tl.float32)
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(0) * ROWS, n_rows, tl.num_programs(0) * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < n_rows) & (col < n_cols)
        x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(Mean + row, mask=row < n_rows, other=0.0)
        rstd = tl.load(Rstd + row, mask=row < n_rows, other=0.0)
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        wdy = dy * w
        correlation = tl.sum(wdy * x_hat, 1)[:, None] / n_cols
        dx = (wdy - tl.sum(wdy, 1)[:, None] / n_cols - x_hat * correlation) * rstd
        tl.store(DX + row * n_cols + col, dx.to(DX.dtype.element_ty), mask=inside)
        dw += dy * x_hat
        db += dy
    partial = tl.program_id(0).to(tl.int64) * n_cols + tl.arange(0, BLOCK)
    tl.store(PartialW + partial, tl.sum(dw, 0), mask=tl.arange(0, BLOCK) < n_cols)
    tl.store(PartialB + partial, tl.sum(db, 0), mask=tl.arange(0, BLOCK) < n_cols)


@triton.jit
def _layer_norm_bwd_dx_long_kernel(
    DY, X, W, Mean, Rstd, DX, dy_stride, x_stride, n_cols, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """dx alone, for one row per program, walked twice in blocks (once, from cache, where the row fits one)."""
    row = tl.program_id(0).to(tl.int64)
    DY += row * dy_stride
    X += row * x_stride
    DX += row * n_cols
    mean = tl.load(Mean + row)
    rstd = tl.load(Rstd + row)
    total = tl.zeros([BLOCK], tl.float32)
    correlation = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x_hat = (tl.load(X + col, mask=col < n_cols, other=0.0).to(tl.float32) - mean) * rstd
        wdy = tl.load(DY + col, mask=col < n_cols, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + col, mask=col < n_cols, other=0.0).to(tl.float32)
        total += wdy
        correlation += wdy * x_hat
    mean_wdy = tl.sum(total, 0) / n_cols
    mean_correlation = tl.sum(correlation, 0) / n_cols
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        x_hat = (tl.load(X + col, mask=col < n_cols, other=0.0).to(tl.float32) - mean) * rstd
        wdy = tl.load(DY + col, mask=col < n_cols, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            wdy *= tl.load(W + col, mask=col < n_cols, other=0.0).to(tl.float32)
        dx = (wdy - mean_wdy - x_hat * mean_correlation) * rstd
        tl.store(DX + col, dx.to(DX.dtype.element_ty), mask=col < n_cols)


@triton.jit
def _layer_norm_bwd_weights_kernel(
    DY, X, Mean, Rstd, PartialW, PartialB, dy_stride, x_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Partial sums of dy * x^ and dy over the rows of program_id(1), for BLOCK columns."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dw = tl.zeros([ROWS, BLOCK], tl.float32)
    db = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(tl.program_id(1) * ROWS, n_rows, tl.num_programs(1) * ROWS):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < n_rows) & (col < n_cols)
        x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(DY + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(Mean + row, mask=row < n_rows, other=0.0)
        rstd = tl.load(Rstd + row, mask=row < n_rows, other=0.0)
        dw += dy * tl.where(inside, (x - mean) * rstd, 0.0)
        db += dy
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    partial = tl.program_id(1).to(tl.int64) * n_cols + column
    tl.store(PartialW + partial, tl.sum(dw, 0), mask=column < n_cols)
    tl.store(PartialB + partial, tl.sum(db, 0), mask=column < n_cols)


def _vector(p: Tensor | None, x: Tensor) -> Tensor:
    """The parameter p, contiguous; where there is none, x, which the kernel then never reads through this pointer."""
    return x if p is None else p.contiguous()


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: (..., N); weight, bias: (N,) or None -> y as x, contiguous; mean and 1/std, (rows,) float32."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = as_rows(x)
    n_rows, n_cols = rows.shape
    mean, rstd = torch.empty((2, n_rows), dtype=torch.float32, device=x.device)
    if n_rows == 0:
        return y, mean, rstd
    per_program, block, warps = row_settings(n_cols)
    args = (rows, _vector(weight, rows), _vector(bias, rows), y, mean, rstd, rows.stride(0))
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "BLOCK": block, "num_warps": warps}
    if n_cols <= block:
        grid = (triton.cdiv(n_rows, per_program),)
        _layer_norm_fwd_kernel[grid](*args, n_rows, n_cols, eps, ROWS=per_program, **flags)
    else:
        _layer_norm_fwd_long_kernel[(n_rows,)](*args, n_cols, eps, **flags)
    return y, mean, rstd


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dy, x: (..., N); mean, rstd as the forward gave them -> dx as x; dweight, dbias (N,) float32 or None."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x_rows, dy_rows = as_rows(x), as_rows(dy)
    n_rows, n_cols = x_rows.shape
    programs = min(8, max(2, 8192 // triton.next_power_of_2(n_cols))) * multiprocessors(x.device)
    per_program, block, warps = row_settings(n_cols, MAX_FUSED_BACKWARD_ROW)
    fused = n_cols <= MAX_FUSED_BACKWARD_ROW
    n_partials = min(programs, triton.cdiv(n_rows, per_program)) if fused else min(8, triton.cdiv(n_rows, 8))
    partial_w, partial_b = torch.empty((2, n_partials, n_cols), dtype=torch.float32, device=x.device)
    if n_rows > 0:
        w = _vector(weight, x_rows)
        strides = (dy_rows.stride(0), x_rows.stride(0))
        if fused:
            _layer_norm_bwd_kernel[(n_partials,)](
                dy_rows, x_rows, w, mean, rstd, dx, partial_w, partial_b, *strides, n_rows, n_cols,
                HAS_WEIGHT=weight is not None, ROWS=per_program, BLOCK=block, num_warps=warps,
            )  # fmt: skip
        else:
            _, block, warps = row_settings(n_cols, MAX_DX_ROW)
            _layer_norm_bwd_dx_long_kernel[(n_rows,)](
                dy_rows, x_rows, w, mean, rstd, dx, *strides, n_cols,
                HAS_WEIGHT=weight is not None, BLOCK=block, num_warps=warps,
            )  # fmt: skip
            _layer_norm_bwd_weights_kernel[(triton.cdiv(n_cols, 128), n_partials)](
                dy_rows, x_rows, mean, rstd, partial_w, partial_b, *strides, n_rows, n_cols, ROWS=8, BLOCK=128
            )
    return dx, partial_w.sum(0) if weight is not None else None, partial_b.sum(0) if has_bias else None
