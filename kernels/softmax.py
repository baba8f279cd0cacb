"""Softmax over rows, forward and backward.

A row of up to 32768 elements is read once and held in registers; a longer one takes two passes, the
first keeping a running maximum and sum per lane (online softmax, https://arxiv.org/abs/1805.02867). Arithmetic is
float32. What a mask or causality hides counts as -inf and gets 0. Not supported: float64, softmax over any dimension
but the last.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ._common import MAX_ROW_IN_REGISTERS, cdiv, exponential, new_like, row_settings, rows_apart
from ._launch import Variant


@triton.jit
def _visible(Mask, row, col, mask_strides, sizes, n_cols, HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr):
    """Which columns of these rows take part. Rows number (first, second, query) of `sizes` = (second, queries)."""
    visible = col < n_cols
    second, queries = sizes
    query = row % queries
    if HAS_MASK:
        first_stride, second_stride, query_stride, col_stride = mask_strides
        outer = row // queries
        at = (outer // second) * first_stride + (outer % second) * second_stride + query * query_stride
        at += col.to(tl.int64) * col_stride  # in int64, as rows are: a transposed mask's columns lie far apart
        visible = visible & (tl.load(Mask + at, mask=visible, other=0) != 0)
    if CAUSAL:  # aligned bottom right
        visible = visible & (col <= query + (n_cols - queries))
    return visible


@triton.jit
def _softmax_fwd_kernel(
    X, Mask, Y, x_stride, mask_strides, sizes, n_rows, n_cols,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols) with row stride x_stride; Y: the same, contiguous. ROWS rows per program, BLOCK >= n_cols.

    Mask: bool, of strides `mask_strides` over (first, second, query, column); see _visible.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    seen = inside
    if HAS_MASK or CAUSAL:
        seen = (row < n_rows) & _visible(
            Mask, tl.minimum(row, n_rows - 1), col, mask_strides, sizes, n_cols, HAS_MASK, CAUSAL
        )
    x = tl.load(X + row * x_stride + col, mask=seen, other=-float("inf")).to(tl.float32)
    e = exponential(x - tl.max(x, 1)[:, None], Y.dtype.element_ty == tl.float32)
    total = tl.sum(e, 1)[:, None]
    y = tl.div_rn(e, total) if Y.dtype.element_ty == tl.float32 else e / total
    if HAS_MASK or CAUSAL:  # also a row that sees nothing, whose e is NaN
        y = tl.where(seen, y, 0.0)
    tl.store(Y + row * n_cols + col, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_fwd_long_kernel(
    X, Mask, Y, x_stride, mask_strides, sizes, n_cols,
    HAS_MASK: tl.constexpr, CAUSAL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for one row per program, walked twice in blocks."""
    row = tl.program_id(0).to(tl.int64)
    X += row * x_stride
    Y += row * n_cols
    EXACT: tl.constexpr = Y.dtype.element_ty == tl.float32
    m = tl.full([BLOCK], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        seen = _visible(Mask, row, col, mask_strides, sizes, n_cols, HAS_MASK, CAUSAL)
        x = tl.load(X + col, mask=seen, other=-float("inf")).to(tl.float32)
        larger = tl.maximum(m, x)
        # A lane that has seen only -inf keeps a sum of 0: -inf - -inf would make it NaN.
        base = tl.where(larger == -float("inf"), 0.0, larger)
        s = s * exponential(m - base, EXACT) + exponential(x - base, EXACT)
        m = larger
    row_max = tl.max(m, 0)
    r = tl.div_rn(1.0, tl.sum(s * exponential(m - row_max, EXACT), 0))
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        seen = _visible(Mask, row, col, mask_strides, sizes, n_cols, HAS_MASK, CAUSAL)
        x = tl.load(X + col, mask=seen, other=-float("inf")).to(tl.float32)
        y = exponential(x - row_max, EXACT) * r
        if HAS_MASK or CAUSAL:
            y = tl.where(seen, y, 0.0)
        tl.store(Y + col, y.to(Y.dtype.element_ty), mask=col < n_cols)


@triton.jit
def _softmax_bwd_kernel(DY, Y, DX, dy_stride, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """dx = y * (dy - sum(dy * y)). DY: (n_rows, n_cols) with row stride dy_stride; Y, DX: contiguous."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    dy = tl.load(DY + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
    y = tl.load(Y + row * n_cols + col, mask=inside, other=0.0).to(tl.float32)
    dx = y * (dy - tl.sum(dy * y, 1)[:, None])
    tl.store(DX + row * n_cols + col, dx.to(DX.dtype.element_ty), mask=inside)


@triton.jit
def _softmax_bwd_long_kernel(DY, Y, DX, dy_stride, n_cols, BLOCK: tl.constexpr):
    """The same for one row per program, walked twice in blocks."""
    row = tl.program_id(0).to(tl.int64)
    DY += row * dy_stride
    Y += row * n_cols
    DX += row * n_cols
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        dy = tl.load(DY + col, mask=col < n_cols, other=0.0).to(tl.float32)
        dot += dy * tl.load(Y + col, mask=col < n_cols, other=0.0).to(tl.float32)
    total = tl.sum(dot, 0)
    for start in range(0, n_cols, BLOCK):
        col = start + tl.arange(0, BLOCK)
        dy = tl.load(DY + col, mask=col < n_cols, other=0.0).to(tl.float32)
        y = tl.load(Y + col, mask=col < n_cols, other=0.0).to(tl.float32)
        tl.store(DX + col, (y * (dy - total)).to(DX.dtype.element_ty), mask=col < n_cols)


@functools.lru_cache(maxsize=1024)
def _forward_variant(n_cols: int, masked: bool, causal: bool) -> tuple[int, Variant]:
    """Rows of `n_cols` elements that a program takes, and the kernel that does."""
    rows, block, warps = row_settings(n_cols)
    flags = {"HAS_MASK": masked, "CAUSAL": causal, "BLOCK": block, "num_warps": warps}
    if n_cols <= MAX_ROW_IN_REGISTERS:
        return rows, Variant(_softmax_fwd_kernel, ROWS=rows, **flags)
    return 1, Variant(_softmax_fwd_long_kernel, **flags)


def softmax_fwd(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """x: (..., N); mask: bool, broadcastable to x -> y of x's shape and dtype, contiguous."""
    y = new_like(x)
    if y.numel() == 0:
        return y
    rows, apart = rows_apart(x)
    n_cols = x.shape[-1]
    n_rows = x.numel() // n_cols
    strides, sizes = (0, 0, 0, 0), (1, x.shape[-2] if x.dim() > 1 else 1)
    if mask is not None:
        mask = _four_dimensions(mask, x)
        strides, sizes = mask.stride(), mask.shape[1:3]
    per_program, kernel = _forward_variant(n_cols, mask is not None, causal)
    args = rows, rows if mask is None else mask, y, apart, strides, tuple(sizes)
    if n_cols <= MAX_ROW_IN_REGISTERS:
        kernel.launch((cdiv(n_rows, per_program),), *args, n_rows, n_cols)
    else:
        kernel.launch((n_rows,), *args, n_cols)
    return y


def _four_dimensions(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as (first, second, query, column) of x: without a copy for up to four dimensions."""
    mask = mask.expand(x.shape)
    mask = mask[(None,) * (4 - x.dim())]
    return mask if mask.dim() == 4 else mask.flatten(0, -4)


@functools.lru_cache(maxsize=1024)
def _backward_variant(n_cols: int) -> tuple[int, Variant]:
    rows, block, warps = row_settings(n_cols)
    if n_cols <= MAX_ROW_IN_REGISTERS:
        return rows, Variant(_softmax_bwd_kernel, ROWS=rows, BLOCK=block, num_warps=warps)
    return 1, Variant(_softmax_bwd_long_kernel, BLOCK=block, num_warps=warps)


def softmax_bwd(dy: Tensor, y: Tensor) -> Tensor:
    """dy, y: (..., N), y as `softmax_fwd` gave it -> dx of the same shape and dtype."""
    dx = new_like(y)
    if dx.numel() == 0:
        return dx
    rows, apart = rows_apart(dy)
    n_cols = y.shape[-1]
    n_rows = y.numel() // n_cols
    per_program, kernel = _backward_variant(n_cols)
    if n_cols <= MAX_ROW_IN_REGISTERS:
        kernel.launch((cdiv(n_rows, per_program),), rows, y, dx, apart, n_rows, n_cols)
    else:
        kernel.launch((n_rows,), rows, y, dx, apart, n_cols)
    return dx
