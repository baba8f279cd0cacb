"""The definition of every op in plain PyTorch.

Each function accumulates in `promote(dtype, float32)` and rounds once at the end: fp64 inputs give the fp64 truth that
every kernel is measured against, and autograd through these functions gives the true gradients.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum over the last dimension. x: (..., N)."""
    return torch.softmax(x.to(_accumulation_dtype(x)), dim=-1).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (https://arxiv.org/abs/1607.06450)."""
    acc = _accumulation_dtype(x)
    w, b = (None if p is None else p.to(acc) for p in (weight, bias))
    return F.layer_norm(x.to(acc), x.shape[-1:], w, b, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (https://arxiv.org/abs/1910.07467)."""
    h = x.to(_accumulation_dtype(x))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h if weight is None else h * weight.to(h.dtype)).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(q k^T * scale) v per head (https://arxiv.org/abs/1706.03762).

    q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) with H a multiple of Hkv: query head h reads key head h // (H / Hkv).
    Causal is aligned bottom right: query i sees keys j <= i + Tk - Tq. A query that sees no key gives zeros.
    """
    acc = _accumulation_dtype(q)
    n_queries, n_keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    group = heads // kv_heads
    qh = q.to(acc).transpose(1, 2).unflatten(1, (kv_heads, group))  # (B, Hkv, G, Tq, D)
    kh, vh = (t.to(acc).transpose(1, 2).unsqueeze(2) for t in (k, v))  # (B, Hkv, 1, Tk, D)
    scores = qh @ kh.transpose(-1, -2) * scale
    hidden = None
    if causal:
        hidden = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).triu(1 + n_keys - n_queries)
        scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if hidden is not None and n_keys < n_queries:  # only then does a row see nothing, and its softmax is 0 / 0
        probabilities = probabilities.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    out = (probabilities @ vh).flatten(1, 2).transpose(1, 2)
    return out.to(q.dtype)


def gelu(x: Tensor, approximate: str) -> Tensor:
    """x * Phi(x), Phi by `erf` ("none") or GPT-2's `tanh` (https://arxiv.org/abs/1606.08415)."""
    return bias_gelu(x, None, approximate)


def bias_gelu(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias), rounded once. x: (..., N); bias: (N,) or None."""
    h = x.to(_accumulation_dtype(x))
    return F.gelu(h if bias is None else h + bias.to(h.dtype), approximate=approximate).to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (https://arxiv.org/abs/2002.05202)."""
    acc = _accumulation_dtype(gate)
    return (F.silu(gate.to(acc)) * up.to(acc)).to(gate.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]) by its position's angle (https://arxiv.org/abs/2104.09864).

    x: (B, T, H, D); cos, sin: (T, D/2).
    """
    first, second = x.to(_accumulation_dtype(x)).chunk(2, dim=-1)
    c, s = (t.to(first.dtype)[:, None, :] for t in (cos, sin))  # (T, 1, D/2)
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(x.dtype)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """Mean of logsumexp(logits) - logits[target] over the targets that are not `ignore_index`; 0 if there are none.

    logits: (N, V); targets: (N,) int64. Returns a scalar in the accumulation dtype.
    """
    acc = logits.to(_accumulation_dtype(logits))
    total = F.cross_entropy(acc, targets, ignore_index=ignore_index, reduction="sum")
    return total / (targets != ignore_index).sum().clamp(min=1)


def adamw(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """Update number `step`, counted from 1, in place (https://arxiv.org/abs/1711.05101, algorithm 2)."""
    grad = grad * grad_scale
    exp_avg.lerp_(grad, 1.0 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
    root = (exp_avg_sq / (1.0 - beta2**step)).sqrt_().add_(eps)
    parameter.mul_(1.0 - learning_rate * weight_decay)
    parameter.addcdiv_(exp_avg, root, value=-learning_rate / (1.0 - beta1**step))
