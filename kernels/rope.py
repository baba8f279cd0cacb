"""Rotary position embedding (https://arxiv.org/abs/2104.09864) in half and interleaved layout, forward and backward.

Each pair of a head is turned by its position's angle: one read and one write of x, in float32; the backward pass turns
back. Not supported: float64, and gradients of the tables.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ._common import await_previous, cdiv, launches_early, new_like, next_power_of_2
from ._launch import Variant

TILE = 1024  # pairs of a program of 4 warps


@triton.jit
def _rope_kernel(
    X, Cos, Sin, Y, batch_stride, token_stride, head_stride, table_batch_stride, table_stride,
    n_rows, length, heads, half,
    BACK: tl.constexpr, INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """X: (batch, length, heads, 2 half) with strides but the last; Cos, Sin: (batch, length, half) with
    strides but the last, table_batch_stride 0 where rows have the same positions; Y: as X, contiguous.

    ROWS heads of tokens a program, HALF >= half.
    """
    await_previous(EARLY)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    token, head = row // heads, row % heads
    batch, position = token // length, token % length
    x_row = X + batch * batch_stride + position * token_stride + head * head_stride
    angle = batch * table_batch_stride + position * table_stride
    y_row = Y + row * (2 * half)
    pair = tl.arange(0, HALF)[None, :]
    inside = (row < n_rows) & (pair < half)
    cos = tl.load(Cos + angle + pair, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(Sin + angle + pair, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        sin = -sin
    if INTERLEAVED:  # whole vectors are read and written, and pairs parted in registers
        element = tl.arange(0, 2 * HALF)[None, :]
        both = (row < n_rows) & (element < 2 * half)
        x = tl.load(x_row + element, mask=both, other=0.0).to(tl.float32)
        first, second = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
        turned = tl.join(first * cos - second * sin, second * cos + first * sin)
        y = tl.reshape(turned, (ROWS, 2 * HALF))
        tl.store(y_row + element, y.to(Y.dtype.element_ty), mask=both)
    else:
        first = tl.load(x_row + pair, mask=inside, other=0.0).to(tl.float32)
        second = tl.load(x_row + half + pair, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_row + pair, (first * cos - second * sin).to(Y.dtype.element_ty), mask=inside)
        tl.store(y_row + half + pair, (second * cos + first * sin).to(Y.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=256)
def _variant(head_dim: int, interleaved: bool, back: bool, early: bool) -> tuple[int, Variant]:
    """Heads of tokens that a program turns, and the kernel that does."""
    block = max(2, next_power_of_2(head_dim // 2))
    rows = max(1, TILE // block)
    flags = {"BACK": back, "INTERLEAVED": interleaved, "EARLY": early}
    return rows, Variant(_rope_kernel, **flags, ROWS=rows, HALF=block, num_warps=4)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, back: bool) -> Tensor:
    y = new_like(x)
    if y.numel() == 0:
        return y
    x = x if x.stride(3) == 1 else x.contiguous()
    batch, length, heads, head_dim = x.shape
    n_rows, (rows, kernel) = batch * length * heads, _variant(head_dim, interleaved, back, launches_early(x.device))
    if cos.stride() != sin.stride() or cos.stride(-1) != 1:  # halves of wider tables are read where they are
        cos, sin = cos.contiguous(), sin.contiguous()
    strides = *x.stride()[:3], cos.stride(0) if cos.dim() == 3 else 0, cos.stride(-2)
    kernel.launch((cdiv(n_rows, rows),), x, cos, sin, y, *strides, n_rows, length, heads, head_dim // 2)
    return y


def rope_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (B, T, H, D), cos, sin: (T, D/2) or (B, T, D/2), of any strides -> as x, contiguous."""
    return _rotate(x, cos, sin, interleaved, back=False)


def rope_bwd(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """-> dx, contiguous."""
    return _rotate(dy, cos, sin, interleaved, back=True)


def rope_limits(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why the kernel cannot give what is asked."""
    return "gives cos and sin no gradient; detach them" if cos.requires_grad or sin.requires_grad else None
