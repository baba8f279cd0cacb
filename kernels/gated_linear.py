"""A gated product and the linear layer behind it, F.linear(act(gate) * up, weight, bias), that keeps gate and up alone.

A linear layer keeps its input for the weight's gradient. Here it is made again by the kernel of the gradients of gate
and up, which reads all that takes: it writes the product over the product's own gradient. Not supported: float64.
"""

import torch
from torch import Tensor

from .activation import gated_bwd_with_product, gated_fwd


def gated_linear_fwd(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """gate, up: (..., N); weight: (M, N); bias: (M,) or None -> (..., M)."""
    return torch.nn.functional.linear(gated_fwd(gate, up, activation), weight, bias)


def gated_linear_bwd(
    dout: Tensor, gate: Tensor, up: Tensor, weight: Tensor, has_bias: bool, activation: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """dout: (..., M) -> dgate, dup (..., N); dweight (M, N), dbias (M,) or None, in weight's dtype."""
    rows = dout.reshape(-1, weight.shape[0])
    product = (rows @ weight).view(gate.shape)  # as yet its gradient
    dgate, dup = gated_bwd_with_product(product, gate, up, activation)
    dweight = rows.t() @ product.view(-1, weight.shape[1])
    return dgate, dup, dweight, rows.sum(0) if has_bias else None
