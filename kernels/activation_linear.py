"""An activation and the linear layer behind it, F.linear(act(x + x_bias) * up, weight, bias), that keeps x and up.

A linear layer keeps its input for the weight's gradient. Here it is made again by the kernel of the gradients of x and
up, which reads all that takes: it writes the input over the input's own gradient. Not supported: float64.
"""

from torch import Tensor

from ._sums import column_sums
from .activation import activation_bwd_with_result, activation_fwd
from .linear import linear_fwd


def activation_linear_fwd(
    x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, None]:
    """x, up: (..., N); x_bias: (N,); weight: (M, N); bias: (M,) -> (..., M), and nothing to keep."""
    return linear_fwd(activation_fwd(x, x_bias, up, activation), weight, bias), None


def activation_linear_bwd(
    dout: Tensor, x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, kept: None, has_bias: bool,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """dout: (..., M) -> dx (..., N), dx_bias (N,) float32, dup (..., N); dweight (M, N) in weight's dtype, dbias (M,)
    float32; None where there is no such tensor."""
    rows = dout.reshape(-1, weight.shape[0])
    y = (rows @ weight).view(x.shape)  # as yet its gradient
    dx, dup, dx_bias = activation_bwd_with_result(y, x, x_bias, up, activation)
    dweight = rows.t() @ y.view(-1, weight.shape[1])
    return dx, dx_bias, dup, dweight, column_sums(rows) if has_bias else None
