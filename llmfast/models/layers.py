"""The parts of a decoder block. Weights stay in their own dtype (float32 when training) and are cast to the input's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .cache import KVCache
from .config import Config


class Linear(nn.Linear):
    """nn.Linear that computes in its input's dtype."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class Norm(nn.Module):
    """Layer or RMS normalisation, as the configuration says."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind, self.eps = config.norm, config.norm_eps
        self.weight = nn.Parameter(torch.ones(config.d_model))
        self.bias = nn.Parameter(torch.zeros(config.d_model)) if config.norm == "layer_norm" else None

    def forward(self, branch: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of residual + branch, and that sum; both (..., d_model). Before the first branch there is none."""
        weight, bias = _parameter(self.weight, residual), _parameter(self.bias, residual)
        if self.kind == "layer_norm":
            if branch is None:
                return ops.layer_norm(residual, weight, bias, self.eps), residual
            return ops.add_layer_norm(branch, residual, weight, bias, self.eps)
        if branch is None:
            return ops.rms_norm(residual, weight, self.eps), residual
        return ops.add_rms_norm(branch, residual, weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with grouped keys; q, k and v come from one matrix product and are read by strides."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.layer, self.n_kv_head, self.head_dim = layer, config.n_kv_head, config.head_dim
        self.heads = (config.n_head, config.n_kv_head, config.n_kv_head)
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_dim, bias=config.bias)
        self.proj = Linear(config.n_head * config.head_dim, config.d_model, bias=config.bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # (B, T, H or Hkv, D)
        if rotary is not None:
            q, k = ops.rope(q, *rotary), ops.rope(k, *rotary)
        out = ops.attention(q, k, v, causal=True) if cache is None else cache.attend(self.layer, q, k, v)
        return self.proj(out.flatten(2))


class MLP(nn.Module):
    """Two matrix products with an activation between; gated for SwiGLU, gate and up in one product."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.kind = config.mlp
        self.up = Linear(config.d_model, config.d_mlp * (2 if config.mlp == "swiglu" else 1), bias=config.bias)
        self.down = Linear(config.d_mlp, config.d_model, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "swiglu":
            return self.down(ops.swiglu(*self.up(x).chunk(2, dim=-1)))
        h, bias = F.linear(x, self.up.weight.to(x.dtype)), _parameter(self.up.bias, x)
        return self.down(ops.bias_gelu(h, bias, approximate="tanh" if self.kind == "gelu_tanh" else "none"))


def _parameter(p: Tensor | None, x: Tensor) -> Tensor | None:
    """p as the kernels take it beside x: float32, or x's dtype."""
    return p if p is None or p.dtype in (x.dtype, torch.float32) else p.to(x.dtype)


class Block(nn.Module):
    """Pre-norm residual block. Its last branch is added by the next norm, in one pass over memory."""

    def __init__(self, config: Config, layer: int) -> None:
        super().__init__()
        self.attention_norm, self.attention = Norm(config), Attention(config, layer)
        self.mlp_norm, self.mlp = Norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, branch: Tensor | None, residual: Tensor, rotary: tuple[Tensor, Tensor] | None, cache: KVCache | None
    ) -> tuple[Tensor, Tensor]:
        """(branch, residual), both (B, T, d_model), whose sum is the stream -> the same after this block."""
        x, residual = self.attention_norm(branch, residual)
        x, residual = self.mlp_norm(self.dropout(self.attention(x, rotary, cache)), residual)
        return self.dropout(self.mlp(x)), residual
