"""The parts of a decoder block. Weights stay in their own dtype (float32 when training) and are cast to the input's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from .cache import KVCache
from .config import Config

Rotary = Sequence[tuple[Tensor, Tensor]]  # cos, sin, each (T, D/2): the global layers' and any of the local ones


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype, or, where `fp8` is set and a gradient asked for, in 8 bits."""

    fp8 = False

    def forward(self, input: Tensor) -> Tensor:
        layer = ops.fp8_linear if self.in_fp8() else ops.linear
        return layer(input, self.weight.to(input.dtype), _parameter(self.bias, input))

    def in_fp8(self) -> bool:
        return self.fp8 and torch.is_grad_enabled()


class Norm(nn.Module):
    """Layer or RMS normalisation over the last dimension, as the configuration says."""

    def __init__(self, config: Config, size: int | None = None) -> None:
        super().__init__()
        size = size or config.d_model
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.weight = nn.Parameter(torch.full((size,), 1.0 - config.norm_offset))
        self.bias = nn.Parameter(torch.zeros(size)) if config.norm == "layer_norm" else None

    def forward(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + branch, and that sum; both (..., N). Before the first branch there is none."""
        weight, bias = _parameter(self.weight, residual), _parameter(self.bias, residual)
        if self.kind == "layer_norm":
            if branch is None:
                return ops.layer_norm(residual, weight, bias, self.eps), residual
            return ops.add_layer_norm(branch, residual, weight, bias, self.eps)
        if branch is None:
            return ops.rms_norm(residual, weight, self.eps, offset=self.offset), residual
        return ops.add_rms_norm(branch, residual, weight, self.eps, offset=self.offset)


def split_heads(x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Sections of `sizes` heads, views of x: (B, T, all heads, D)."""
    if torch.compiler.is_compiling():  # whose graph has no use for it
        return x.split(sizes, dim=2)
    return _SplitHeads.apply(x, sizes)  # pyright: ignore[reportReturnType]


class _SplitHeads(torch.autograd.Function):
    """x.split. Gradients that lie side by side already, as attention's may, are taken as they are, not copied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        ctx.shape = x.shape
        return x.split(sizes, dim=2)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        whole = grad_outputs[0]._base
        if whole is None or whole.shape != ctx.shape:
            return torch.cat(grad_outputs, dim=2), None
        sections = whole.split([grad.shape[2] for grad in grad_outputs], dim=2)
        same = all(
            grad._base is whole and grad.data_ptr() == section.data_ptr() and grad.stride() == section.stride()
            for grad, section in zip(grad_outputs, sections, strict=True)
        )
        return whole if same else torch.cat(grad_outputs, dim=2), None


class Attention(nn.Module):
    """Causal self-attention with grouped keys; q, k and v come from one matrix product and are read by strides."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_kv_head, self.head_dim = layer, config.n_kv_head, config.head_dim
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_dim, bias=config.has_bias("qkv"))
        self.proj = Linear(config.n_head * config.head_dim, config.d_model, bias=config.bias)
        self.q_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_dim) if config.qk_norm else None
        self.rotary = 1 if config.local_rope_theta is not None and config.is_local(layer) else 0
        options = {
            "scale": config.attention_scale,
            "window": config.window if config.is_local(layer) else None,
            "softcap": config.attention_softcap or None,
        }
        self.options: dict[str, Any] = {name: value for name, value in options.items() if value is not None}

    def forward(self, x: Tensor, rotary: Rotary | None, cache: KVCache | None) -> Tensor:
        q, k, v = split_heads(self.qkv(x).unflatten(-1, (-1, self.head_dim)), self.heads)  # (B, T, H or Hkv, D)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(None, q)[0], self.k_norm(None, k)[0]
        if rotary is not None:
            cos, sin = rotary[self.rotary]
            q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        if cache is None:
            out = ops.attention(q, k, v, causal=True, **self.options)
        else:
            out = cache.attend(self.layer, q, k, v, **self.options)
        return self.proj(out.flatten(2))


class MLP(nn.Module):
    """Two matrix products with an activation between; where that is gated, gate and up come from one product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind, bias = config.mlp, config.has_bias("mlp")
        self.up = Linear(config.d_model, config.d_mlp * (2 if config.gated else 1), bias=bias)
        self.down = Linear(config.d_mlp, config.d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        activation: Any = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}.get(self.kind, self.kind)
        up, down = ((layer.weight.to(x.dtype), _parameter(layer.bias, x)) for layer in (self.up, self.down))
        mlp = ops.fp8_mlp if self.up.in_fp8() else ops.mlp  # `down`, as wide the other way, is in 8 bits as `up` is
        return mlp(x, *up, *down, activation=activation)


def _parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """p as the kernels take it beside x: float32, or x's dtype."""
    return p if p is None or p.dtype in (x.dtype, torch.float32) else p.to(x.dtype)


class Block(nn.Module):
    """Pre-norm residual block. Its last branch is added by the next norm, in one pass over memory."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        self.attention_post_norm = Norm(config) if config.post_norms else None
        self.mlp_norm, self.mlp = Norm(config), MLP(config)
        self.mlp_post_norm = Norm(config) if config.post_norms else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, branch: Tensor | None, residual: Tensor, rotary: Rotary | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """(branch, residual), both (B, T, d_model), whose sum is the stream -> the same after this block."""
        x, residual = self.attention_norm(branch, residual)
        branch = self.attention(x, rotary, cache)
        if self.attention_post_norm is not None:
            branch, _ = self.attention_post_norm(None, branch)
        x, residual = self.mlp_norm(self.dropout(branch), residual)
        branch = self.mlp(x)
        if self.mlp_post_norm is not None:
            branch, _ = self.mlp_post_norm(None, branch)
        return self.dropout(branch), residual
