"""A linear layer whose three matrix products are of 8-bit floats (https://arxiv.org/abs/2209.05433).

x and the weight are rounded to e4m3 and the gradient to e5m2, each tensor times the largest power of two that its
format holds: a power, so that nothing but the rounding itself is inexact. A first pass reads a tensor's largest
magnitude (of the gradient also its columns' sums, which are the bias's gradient), a second writes it rounded, as it is
and transposed: an operand of such a product must have adjacent elements where it is summed. The products are the
library's and sum in float32.

Supported: any number of rows; widths that are multiples of 16; compute capability 8.9 on. Not supported: float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import architecture, as_rows, cdiv, next_power_of_2
from ._launch import launch
from ._sums import column_sums_and_maxima

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# The largest of each is 0.875 times 2 to this.
EXPONENTS = {E4M3: 9, E5M2: 16}
TILE = {"ROWS": 128, "COLS": 64, "num_warps": 8}


@triton.jit
def _round_kernel(
    X, Maxima, Y, Transposed, Inverse, x_stride, t_stride, n_rows, n_cols, n_maxima,
    EXPONENT: tl.constexpr, MAXIMA: tl.constexpr, KEEP: tl.constexpr, TURN: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols) with a row stride; Maxima: (n_maxima,), whose largest is X's largest magnitude ->
    Y: as X, contiguous, if KEEP; Transposed: (n_cols, t_stride), zero from n_rows on, if TURN; Inverse: one number,
    which times what was rounded gives X."""
    i = tl.arange(0, MAXIMA)
    largest = tl.max(tl.load(Maxima + i, mask=i < n_maxima, other=0.0), 0)
    bits = largest.to(tl.int32, bitcast=True)
    # largest is 2^exponent times a mantissa in [0.5, 1), which must not exceed 0.875.
    power = EXPONENT - ((bits >> 23) - 126) - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    power = tl.minimum(power, 126)
    # Of an infinity all results are NaN: rounding alone would make it the largest number.
    not_finite = tl.where(largest == float("inf"), float("nan"), 0.0)
    scale = ((power + 127) << 23).to(tl.float32, bitcast=True) + not_finite
    if tl.program_id(0) == 0:
        tl.store(Inverse, ((127 - power) << 23).to(tl.float32, bitcast=True))
    n_tiles = tl.cdiv(n_cols, COLS)
    row = (tl.program_id(0) // n_tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    col = (tl.program_id(0) % n_tiles).to(tl.int64) * COLS + tl.arange(0, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    x = tl.load(X + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    y = (x * scale).to(Y.dtype.element_ty)
    if KEEP:
        tl.store(Y + row[:, None] * n_cols + col[None, :], y, mask=inside)
    if TURN:
        within = (col < n_cols)[:, None] & (row < t_stride)[None, :]
        tl.store(Transposed + col[:, None] * t_stride + row[None, :], tl.trans(y), mask=within)


def _round(
    rows: Tensor, dtype: torch.dtype, maxima: Tensor, inverse: Tensor, keep: bool, turn: bool
) -> tuple[Tensor | None, Tensor | None]:
    """rows: (M, N) -> it in `dtype`, if `keep`, and (N, M up to a multiple of 16) transposed, if `turn`."""
    n_rows, n_cols = rows.shape
    padded = cdiv(n_rows, 16) * 16
    # PyTorch rounds what is float32, whose tiles Triton 3.6 turns wrongly once they are of 8 bits, and what Triton's
    # interpreter would round wrongly.
    by_torch = rows.dtype == torch.float32 or (not rows.is_cuda and triton.knobs.runtime.interpret)
    written = torch.float32 if by_torch else dtype
    y = torch.empty((n_rows if keep else 0, n_cols), dtype=written, device=rows.device)
    transposed = torch.empty((n_cols, padded if turn else 0), dtype=written, device=rows.device)
    launch(
        _round_kernel, (cdiv(n_rows, TILE["ROWS"]) * cdiv(n_cols, TILE["COLS"]),),
        rows, maxima, y, transposed, inverse, rows.stride(0), padded, n_rows, n_cols, maxima.numel(),
        EXPONENT=EXPONENTS[dtype], MAXIMA=next_power_of_2(maxima.numel()), KEEP=keep, TURN=turn, **TILE,
    )  # fmt: skip
    return y.to(dtype) if keep else None, transposed.to(dtype) if turn else None


def _product(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype, fast: bool, bias: Tensor | None = None
) -> Tensor:
    """a b^T + bias. fast: sums that lose bits between the tensor cores' instructions.

    Those keep about 14 bits of sums of 8-bit products (https://arxiv.org/abs/2412.19437, section 3.3.2), too few for
    float32, which gets a product of its own.
    """
    if dtype == torch.float32:
        out = a.float() @ b.float().t() * scale_a * scale_b
        return out if bias is None else out + bias
    bias = None if bias is None else bias.to(dtype)
    product = torch._scaled_mm  # pyright: ignore[reportPrivateImportUsage]
    return product(a, b.t(), scale_a=scale_a, scale_b=scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast)


def fp8_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., N); weight: (M, N); bias: (M,) -> (..., M)."""
    return fp8_linear_kept(x, weight, bias, (False, False, False))[0]


def fp8_linear_kept(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The same, and what the gradients that `needs` names will ask for: x (N, rows padded) and weight (N, M), rounded
    and transposed, and what each is to be multiplied by, () float32."""
    rows, weight = as_rows(x), as_rows(weight)
    # Apart: the library takes no scale at an odd address.
    x_scale, w_scale = (torch.ones((), dtype=torch.float32, device=x.device) for _ in range(2))
    if rows.shape[0] == 0:
        return x.new_zeros((*x.shape[:-1], weight.shape[0])), None, None, x_scale, w_scale
    x8, x_turned = _round(rows, E4M3, column_sums_and_maxima(rows, False)[1], x_scale, True, needs[1])
    w8, w_turned = _round(weight, E4M3, column_sums_and_maxima(weight, False)[1], w_scale, True, needs[0])
    assert x8 is not None and w8 is not None
    out = _product(x8, w8, x_scale, w_scale, x.dtype, True, bias)
    return out.view(*x.shape[:-1], weight.shape[0]), x_turned, w_turned, x_scale, w_scale


