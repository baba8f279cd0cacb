"""The definition of every op in plain PyTorch.

Each function accumulates in `promote(dtype, float32)` and rounds once at the end: fp64 inputs give the fp64 truth that
every kernel is measured against, and autograd through these functions gives the true gradients.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def softmax(x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """exp(x - max) / sum over the last dimension. x: (..., N).

    mask: bool, broadcastable to x, False where an element takes no part; causal: row i of the last two dimensions
    (Tq, Tk) sees columns j <= i + Tk - Tq. A row of which nothing takes part gives zeros.
    """
    h = x.to(_accumulation_dtype(x))
    visible = mask
    if causal:
        n_queries, n_keys = x.shape[-2:]
        lower = torch.ones(n_queries, n_keys, dtype=torch.bool, device=x.device).tril(n_keys - n_queries)
        visible = lower if mask is None else mask & lower
    if visible is None:
        return torch.softmax(h, dim=-1).to(x.dtype)
    y = torch.softmax(h.masked_fill(~visible, float("-inf")), dim=-1)
    return y.masked_fill(~visible, 0.0).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension (https://arxiv.org/abs/1607.06450)."""
    acc = _accumulation_dtype(x)
    w, b = (None if p is None else p.to(acc) for p in (weight, bias))
    return F.layer_norm(x.to(acc), x.shape[-1:], w, b, eps).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension (https://arxiv.org/abs/1910.07467)."""
    h = x.to(_accumulation_dtype(x))
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h if weight is None else h * (weight.to(h.dtype) + offset)).to(x.dtype)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The sum x + residual, rounded to their dtype, and its layer norm: (norm, sum)."""
    total = x + residual
    return layer_norm(total, weight, bias, eps), total


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """The sum x + residual, rounded to their dtype, and its RMS norm: (norm, sum)."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q k^T * scale) v per head (https://arxiv.org/abs/1706.03762).

    q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) with H a multiple of Hkv: query head h reads key head h // (H / Hkv).
    Causal is aligned bottom right: query i sees keys j <= i + Tk - Tq, and with a window (causal only) the last
    `window` of these. A query that sees no key gives zeros. softcap c > 0 makes c tanh(score / c) of the scaled scores
    (https://arxiv.org/abs/2408.00118). The log-sum-exp of the scores is (B, H, Tq), float32 or wider.
    """
    acc = _accumulation_dtype(q)
    n_queries, n_keys, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    group = heads // kv_heads
    qh = q.to(acc).transpose(1, 2).unflatten(1, (kv_heads, group))  # (B, Hkv, G, Tq, D)
    kh, vh = (t.to(acc).transpose(1, 2).unsqueeze(2) for t in (k, v))  # (B, Hkv, 1, Tk, D)
    scores = qh @ kh.transpose(-1, -2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = None
    if causal:
        everything = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device)
        hidden = everything.triu(1 + n_keys - n_queries)
        if window is not None:
            hidden = hidden | everything.tril(n_keys - n_queries - window)
        scores = scores.masked_fill(hidden, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if hidden is not None and n_keys < n_queries:  # only then does a row see nothing, and its softmax is 0 / 0
        probabilities = probabilities.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    out = (probabilities @ vh).flatten(1, 2).transpose(1, 2).to(q.dtype)
    return (out, scores.logsumexp(-1).flatten(1, 2).detach()) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`attention` of sequences that lie one after another: q (all queries, H, D); k, v (all keys, Hkv, D). Sequence b
    has the rows from starts[b] to starts[b + 1], of which there may be none. Queries after the last give zeros.
    Log-sum-exp: (H, all queries)."""
    outs, lses = [q[:0]], [q.new_empty((q.shape[1], 0), dtype=_accumulation_dtype(q))]
    first_q, first_k = query_starts.tolist(), key_starts.tolist()
    for i in range(len(first_q) - 1):
        queries, keys = slice(*first_q[i : i + 2]), slice(*first_k[i : i + 2])
        tensors = q[queries][None], k[keys][None], v[keys][None]
        out, lse = attention(*tensors, causal, scale, window, softcap, True)
        outs.append(out[0])
        lses.append(lse[0])
    held, rest = first_k[-1], q.shape[0] - first_q[-1]
    # Of keys that no query saw, too, the gradient is 0.
    out = torch.cat(outs) + 0 * (k[:held].sum() + v[:held].sum()).to(q.dtype)
    out, lse = F.pad(out, (0, 0, 0, 0, 0, rest)), F.pad(torch.cat(lses, 1), (0, rest), value=-math.inf)
    return (out, lse) if return_lse else out


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, block_table: Tensor | None, scale: float,
    window: int | None = None, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """Causal attention of the last Tq tokens of each sequence over the first lengths[b] keys of a cache, or over all.

    q: (B, Tq, H, D); k_cache, v_cache: (B, capacity, Hkv, D), or (n_pages, page_size, Hkv, D) where block_table
    (B, max_pages) tells the page of each page_size keys in turn (https://arxiv.org/abs/2309.06180). Query i sees keys
    j < lengths[b] - (Tq - 1 - i), and with a window the last of these; one that sees none gives zeros. softcap is that
    of `attention`. Whatever lies past the lengths has no effect.
    """
    if block_table is not None:
        pages = block_table.long().clamp(0, k_cache.shape[0] - 1)
        k_cache, v_cache = (cache[pages].flatten(1, 2) for cache in (k_cache, v_cache))
    acc = _accumulation_dtype(q)
    (n_queries, heads), (capacity, kv_heads) = q.shape[1:3], k_cache.shape[1:3]
    key, query = (torch.arange(n, device=q.device) for n in (capacity, n_queries))
    if lengths is None:
        lengths = torch.full((q.shape[0],), capacity, dtype=torch.int32, device=q.device)
    lengths = lengths.clamp(0, capacity)  # the newest keys that there are, as the kernels take it
    unwritten = key >= lengths[:, None]  # (B, capacity)
    kh, vh = (t.to(acc).masked_fill(unwritten[..., None, None], 0.0).transpose(1, 2) for t in (k_cache, v_cache))
    group = heads // kv_heads
    qh = q.to(acc).unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)  # (B, Hkv, G, Tq, D)
    scores = qh.flatten(2, 3) @ kh.transpose(-1, -2) * scale  # (B, Hkv, G Tq, capacity)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = (lengths[:, None] - (n_queries - 1) + query)[..., None]  # (B, Tq, 1)
    hidden = key >= seen if window is None else (key >= seen) | (key < seen - window)  # (B, Tq, capacity)
    hidden = hidden.repeat(1, group, 1)[:, None]
    probabilities = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    out = probabilities.masked_fill(hidden, 0.0) @ vh  # a row that sees nothing has a softmax of 0 / 0
    return out.unflatten(2, (group, n_queries)).permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None
) -> None:
    """Writes k, v (B, T, Hkv, D) into the places lengths[b] - T and following of each sequence's cache, or pages, as
    `decode_attention` reads them; those that the cache has not are left out."""
    n_new = k.shape[1]
    if block_table is not None:
        page_size = k_cache.shape[1]
        place = lengths[:, None] - n_new + torch.arange(n_new, device=k.device)
        b, i = ((place >= 0) & (place < page_size * block_table.shape[1])).nonzero(as_tuple=True)
        at = block_table[b, place[b, i] // page_size].long(), place[b, i] % page_size
        k_cache[at], v_cache[at] = k[b, i], v[b, i]
    elif n_new:
        token = torch.arange(k_cache.shape[1], device=k.device) - (lengths[:, None] - n_new)  # of each place, (B, cap.)
        new = ((token >= 0) & (token < n_new))[..., None, None]
        index = token.clamp(0, n_new - 1)[..., None, None].expand(-1, -1, *k.shape[2:])
        for cache, tokens in ((k_cache, k), (v_cache, v)):
            cache.copy_(torch.where(new, tokens.gather(1, index), cache))


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


def geglu(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gelu(gate) * up (https://arxiv.org/abs/2002.05202)."""
    acc = _accumulation_dtype(gate)
    return (F.gelu(gate.to(acc), approximate=approximate) * up.to(acc)).to(gate.dtype)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight^T + bias. x: (..., N); weight: (M, N); bias: (M,). PyTorch's product of 16 bits sums in float32."""
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype))


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` of operands, and for gradients, as 8-bit floats hold them (https://arxiv.org/abs/2209.05433)."""
    acc = _accumulation_dtype(x)
    y = fp8_product(x.to(acc), weight.to(acc))
    return (y if bias is None else y + bias.to(acc)).to(x.dtype)


def fp8_product(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T at their dtype, of what e4m3 holds of them; the gradient as e5m2 holds it."""
    held = (Held.apply(t, torch.float8_e4m3fn, None) for t in (x, weight))
    return Held.apply(F.linear(*held), None, torch.float8_e5m2)  # pyright: ignore[reportReturnType]


class Held(torch.autograd.Function):
    """x as one 8-bit format holds it, and its gradient as another does, None for all bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype | None, gradient: torch.dtype | None) -> Tensor:
        ctx.gradient = gradient
        return _held(x, dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return _held(grad_outputs[0], ctx.gradient), None, None


def _held(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x rounded to `dtype` after it was multiplied by the largest power of two that its largest magnitude bears."""
    if dtype is None or x.numel() == 0:
        return x.view_as(x)
    h = x.to(_accumulation_dtype(x))
    largest = h.abs().nan_to_num(0.0, torch.inf).amax()
    mantissa, exponent = torch.frexp(largest)
    power = math.frexp(torch.finfo(dtype).max)[1] - exponent - (mantissa > 0.875).int()  # its largest: 0.875 times 2^n
    # Not torch.ldexp, which in PyTorch 2.11 launches on the current GPU, wherever its tensors are.
    scale = torch.full_like(largest, 2.0).pow(power.clamp_max(126)) + (largest - largest)  # NaN of infinity
    return ((h * scale).float().to(dtype).to(h.dtype) / scale).to(x.dtype)


def fp8_mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> Tensor:
    """fp8_linear of act(h), or of act(first half of h) * second half, h = fp8_linear of x; both rounded to x's dtype.
    x: (..., N); up: (F or 2 F, N); down: (M, F)."""
    h = fp8_linear(x, up, up_bias)
    first, second = (h, None) if up.shape[0] == down.shape[1] else h.chunk(2, dim=-1)
    return fp8_linear(_activated(first, second, activation).to(x.dtype), down, down_bias)


def _activated(x: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """act(x) * up in the accumulation dtype."""
    h = x.to(_accumulation_dtype(x))
    y = F.silu(h) if activation == "silu" else F.gelu(h, approximate="tanh" if activation == "gelu_tanh" else "none")
    return y if up is None else y * up.to(h.dtype)


def activation_linear(
    x: Tensor, x_bias: Tensor | None, up: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    """(act(x + x_bias) * up) @ weight^T + bias. x, up: (..., N); x_bias: (N,); weight: (M, N); bias: (M,)."""
    acc = _accumulation_dtype(x)
    y = _activated(x.to(acc) if x_bias is None else x.to(acc) + x_bias.to(acc), up, activation)
    return F.linear(y, weight.to(acc), None if bias is None else bias.to(acc)).to(x.dtype)


def mlp(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> Tensor:
    """activation_linear of h, or of the halves of h, which is rounded to x's dtype; h = linear of x, whose bias counts
    to the activation where there is no gate. x: (..., N); up: (F or 2 F, N); down: (M, F)."""
    if up.shape[0] == down.shape[1]:
        return activation_linear(linear(x, up, None), up_bias, None, down, down_bias, activation)
    first, second = linear(x, up, up_bias).chunk(2, dim=-1)
    return activation_linear(first, None, second, down, down_bias, activation)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate each pair (x[i], x[i + D/2]), or (x[2i], x[2i + 1]) where interleaved, by its position's angle.

    https://arxiv.org/abs/2104.09864. x: (B, T, H, D); cos, sin: (T, D/2) or (B, T, D/2).
    """
    h = x.to(_accumulation_dtype(x))
    first, second = (h[..., 0::2], h[..., 1::2]) if interleaved else h.chunk(2, dim=-1)
    c, s = (t.to(h.dtype)[..., None, :] for t in (cos, sin))  # (T, 1, D/2) or (B, T, 1, D/2)
    turned = first * c - second * s, second * c + first * s
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    n_classes: int | None = None,
    in_place: bool = False,
) -> Tensor:
    """lse - (1 - label_smoothing) logits[target] - label_smoothing mean(logits) + z_loss lse^2, lse their logsumexp.

    Of each row whose target is not `ignore_index`, over its first `n_classes` columns; 0 of the others. "mean" is over
    the former, 0 if there are none; "sum"; "none" gives one for each row. logits: (N, V); targets: (N,) int64. The
    result is in the accumulation dtype. Label smoothing: https://arxiv.org/abs/1512.00567, with the weight of the true
    class as PyTorch has it; z-loss: https://arxiv.org/abs/2204.02311, section 5. `in_place` is for kernels.
    """
    h = logits[:, :n_classes].to(_accumulation_dtype(logits))
    losses = F.cross_entropy(h, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    counted = targets != ignore_index
    if z_loss:
        losses = losses + z_loss * torch.where(counted, h.logsumexp(-1), 0.0).square()
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted.sum().clamp(min=1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """cross_entropy of x @ weight^T + bias. x: (N, D); weight: (V, D); bias: (V,) or None."""
    acc = _accumulation_dtype(x)
    logits = F.linear(x.to(acc), weight.to(acc), None if bias is None else bias.to(acc))
    return cross_entropy(logits, targets, ignore_index, label_smoothing, z_loss, reduction)


def fp8_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """The same of 8-bit floats: x and weight as e4m3 holds them, the gradient of the losses' sum as e5m2 does."""
    losses = _Fp8Losses.apply(x, weight, targets, ignore_index)
    return losses if reduction == "sum" else losses / (targets != ignore_index).sum().clamp(min=1)  # pyright: ignore


class _Fp8Losses(torch.autograd.Function):
    """The sum of the losses, whose gradients are made with it: before whatever factor comes in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        acc = _accumulation_dtype(x)
        x8, w8 = (_held(t.to(acc), torch.float8_e4m3fn) for t in (x, weight))
        with torch.enable_grad():
            logits = (x8 @ w8.t()).to(x.dtype).requires_grad_()
            losses = cross_entropy(logits, targets, ignore_index, reduction="sum")
        gradient = _held(torch.autograd.grad(losses, logits)[0].to(acc), torch.float8_e5m2)
        ctx.save_for_backward(gradient @ w8, gradient.t() @ x8)
        ctx.dtypes = x.dtype, weight.dtype
        return losses.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx, dw = ((grad_outputs[0] * g).to(t) for g, t in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return dx, dw, None, None


def embedding(weight: Tensor, tokens: Tensor, padding_idx: int | None = None) -> Tensor:
    """Row tokens[...] of weight for each token; row `padding_idx` gets no gradient. weight: (V, D); tokens: int64."""
    return F.embedding(tokens, weight, padding_idx)


def adamw(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor] | None,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> None:
    """Update number `step`, counted from 1, in place (https://arxiv.org/abs/1711.05101, algorithm 2)."""
    finite = torch.isfinite(grad_scale) if isinstance(grad_scale, Tensor) else True
    for i, (p, m, v) in enumerate(zip(parameters, exp_avgs, exp_avg_sqs, strict=True)):
        grad = grads[i].to(p.dtype) * grad_scale
        average = m.lerp(grad, 1.0 - beta1)
        square = (v * beta2).addcmul_(grad, grad, value=1.0 - beta2)
        root = (square / (1.0 - beta2**step)).sqrt_().add_(eps)
        updated = (p * (1.0 - learning_rate * weight_decay)).addcdiv_(
            average, root, value=-learning_rate / (1.0 - beta1**step)
        )
        for old, new in ((p, updated), (m, average), (v, square)):
            old.copy_(new if finite is True else torch.where(finite, new, old))
        if copies is not None:
            copies[i].copy_(p)
