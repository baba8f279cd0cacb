"""What the kernels of 8-bit floats share (https://arxiv.org/abs/2209.05433): rounding, and products of what is rounded.

A matrix is rounded to e4m3, or a gradient to e5m2, after it was multiplied by one power of two: a power, so that
nothing but the rounding itself is inexact. It is written as it is and transposed, as an operand of a product of 8-bit
floats must have adjacent elements where it is summed. The products are the library's and sum in float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, cdiv, next_power_of_2
from ._launch import launch
from ._sums import column_sums_and_maxima

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The largest of each is 0.875 times 2 to this.
EXPONENTS = {E4M3: 9, E5M2: 16}
TILE = {"ROWS": 64, "COLS": 64, "num_warps": 4}


class Rounded(NamedTuple):
    """A matrix (M, N) in 8 bits, with rows up to the next multiple of 16, P, which are zeros."""

    rows: Tensor
    """(P, N), or (0, N) where it was not asked for."""
    turned: Tensor
    """(N, P), or (N, 0)."""
    inverse: Tensor
    """(), float32: what was rounded, times this, is the matrix."""

    def in_format(self, dtype: torch.dtype) -> "Rounded":
        return Rounded(self.rows.to(dtype), self.turned.to(dtype), self.inverse)


@triton.jit
def fitting_scale(Maxima, n_maxima, Inverse, EXPONENT: tl.constexpr, MAXIMA: tl.constexpr):
    """The largest power of two that the largest of Maxima: (n_maxima,) bears in a format whose largest number is 0.875
    times 2^EXPONENT; Inverse gets its inverse. Not a number for infinity, which rounding would make a finite one."""
    i = tl.arange(0, MAXIMA)
    largest = tl.max(tl.load(Maxima + i, mask=i < n_maxima, other=0.0), 0)
    bits = largest.to(tl.int32, bitcast=True)
    # largest is 2^exponent times a mantissa in [0.5, 1), which must not exceed 0.875.
    power = EXPONENT - ((bits >> 23) - 126) - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.minimum(power, 126)
    if tl.program_id(0) == 0:
        tl.store(Inverse, ((127 - power) << 23).to(tl.float32, bitcast=True))
    not_finite = tl.where(largest == float("inf"), float("nan"), 0.0)
    return ((power + 127) << 23).to(tl.float32, bitcast=True) + not_finite


@triton.jit
def store_rounded(
    scaled, row, col, n_cols, padded, width, Rows, Turned, WIDE: tl.constexpr, KEEP: tl.constexpr, TURN: tl.constexpr
):
    """scaled: a tile of rows `row` and columns `col`, float32, 0 in rows past the matrix's own -> its place in Rows:
    (padded, width) and Turned: (n_cols, padded).

    What is turned is rounded to WIDE before, and to 8 bits after: Triton 3.6 turns tiles wrongly that were float32 and
    are of 8 bits.
    """
    if KEEP:
        inside = (row < padded)[:, None] & (col < n_cols)[None, :]
        tl.store(Rows + row[:, None] * width + col[None, :], scaled.to(Rows.dtype.element_ty), mask=inside)
    if TURN:
        within = (col < n_cols)[:, None] & (row < padded)[None, :]
        turned = tl.trans(scaled.to(WIDE)).to(tl.float32).to(Turned.dtype.element_ty)
        tl.store(Turned + col[:, None].to(tl.int64) * padded + row[None, :], turned, mask=within)


@triton.jit
def tile_place(n_cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Numbers of this program's rows, int64, and columns; tiles of a row of tiles follow one another."""
    n_tiles = tl.cdiv(n_cols, COLS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    return row, tl.program_id(0) % n_tiles * COLS + tl.arange(0, COLS)


@triton.jit
def _round_kernel(
    X, Maxima, Rows, Turned, Inverse, x_stride, padded, n_rows, n_cols, n_maxima,
    EXPONENT: tl.constexpr, MAXIMA: tl.constexpr, KEEP: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols) with a row stride; the rest as `fitting_scale` and `store_rounded` have it."""
    scale = fitting_scale(Maxima, n_maxima, Inverse, EXPONENT, MAXIMA)
    row, col = tile_place(n_cols, ROWS, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    x = tl.load(X + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0)
    store_rounded(
        x.to(tl.float32) * scale, row, col, n_cols, padded, n_cols, Rows, Turned, X.dtype.element_ty, KEEP, TURN
    )


def lacking(device: torch.device) -> str | None:
    """Why there can be no products of 8-bit floats on a device, or None."""
    capable = device.type != "cuda" or architecture(device) >= 89
    return None if capable else "needs compute capability 8.9: there are no products of 8-bit floats below"


def up_to_16(n: int) -> int:
    """The next multiple of 16."""
    return cdiv(n, 16) * 16


def n_tiles(n_rows: int, n_cols: int) -> int:
    """Programs for a matrix, a tile each."""
    return cdiv(n_rows, TILE["ROWS"]) * cdiv(n_cols, TILE["COLS"])


def new_rounded(like: Tensor, shape: tuple[int, int], dtype: torch.dtype, keep: bool, turn: bool) -> Rounded:
    """Memory for a matrix of `shape` to be rounded to `dtype` by kernels, whose results still need `in_format(dtype)`:
    PyTorch rounds what is float32, and what Triton's interpreter would round wrongly."""
    n_rows, n_cols = shape
    padded = up_to_16(n_rows)
    by_torch = like.dtype == torch.float32 or (not like.is_cuda and triton.knobs.runtime.interpret)
    written = torch.float32 if by_torch else dtype
    rows = torch.empty((padded if keep else 0, n_cols), dtype=written, device=like.device)
    turned = torch.empty((n_cols, padded if turn else 0), dtype=written, device=like.device)
    # A tensor of its own: the library takes no scale at an odd address.
    return Rounded(rows, turned, torch.empty((), dtype=torch.float32, device=like.device))


def rounded(x: Tensor, dtype: torch.dtype, keep: bool, turn: bool, maxima: Tensor | None = None) -> Rounded:
    """x: (M, N), not empty, unit stride in N -> it in `dtype`. `maxima`: the largest of these is that of all |x|."""
    if maxima is None:
        maxima = column_sums_and_maxima(x, False)[1]
    found = new_rounded(x, (x.shape[0], x.shape[1]), dtype, keep, turn)
    launch(
        _round_kernel, (n_tiles(*x.shape),),
        x, maxima, *found, x.stride(0), up_to_16(x.shape[0]), *x.shape, maxima.numel(),
        EXPONENT=EXPONENTS[dtype], MAXIMA=next_power_of_2(maxima.numel()), KEEP=keep, TURN=turn, **TILE,
    )  # fmt: skip
    return found.in_format(dtype)


def product(
    a: Tensor, b: Tensor, scales: tuple[Tensor, Tensor], dtype: torch.dtype, fast: bool, bias: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """a b^T + bias, of tensors in 8 bits, times both scales. fast: sums that lose bits between the tensor cores'
    instructions.

    Those keep about 14 bits of sums of 8-bit products (https://arxiv.org/abs/2412.19437, section 3.3.2), too few for
    float32, which gets a product of its own.
    """
    if dtype == torch.float32:
        y = (a.float() * scales[0]) @ (b.float() * scales[1]).t()
        y = y if bias is None else y + bias
        return y if out is None else out.copy_(y)
    bias = None if bias is None else bias.to(dtype).contiguous()  # the library reads it as if it were
    scaled_mm = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    into = {} if out is None else {"out": out}
    return scaled_mm(
        a, b.t(), scale_a=scales[0], scale_b=scales[1], bias=bias, out_dtype=dtype, use_fast_accum=fast, **into
    )
