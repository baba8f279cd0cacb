"""One autograd.Function per op, over whichever backend's `<op>_fwd` and `<op>_bwd` were chosen.

The reference needs none: PyTorch differentiates it. Double backward is refused, as kernels have no second derivative.
"""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import reference
from .autograd_linear import MLP, ActivationLinear, Fp8Linear, Fp8LinearCrossEntropy, Fp8MLP, Linear


class Softmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        y = kernels.softmax_fwd(x, mask, causal)
        ctx.kernels = kernels
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (y,) = ctx.saved_tensors
        return None, ctx.kernels.softmax_bwd(grad_outputs[0], y), None, None


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


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
        y, rstd = kernels.rms_norm_fwd(x, weight, eps, offset)
        ctx.kernels, ctx.offset = kernels, offset
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.rms_norm_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.offset), None, None


class AddLayerNorm(torch.autograd.Function):
    """x and the residual get one gradient: of the sum, by way of the norm and by way of the sum itself."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        y, total, mean, rstd = kernels.add_layer_norm_fwd(x, residual, weight, bias, eps)
        ctx.kernels, ctx.has_bias = kernels, bias is not None
        ctx.save_for_backward(total, weight, mean, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dw, db = ctx.kernels.add_layer_norm_bwd(*grad_outputs, *ctx.saved_tensors, ctx.has_bias)
        return None, dx, dx, dw, db, None


class AddRMSNorm(torch.autograd.Function):
    """As AddLayerNorm."""

    @staticmethod
    def forward(
        ctx: Any, kernels: ModuleType, x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
    ) -> tuple[Tensor, Tensor]:
        y, total, rstd = kernels.add_rms_norm_fwd(x, residual, weight, eps, offset)
        ctx.kernels, ctx.offset = kernels, offset
        ctx.save_for_backward(total, weight, rstd)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dw = ctx.kernels.add_rms_norm_bwd(*grad_outputs, *ctx.saved_tensors, ctx.offset)
        return None, dx, dx, dw, None, None


class GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, approximate: str) -> Tensor:
        ctx.kernels, ctx.approximate = kernels, approximate
        ctx.save_for_backward(x)
        return kernels.gelu_fwd(x, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.kernels.gelu_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.approximate), None


class BiasGELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
        ctx.kernels, ctx.approximate = kernels, approximate
        ctx.save_for_backward(x, bias)
        return kernels.bias_gelu_fwd(x, bias, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.bias_gelu_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.approximate), None


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, gate: Tensor, up: Tensor) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(gate, up)
        return kernels.swiglu_fwd(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.swiglu_bwd(grad_outputs[0], *ctx.saved_tensors)


class GEGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, gate: Tensor, up: Tensor, approximate: str) -> Tensor:
        ctx.kernels, ctx.approximate = kernels, approximate
        ctx.save_for_backward(gate, up)
        return kernels.geglu_fwd(gate, up, approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.geglu_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.approximate), None


class RoPE(torch.autograd.Function):
    """The tables get no gradient: they are constants of the model."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.kernels, ctx.interleaved = kernels, interleaved
        ctx.save_for_backward(cos, sin)
        return kernels.rope_fwd(x, cos, sin, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.kernels.rope_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.interleaved), None, None, None


