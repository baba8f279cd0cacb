"""An MLP, F.linear(act(h + up_bias), down, down_bias) of h = F.linear(x, up), or gated, of h = F.linear(x, up, up_bias)
in two halves: act(first) * second. It keeps x and h; what goes down is made again in the backward pass.

The products are the library's, but on Hopper those next to an activation without a gate, which is applied before they
write (mlp_hopper.py). Not supported: float64.
"""

from types import ModuleType

import torch
from torch import Tensor

from ._common import architecture, as_rows
from ._sums import column_sums, sum_partials
from .activation import KINDS, activation_bwd_with_result, activation_fwd
from .linear import linear_fwd


def mlp_fwd(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, None]:
    """x: (..., N); up: (F or 2 F, N); down: (M, F); biases: (F or 2 F,), (M,) -> (..., M), h, and nothing more to
    keep."""
    gated = up.shape[0] != down.shape[1]
    hopper, rows = (None, x) if gated else _on_hopper(x, up, up.shape[0])
    if hopper is not None:
        h, y = hopper.mlp_hopper_fwd(rows, up, up_bias, KINDS[activation])
        h, y = (t.view(*x.shape[:-1], -1) for t in (h, y))
    else:
        h = linear_fwd(x, up, up_bias if gated else None)
        first, second = h.chunk(2, -1) if gated else (h, None)
        y = activation_fwd(first, None if gated else up_bias, second, activation)
    return linear_fwd(y, down, down_bias), h, None


def mlp_bwd(
    dout: Tensor, x: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, h: Tensor, kept: None,
    activation: str, needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dout: (..., M) -> the gradients that `needs` asks for: of x (..., N), of up, which takes x, and down in their
    dtype, and of their biases (F or 2 F,) and (M,), float32."""
    rows, (width, n_in) = as_rows(dout), up.shape
    h = h.view(-1, width)
    dh, y, dup_bias = _activation_bwd(rows, down, h, up_bias, activation)
    dx = (dh @ up).view(*dout.shape[:-1], n_in) if needs[0] else None
    dup = dh.t() @ x.reshape(-1, n_in) if x is not None and needs[1] else None
    ddown = rows.t() @ y if needs[3] else None
    return dx, dup, dup_bias if needs[2] else None, ddown, column_sums(rows) if needs[4] else None


def _activation_bwd(
    dout: Tensor, down: Tensor, h: Tensor, up_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dout: (M, O); h: (M, F or 2 F) -> its gradient, what goes down, made again, (M, F), and the gradient of the bias,
    float32."""
    gated = h.shape[1] != down.shape[1]
    hopper, dout = (None, dout) if gated else _on_hopper(dout, down, down.shape[1])
    if hopper is not None:
        dh, y, partials = hopper.mlp_hopper_bwd(dout, down, h, up_bias, KINDS[activation])
        if partials is None:
            return dh, y, None
        dup_bias = torch.empty((h.shape[1],), dtype=torch.float32, device=h.device)
        sum_partials(partials, [dup_bias])
        return dh, y, dup_bias
    y = dout @ down  # as yet its gradient
    if not gated:
        dh, _, dup_bias = activation_bwd_with_result(y, h, up_bias, None, activation)
        return dh, y, dup_bias
    first, second = h.chunk(2, -1)
    dh = torch.empty_like(h)
    activation_bwd_with_result(y, first, None, second, activation, halves=dh)
    return dh, y, None if up_bias is None else column_sums(dh)


def _on_hopper(x: Tensor, weight: Tensor, n_cols: int) -> tuple[ModuleType | None, Tensor]:
    """The module of sm_90's own kernel, where that runs this, and x's rows for it. In Gluon, it is imported for that
    architecture alone."""
    if architecture(x.device) != 90:
        return None, x
    from . import mlp_hopper

    rows = as_rows(x)
    return (mlp_hopper, rows) if mlp_hopper.mlp_hopper_pays(rows, weight, n_cols) else (None, x)
