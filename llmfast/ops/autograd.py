"""One autograd.Function per op, over whichever backend's `<op>_fwd` and `<op>_bwd` were chosen.

The reference needs none: PyTorch differentiates it. Double backward is refused, as kernels have no second derivative.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor) -> Tensor:
        y = kernels.softmax_fwd(x)
        ctx.kernels = kernels
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return None, ctx.kernels.softmax_bwd(grad_outputs[0], y)


class LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        y, mean, rstd = kernels.layer_norm_fwd(x, weight, bias, eps)
        ctx.kernels = kernels
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dw, db = ctx.kernels.layer_norm_bwd(grad_outputs[0], x, weight, mean, rstd, ctx.has_bias)
        return None, dx, dw, db, None


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
        out, statistics = kernels.attention_fwd(q, k, v, causal, scale)
        ctx.kernels, ctx.causal, ctx.scale = kernels, causal, scale
        ctx.save_for_backward(q, k, v, out, statistics)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv = ctx.kernels.attention_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.causal, ctx.scale)
        return None, dq, dk, dv, None, None


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "softmax": Softmax,
    "layer_norm": LayerNorm,
    "attention": Attention,
}