class CrossEntropy(torch.autograd.Function):
    """In place, the gradient takes the logits' memory; their version tells autograd, so that whoever else needs them
    to go backward is refused."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, logits: Tensor, targets: Tensor, *options: Any) -> Tensor:
        loss, statistics, count = kernels.cross_entropy_fwd(logits, targets, *options)
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(logits, targets, statistics, count)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits = ctx.saved_tensors[0]
        dlogits = ctx.kernels.cross_entropy_bwd(grad_outputs[0], *ctx.saved_tensors, *ctx.options)
        if dlogits is logits:
            torch.autograd.graph.increment_version(logits)
        return None, dlogits, *[None] * (1 + len(ctx.options))


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the losses' sum are made with the loss, while a chunk's logits are there, and scaled in the backward
    pass."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        *options: Any,
    ) -> Tensor:
        needs = tuple(ctx.needs_input_grad[i] for i in (1, 2, 4))
        if not any(needs):
            return kernels.linear_cross_entropy_fwd(x, weight, targets, bias, *options)
        loss, *saved = kernels.linear_cross_entropy_gradients(x, weight, targets, bias, *options, needs)
        ctx.kernels, ctx.n_options, ctx.reduction = kernels, len(options), options[-1]
        ctx.dtypes = [x.dtype, weight.dtype, x.dtype if bias is None else bias.dtype]
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, *gradients = ctx.saved_tensors
        dx, dw, db = (
            g if g is None else ctx.kernels.linear_cross_entropy_bwd(grad_outputs[0], count, g, ctx.reduction, dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, dx, dw, None, db, *[None] * ctx.n_options


class Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
        ctx.kernels, ctx.padding_idx = kernels, padding_idx
        ctx.save_for_backward(weight, tokens)
        return kernels.embedding_fwd(weight, tokens, padding_idx)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, ctx.kernels.embedding_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.padding_idx), None, None


class Attention(torch.autograd.Function):
    """Of the two results, out and log-sum-exp, only the first has a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = (causal, scale, window, softcap)
        out, statistics = kernels.attention_fwd(q, k, v, *options, return_lse)
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(q, k, v, out, statistics)
        return _with_lse(ctx, out, statistics, scale) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv = ctx.kernels.attention_bwd(grad_outputs[0], *ctx.saved_tensors, *ctx.options)
        return None, dq, dk, dv, *[None] * 5


class AttentionVarlen(torch.autograd.Function):
    """As Attention."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query_starts: Tensor,
        key_starts: Tensor,
        max_queries: int,
        max_keys: int,
        causal: bool,
        scale: float,
        window: int | None,
        softcap: float,
        return_lse: bool,
    ) -> Tensor | tuple[Tensor, Tensor]:
        options = (max_queries, max_keys, causal, scale, window, softcap)
        out, statistics = kernels.attention_varlen_fwd(q, k, v, query_starts, key_starts, *options, return_lse)
        ctx.kernels, ctx.options = kernels, options
        ctx.save_for_backward(q, k, v, query_starts, key_starts, out, statistics)
        return _with_lse(ctx, out, statistics, scale) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dq, dk, dv = ctx.kernels.attention_varlen_bwd(grad_outputs[0], *ctx.saved_tensors, *ctx.options)
        return None, dq, dk, dv, *[None] * 9


def _with_lse(ctx: Any, out: Tensor, statistics: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """out and, without a gradient, the log-sum-exp of its scores."""
    largest, total = statistics
    lse = torch.where(total == 0.0, -torch.inf, largest * abs(scale) + total.log())
    ctx.mark_non_differentiable(lse)
    return out, lse


FUNCTIONS: dict[str, type[torch.autograd.Function]] = {
    "softmax": Softmax,
    "layer_norm": LayerNorm,
    "attention": Attention,
    "attention_varlen": AttentionVarlen,
    "rms_norm": RMSNorm,
    "add_layer_norm": AddLayerNorm,
    "add_rms_norm": AddRMSNorm,
    "gelu": GELU,
    "bias_gelu": BiasGELU,
    "swiglu": SwiGLU,
    "geglu": GEGLU,
    "linear": Linear,
    "fp8_linear": Fp8Linear,
    "fp8_mlp": Fp8MLP,
    "activation_linear": ActivationLinear,
    "mlp": MLP,
    "rope": RoPE,
    "cross_entropy": CrossEntropy,
    "linear_cross_entropy": LinearCrossEntropy,
    "fp8_linear_cross_entropy": Fp8LinearCrossEntropy,
    "embedding": Embedding,
}


class _NoContext:
    """Stands for autograd's context where nothing will be differentiated."""

    needs_input_grad = (False,) * 16

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass


def apply(op: str, kernels: ModuleType | None, args: tuple[Any, ...]) -> Any:
    """The op's tensor or tensors by `kernels`, or the reference where there are none.

    Autograd hears of kernels only where a gradient can be asked for, as its own call takes 6 us.
    """
    if kernels is None:
        return getattr(reference, op)(*args)
    if op not in FUNCTIONS:  # it has no gradient
        return getattr(kernels, f"{op}_fwd")(*args)
    function = FUNCTIONS[op]
    if torch.is_grad_enabled():
        for a in args:
            if isinstance(a, Tensor) and a.requires_grad:
                return function.apply(kernels, *args)
    return function.forward(_NoContext(), kernels, *args)
