"""Linear layers with an activation before or between them, over the native ops; the products are PyTorch's."""

import torch
from torch import Tensor

from .launch import bias_gelu_bwd, bias_gelu_fwd, swiglu_bwd, swiglu_fwd, without_rows


def activation_linear_fwd(
    x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor]:
    """x, up: (..., N); x_bias: (N,); weight: (M, N); bias: (M,) -> F.linear(y, weight, bias), y = act(x + x_bias) * up,
    which is kept: a CPU has memory for it, and 5 % of a training step went into making it again."""
    y = _activation(x, x_bias, up, activation)
    return torch.nn.functional.linear(y, weight, None if bias is None else bias.to(y.dtype)), y


def activation_linear_bwd(
    dout: Tensor, x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, kept: Tensor, has_bias: bool,
    activation: str,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """-> dx, dx_bias, dup, dweight and dbias, or None."""
    rows = dout.reshape(-1, weight.shape[0])
    dy = (rows @ weight).view(x.shape)
    dx_bias = dup = None
    if activation == "silu":
        assert up is not None
        dx, dup = swiglu_bwd(dy, x, up)
    else:
        if up is not None:
            dup = dy * _activation(x, x_bias, None, activation)
            dy = dy * up
        dx, dx_bias = bias_gelu_bwd(dy, x, x_bias, _APPROXIMATE[activation])
    return dx, dx_bias, dup, rows.t() @ kept.view(-1, weight.shape[1]), rows.sum(0) if has_bias else None


def activation_linear_limits(
    x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> str | None:
    """Why a kernel cannot give what is asked."""
    if activation == "silu" and (up is None or x_bias is not None):
        return "has silu(x) * up only, without a bias"
    return without_rows(x)


def mlp_fwd(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """x: (..., N); up: (F or 2 F, N); down: (M, F); biases: (F or 2 F,), (M,) -> (..., M), h = F.linear(x, up), with
    up_bias where it is gated, and what goes down."""
    gated = up.shape[0] != down.shape[1]
    h = torch.nn.functional.linear(x, up, up_bias.to(x.dtype) if gated and up_bias is not None else None)
    first, second = h.chunk(2, -1) if gated else (h, None)
    out, y = activation_linear_fwd(first, None if gated else up_bias, second, down, down_bias, activation)
    return out, h, y


def mlp_bwd(
    dout: Tensor, x: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor, h: Tensor, kept: Tensor,
    activation: str, needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """-> the gradients that `needs` asks for, of x, up, which takes x, its bias, down, its bias."""
    gated = up.shape[0] != down.shape[1]
    first, second = h.chunk(2, -1) if gated else (h, None)
    bias = None if gated else up_bias
    dh, dup_bias, dsecond, ddown, ddown_bias = activation_linear_bwd(
        dout, first, bias, second, down, kept, needs[4], activation
    )
    if dsecond is not None:
        dh = torch.cat((dh, dsecond), -1)
        dup_bias = dh.reshape(-1, dh.shape[-1]).sum(0) if needs[2] else None
    dx = dh @ up if needs[0] else None
    dup = dh.reshape(-1, up.shape[0]).t() @ x.reshape(-1, up.shape[1]) if x is not None and needs[1] else None
    return dx, dup, dup_bias if needs[2] else None, ddown if needs[3] else None, ddown_bias


def mlp_limits(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> str | None:
    """Why a kernel cannot give what is asked."""
    if activation == "silu" and up.shape[0] == down.shape[1]:
        return "has silu with a gate only"
    return without_rows(x) or without_rows(down)


def _activation(x: Tensor, x_bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    if activation == "silu":
        assert up is not None
        return swiglu_fwd(x, up)
    y = bias_gelu_fwd(x, x_bias, _APPROXIMATE[activation])
    return y if up is None else y * up


_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}
