"""A linear layer whose three matrix products are of 8-bit floats (https://arxiv.org/abs/2209.05433).

x and the weight are rounded to e4m3 and the gradient to e5m2, each tensor times the largest power of two that its
format holds. A first pass reads a tensor's largest magnitude (of the gradient also its columns' sums, which are the
bias's gradient), a second writes it rounded, as it is and transposed (_fp8.py).

Supported: any number of rows; widths that are multiples of 16; compute capability 8.9 on. Not supported: float64.
"""

import torch
from torch import Tensor

from ._common import as_rows
from ._fp8 import E4M3, E5M2, lacking, product, rounded
from ._sums import column_sums_and_maxima


def fp8_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., N); weight: (M, N); bias: (M,) -> (..., M)."""
    return fp8_linear_kept(x, weight, bias, (False, False, False))[0]


def fp8_linear_kept(
    x: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The same, and what the gradients that `needs` names will ask for: x (N, rows padded) and weight (N, M), rounded
    and transposed, and what each is to be multiplied by, () float32."""
    rows, weight = as_rows(x), as_rows(weight)
    if rows.shape[0] == 0:
        one, other = (torch.ones((), dtype=torch.float32, device=x.device) for _ in range(2))
        no_x = x.new_empty((weight.shape[1], 0), dtype=E4M3) if needs[1] else None
        unread = x.new_empty((weight.shape[1], weight.shape[0]), dtype=E4M3) if needs[0] else None
        return x.new_zeros((*x.shape[:-1], weight.shape[0])), no_x, unread, one, other
    x8, w8 = rounded(rows, E4M3, True, needs[1]), rounded(weight, E4M3, True, needs[0])
    out = product(x8.rows[: rows.shape[0]], w8.rows, (x8.inverse, w8.inverse), x.dtype, True, bias)
    kept = x8.turned if needs[1] else None, w8.turned if needs[0] else None
    return out.view(*x.shape[:-1], weight.shape[0]), *kept, x8.inverse, w8.inverse


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
    d8 = rounded(rows, E5M2, needs[0], needs[1], maxima)
    dx = dweight = None
    if weight is not None and needs[0]:
        dx = product(d8.rows[: rows.shape[0]], weight, (d8.inverse, w_scale), dout.dtype, False)
        dx = dx.view(*dout.shape[:-1], n_in)
    if x is not None and needs[1]:
        dweight = product(d8.turned, x, (d8.inverse, x_scale), dout.dtype, False)
    return dx, dweight, dbias


def fp8_linear_limits(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    """Why the kernels cannot give what is asked."""
    return lacking(x.device)
