"""A linear layer, F.linear(x, weight, bias), whose bias gets its gradient at the speed of memory.

The products are the library's, but that of a single vector. PyTorch's sum over the rows of a tall matrix reads at half
that speed, and a float32 bias beside 16-bit activations would have to be cast for it. Not supported: float64.
"""

import torch
from torch import Tensor

from ._sums import column_sums
from .matvec import is_one_vector, matvec


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., N); weight: (M, N); bias: (M,), of x's dtype or float32 -> (..., M)."""
    if is_one_vector(x, weight):
        return matvec(x, weight, bias)
    return torch.nn.functional.linear(x, weight, None if bias is None else bias.to(x.dtype))


def linear_bwd(
    dout: Tensor, x: Tensor | None, weight: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dout: (..., M) -> dx (..., N), dweight (M, N), dbias (M,) float32, those that `needs` asks for; x for dweight."""
    rows = dout.reshape(-1, weight.shape[0])
    dx = (rows @ weight).view(*dout.shape[:-1], weight.shape[1]) if needs[0] else None
    dweight = rows.t() @ x.reshape(-1, weight.shape[1]) if x is not None and needs[1] else None
    return dx, dweight, column_sums(rows) if needs[2] else None