def fp8_linear_bwd(
    dout: Tensor, x: Tensor | None, weight: Tensor | None, x_scale: Tensor, w_scale: Tensor, shape: tuple[int, int],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dout: (..., M), and what `fp8_linear_kept` gave of a weight of `shape` (M, N) -> dx (..., N), dweight (M, N) in
    dout's dtype, dbias (M,) float32, those that `needs` asks for."""
    rows = as_rows(dout)
    n_out, n_in = shape
    if rows.shape[0] == 0:
        dx = dout.new_zeros((*dout.shape[:-1], n_in)) if needs[0] else None
        dweight = dout.new_zeros(shape) if needs[1] else None
        return dx, dweight, w_scale.new_zeros(n_out) if needs[2] else None
    dbias, maxima = column_sums_and_maxima(rows, needs[2])
    scale = torch.empty((), dtype=torch.float32, device=dout.device)
    kept, turned = _round(rows, E5M2, maxima, scale, needs[0], needs[1])
    dx = dweight = None
    if kept is not None and weight is not None:
        dx = _product(kept, weight, scale, w_scale, dout.dtype, False).view(*dout.shape[:-1], n_in)
    if turned is not None and x is not None:
        dweight = _product(turned, x, scale, x_scale, dout.dtype, False)
    return dx, dweight, dbias


def fp8_linear_limits(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot give what is asked."""
    capable = x.device.type != "cuda" or architecture(x.device) >= 89
    return None if capable else "needs compute capability 8.9: there are no products of 8-bit floats below"
