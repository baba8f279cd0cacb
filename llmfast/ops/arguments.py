"""What each op accepts: its arguments checked and completed, in the order in which backends take them.

A wrong one raises InputError with the op's name, the argument's, its value and what it must be.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .checks import (
    check_activation,
    check_alike,
    check_approximate,
    check_attention,
    check_cache,
    check_float,
    check_kind,
    check_linear,
    check_loss,
    check_residual,
    check_rows,
    check_scores,
)

Tensors = Tensor | Sequence[Tensor]


def softmax(x: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> tuple[Any, ...]:
    check_rows("softmax", x)
    if causal and x.dim() < 2:
        raise InputError(f"softmax: x has shape {tuple(x.shape)}; causal needs two dimensions, queries and keys")
    if mask is not None:
        check_kind("softmax", "mask", mask, torch.bool, x.device)
        if mask.dim() > x.dim() or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
            raise InputError(f"softmax: mask has shape {tuple(mask.shape)}; it must broadcast to x's {tuple(x.shape)}")
    return x, mask, bool(causal)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    check_rows("layer_norm", x, weight=weight, bias=bias)
    return x, weight, bias, eps


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> tuple[Any, ...]:
    check_rows("rms_norm", x, weight=weight)
    return x, weight, eps, offset


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    check_rows("add_layer_norm", x, weight=weight, bias=bias)
    check_residual("add_layer_norm", x, residual)
    return x, residual, weight, bias, eps


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[Any, ...]:
    check_rows("add_rms_norm", x, weight=weight)
    check_residual("add_rms_norm", x, residual)
    return x, residual, weight, eps, offset


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    scale = check_attention("attention", scale, q=q, k=k, v=v)
    if k.shape[0] != q.shape[0]:
        raise InputError(
            f"attention: k has shape {tuple(k.shape)} but q {tuple(q.shape)}; their batch must be the same"
        )
    check_scores("attention", causal, window, softcap)
    return q, k, v, bool(causal), scale, window, float(softcap), bool(return_lse)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
) -> tuple[Any, ...]:
    op = "attention_varlen"
    for name, t in (("q", q), ("k", k), ("v", v)):
        if isinstance(t, Tensor) and t.dim() != 3:
            raise InputError(f"{op}: {name} has shape {tuple(t.shape)}; it must be (all tokens, heads, head_dim)")
    four = {n: t[None] if isinstance(t, Tensor) else t for n, t in (("q", q), ("k", k), ("v", v))}
    scale = check_attention(op, scale, **four)
    check_scores(op, causal, window, softcap)
    for name, t in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if not isinstance(t, Tensor) or t.dim() != 1 or t.dtype != torch.int32 or t.device != q.device or len(t) < 1:
            got = f"{tuple(t.shape)} {t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
            raise InputError(f"{op}: {name} is {got}; it must be (sequences + 1,) int32 on {q.device}")
    if len(cu_seqlens_q) != len(cu_seqlens_k):
        raise InputError(f"{op}: cu_seqlens_q has {len(cu_seqlens_q)} entries but cu_seqlens_k {len(cu_seqlens_k)}")
    for name, n in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k)):
        if not isinstance(n, int) or n < 0:
            raise InputError(f"{op}: {name} is {n!r}; it must be the length of the longest sequence, an integer")
    starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    options = (bool(causal), scale, window, float(softcap), bool(return_lse))
    return q, k, v, *starts, max_seqlen_q, max_seqlen_k, *options


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
) -> tuple[Any, ...]:
    op, batch = "decode_attention", q.shape[0] if isinstance(q, Tensor) and q.dim() else 0
    scale = check_attention(op, scale, q=q, k_cache=k_cache, v_cache=v_cache)
    _no_gradient(op, q=q, k_cache=k_cache, v_cache=v_cache)
    check_cache(op, batch, k_cache, lengths, block_table)
    check_scores(op, True, window, softcap)
    return q, k_cache, v_cache, lengths, block_table, scale, window, float(softcap)


def append_kv(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *, block_table: Tensor | None = None
) -> tuple[Any, ...]:
    op = "append_kv"
    check_alike(op, k=k, v=v)
    check_alike(op, k_cache=k_cache, v_cache=v_cache)
    check_float(op, k=k, k_cache=k_cache)
    if k.dim() != 4 or k_cache.dim() != 4 or k.shape[2:] != k_cache.shape[2:] or k.dtype is not k_cache.dtype:
        got = f"k is {tuple(k.shape)} {k.dtype} and k_cache {tuple(k_cache.shape)} {k_cache.dtype}"
        raise InputError(f"{op}: {got}; they must be (B, T, Hkv, D) and (B, capacity, Hkv, D) of one dtype")
    _no_gradient(op, k=k, v=v, k_cache=k_cache, v_cache=v_cache)
    if lengths is None:
        raise InputError(f"{op}: lengths is None; it must be (B,) int32, the tokens of each sequence with the new ones")
    check_cache(op, k.shape[0], k_cache, lengths, block_table)
    return k_cache, v_cache, k, v, lengths, block_table


def _no_gradient(op: str, **tensors: Tensor) -> None:
    for name, t in tensors.items():
        if t.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{op}: {name} requires a gradient, and there is none; use no_grad, or attention")


def gelu(x: Tensor, *, approximate: str = "none") -> tuple[Any, ...]:
    check_float("gelu", x=x)
    check_approximate("gelu", approximate)
    return x, approximate


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> tuple[Any, ...]:
    check_rows("bias_gelu", x, bias=bias)
    check_approximate("bias_gelu", approximate)
    return x, bias, approximate


def swiglu(gate: Tensor, up: Tensor) -> tuple[Any, ...]:
    check_alike("swiglu", gate=gate, up=up)
    return gate, up


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> tuple[Any, ...]:
    check_alike("geglu", gate=gate, up=up)
    check_approximate("geglu", approximate)
    return gate, up, approximate


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    check_linear("linear", "x", x, weight, bias)
    return x, weight, bias


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    check_linear("fp8_linear", "x", x, weight, bias)
    _check_fp8("fp8_linear", weight=weight)
    return x, weight, bias


def _check_fp8(op: str, **weights: Tensor) -> None:
    for name, weight in weights.items():
        if weight.shape[0] % 16 or weight.shape[1] % 16 or 0 in weight.shape:
            raise InputError(f"{op}: {name} is {tuple(weight.shape)}; both must be multiples of 16, and not 0")


def fp8_mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
) -> tuple[Any, ...]:
    _check_mlp("fp8_mlp", x, up, up_bias, down, down_bias, activation)
    _check_fp8("fp8_mlp", up=up, down=down)
    return x, up, up_bias, down, down_bias, activation


def mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: str = "gelu",
) -> tuple[Any, ...]:
    _check_mlp("mlp", x, up, up_bias, down, down_bias, activation)
    return x, up, up_bias, down, down_bias, activation


def _check_mlp(
    op: str, x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> None:
    check_linear(op, "x", x, up, up_bias, ("up", "up_bias"))
    check_float(op, x=x, down=down)
    if down.dim() != 2 or up.shape[0] not in (down.shape[1], 2 * down.shape[1]):
        shapes = f"up is {tuple(up.shape)} and down {tuple(down.shape)}"
        raise InputError(f"{op}: {shapes}; they must be (F, N), or gated (2 F, N), and (M, F)")
    check_linear(op, "x", x.new_empty((0, down.shape[1])), down, down_bias, ("down", "down_bias"))
    check_activation(op, activation)


def activation_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    x_bias: Tensor | None = None,
    activation: str = "gelu",
) -> tuple[Any, ...]:
    op = "activation_linear"
    check_linear(op, "x", x, weight, bias)
    check_rows(op, x, x_bias=x_bias)
    if up is not None:
        check_alike(op, x=x, up=up)
    check_activation(op, activation)
    return x, x_bias, up, weight, bias, activation


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Any, ...]:
    check_float("rope", x=x, cos=cos, sin=sin)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise InputError(
            f"rope: x has shape {tuple(x.shape)}; it must be (batch, length, heads, head_dim), head_dim even"
        )
    batch, length, _, head_dim = x.shape
    table, by_row = (length, head_dim // 2), (batch, length, head_dim // 2)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != (by_row if cos.dim() == 3 else table):
            raise InputError(
                f"rope: {name} has shape {tuple(t.shape)}; with x {tuple(x.shape)} cos and sin must be {table}, or"
                f" {by_row} of positions by row"
            )
    return x, cos, sin, bool(interleaved)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
    n_classes: int | None = None,
    in_place: bool = False,
) -> tuple[Any, ...]:
    check_float("cross_entropy", logits=logits)
    check_kind("cross_entropy", "targets", targets, torch.int64, logits.device)
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"logits are {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        raise InputError(f"cross_entropy: {shapes}; they must be (N, V) and (N,)")
    check_loss("cross_entropy", label_smoothing, z_loss, reduction)
    classes = logits.shape[1]
    if n_classes is not None and not 0 < n_classes <= classes:
        raise InputError(f"cross_entropy: n_classes is {n_classes}; of {classes} columns it can be 1 to {classes}")
    options = ignore_index, float(label_smoothing), float(z_loss), reduction, n_classes or classes
    return logits, targets, *options, bool(in_place)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> tuple[Any, ...]:
    op = "linear_cross_entropy"
    check_linear(op, "x", x, weight, bias)
    _check_targets(op, x, targets)
    check_loss(op, label_smoothing, z_loss, reduction)
    return x, weight, targets, bias, ignore_index, float(label_smoothing), float(z_loss), reduction


def _check_targets(op: str, x: Tensor, targets: Tensor) -> None:
    check_kind(op, "targets", targets, torch.int64, x.device)
    if x.dim() != 2 or targets.shape != x.shape[:1]:
        shapes = f"x is {tuple(x.shape)} and targets {tuple(targets.shape)}"
        raise InputError(f"{op}: {shapes}; they must be (N, D) and (N,)")


def fp8_linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> tuple[Any, ...]:
    op = "fp8_linear_cross_entropy"
    check_linear(op, "x", x, weight, None)
    _check_targets(op, x, targets)
    if weight.shape[1] % 16 or 0 in weight.shape:
        raise InputError(
            f"{op}: weight is {tuple(weight.shape)}; it must be (V, D), D a multiple of 16, none of them 0"
        )
    if reduction not in ("mean", "sum"):
        raise InputError(f"{op}: reduction is {reduction!r}; it must be 'mean' or 'sum'")
    return x, weight, targets, ignore_index, reduction


def embedding(weight: Tensor, tokens: Tensor, *, padding_idx: int | None = None) -> tuple[Any, ...]:
    check_float("embedding", weight=weight)
    check_kind("embedding", "tokens", tokens, torch.int64, weight.device)
    if weight.dim() != 2:
        raise InputError(f"embedding: weight has shape {tuple(weight.shape)}; it must be (V, D)")
    rows = weight.shape[0]
    if padding_idx is not None and not -rows <= padding_idx < rows:
        raise InputError(f"embedding: padding_idx is {padding_idx}; of {rows} rows it can be {-rows} to {rows - 1}")
    return weight, tokens, None if padding_idx is None else padding_idx % rows


def adamw(
    parameters: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    copies: Tensors | None = None,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float | Tensor = 1.0,
) -> tuple[Any, ...]:
    given = {"parameters": parameters, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    given |= {} if copies is None else {"copies": copies}
    lists = {name: [t] if isinstance(t, Tensor) else list(t) for name, t in given.items()}
    first = lists["parameters"]
    for name, tensors in lists.items():
        if not tensors or len(tensors) != len(first):
            raise InputError(
                f"adamw: {name} holds {len(tensors)} tensors; as many as parameters' {len(first)}, at least 1"
            )
        check_float("adamw", **{"parameters": first[0], name: tensors[0]})
        dtype, device = tensors[0].dtype, first[0].device
        if dtype != first[0].dtype and name not in ("grads", "copies"):
            raise InputError(f"adamw: {name} has dtype {dtype}; it must be the parameters', {first[0].dtype}")
        for p, t in zip(first, tensors, strict=True):
            if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device or t.shape != p.shape:
                got = f"{tuple(t.shape)} {t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
                raise InputError(
                    f"adamw: {name} has one of {got}; it must be its parameter's shape, {dtype} on {device}"
                )
    if step < 1:
        raise InputError(f"adamw: step is {step}; the first update is number 1")
    if isinstance(grad_scale, Tensor) and (grad_scale.numel() != 1 or grad_scale.device != first[0].device):
        raise InputError(
            f"adamw: grad_scale is {tuple(grad_scale.shape)} on {grad_scale.device}; give one number there"
        )
    tensors = (*(lists[name] for name in ("parameters", "grads", "exp_avgs", "exp_avg_sqs")), lists.get("copies"))
    return *tensors, step, learning_rate, *betas, eps, weight_decay, grad_scale


ARGUMENTS = {
    "softmax": softmax,
    "layer_norm": layer_norm,
    "attention": attention,
    "attention_varlen": attention_varlen,
    "decode_attention": decode_attention,
    "rms_norm": rms_norm,
    "add_layer_norm": add_layer_norm,
    "add_rms_norm": add_rms_norm,
    "gelu": gelu,
    "bias_gelu": bias_gelu,
    "swiglu": swiglu,
    "geglu": geglu,
    "linear": linear,
    "fp8_linear": fp8_linear,
    "fp8_mlp": fp8_mlp,
    "activation_linear": activation_linear,
    "mlp": mlp,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "fp8_linear_cross_entropy": fp8_linear_cross_entropy,
    "embedding": embedding,
    "append_kv": append_kv,
    "adamw": adamw,
}
