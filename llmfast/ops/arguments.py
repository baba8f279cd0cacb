"""What each op accepts: its arguments checked and completed, in the order in which backends take them.

A wrong one raises InputError with the op's name, the argument's, its value and what it must be.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

Tensors = Tensor | Sequence[Tensor]
FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def _check_float(op: str, **tensors: Tensor) -> None:
    """All tensors are floating point and on the first one's device."""
    device = None
    for name, t in tensors.items():
        if not isinstance(t, Tensor):
            raise InputError(f"{op}: {name} must be a torch.Tensor, not {type(t).__name__}")
        if t.dtype not in FLOATS:
            raise InputError(f"{op}: {name} has dtype {t.dtype}; it must be a floating-point tensor")
        device = device or t.device
        if t.device != device:
            raise InputError(f"{op}: {name} is on {t.device} but {next(iter(tensors))} on {device}; move it there")


def _check_kind(op: str, name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """t is a tensor of this dtype on this device."""
    if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device:
        got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"{op}: {name} is {got}; it must be a {dtype} tensor on {device}")


def _check_rows(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """x has a last dimension N, and each parameter that is there is (N,), of x's dtype or of float32."""
    present = {name: p for name, p in parameters.items() if p is not None}
    _check_float(op, x=x, **present)
    length, dtype = x.shape[-1] if x.dim() else 0, x.dtype
    if length == 0:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; its last dimension must hold at least one element")
    for name, p in present.items():
        if p.shape != (length,):
            raise InputError(f"{op}: {name} has shape {tuple(p.shape)}; it must be ({length},), as x's last dimension")
        if p.dtype is not dtype and p.dtype is not torch.float32:
            allowed = " or ".join(dict.fromkeys((str(dtype), "torch.float32")))
            raise InputError(f"{op}: {name} has dtype {p.dtype}; with this x it must be {allowed}")


def _check_approximate(op: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise InputError(f"{op}: approximate is {approximate!r}; it must be 'none' or 'tanh'")


def softmax(x: Tensor, *, mask: Tensor | None = None, causal: bool = False) -> tuple[Any, ...]:
    _check_rows("softmax", x)
    if causal and x.dim() < 2:
        raise InputError(f"softmax: x has shape {tuple(x.shape)}; causal needs two dimensions, queries and keys")
    if mask is not None:
        _check_kind("softmax", "mask", mask, torch.bool, x.device)
        if mask.dim() > x.dim() or any(m not in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)):
            raise InputError(f"softmax: mask has shape {tuple(mask.shape)}; it must broadcast to x's {tuple(x.shape)}")
    return x, mask, bool(causal)


def layer_norm(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    _check_rows("layer_norm", x, weight=weight, bias=bias)
    return x, weight, bias, eps


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0) -> tuple[Any, ...]:
    _check_rows("rms_norm", x, weight=weight)
    return x, weight, eps, offset


def _check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    _check_float(op, x=x, residual=residual)
    if residual.shape != x.shape or residual.dtype is not x.dtype:
        raise InputError(
            f"{op}: residual is {tuple(residual.shape)} {residual.dtype}; it must be as x, {tuple(x.shape)} {x.dtype}"
        )


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    _check_rows("add_layer_norm", x, weight=weight, bias=bias)
    _check_residual("add_layer_norm", x, residual)
    return x, residual, weight, bias, eps


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0
) -> tuple[Any, ...]:
    _check_rows("add_rms_norm", x, weight=weight)
    _check_residual("add_rms_norm", x, residual)
    return x, residual, weight, eps, offset


def _check_attention(op: str, scale: float | None, **tensors: Tensor) -> float:
    """q, keys and values have four dimensions, one dtype and device, and heads that fit; the scale to use."""
    _check_float(op, **tensors)
    (_, q), (k_name, k), (v_name, v) = tensors.items()
    for name, t in tensors.items():
        if t.dim() != 4:
            raise InputError(f"{op}: {name} has shape {tuple(t.shape)}; it must be (batch, length, heads, head_dim)")
        if t.dtype != q.dtype:
            raise InputError(f"{op}: {name} has dtype {t.dtype} but q {q.dtype}; cast them to one dtype")
    if k.shape != v.shape:
        raise InputError(f"{op}: {k_name} has shape {tuple(k.shape)} but {v_name} {tuple(v.shape)}; they must be equal")
    heads, head_dim = q.shape[2:]
    if k.shape[3] != head_dim or head_dim == 0:
        raise InputError(
            f"{op}: {k_name} has shape {tuple(k.shape)} but q {tuple(q.shape)}; their head_dim must be the same, not 0"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise InputError(
            f"{op}: {heads} query heads cannot share {k.shape[2]} key heads; q's heads must be a multiple of {k_name}'s"
        )
    if scale is not None and not math.isfinite(scale):
        raise InputError(f"{op}: scale is {scale}; it must be finite")
    return 1.0 / math.sqrt(head_dim) if scale is None else float(scale)


def _check_scores(op: str, causal: bool, window: int | None, softcap: float) -> None:
    if window is not None and (type(window) is not int or window < 1 or not causal):
        remedy = "it must be a positive integer, with causal=True" if causal else "it needs causal=True"
        raise InputError(f"{op}: window is {window!r}; {remedy}")
    if not 0.0 <= softcap < math.inf:
        raise InputError(f"{op}: softcap is {softcap}; it must be positive and finite, or 0 for none")


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
    scale = _check_attention("attention", scale, q=q, k=k, v=v)
    if k.shape[0] != q.shape[0]:
        raise InputError(
            f"attention: k has shape {tuple(k.shape)} but q {tuple(q.shape)}; their batch must be the same"
        )
    _check_scores("attention", causal, window, softcap)
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
    scale = _check_attention(op, scale, **four)
    _check_scores(op, causal, window, softcap)
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
) -> tuple[Any, ...]:
    op, batch = "decode_attention", q.shape[0] if isinstance(q, Tensor) and q.dim() else 0
    scale = _check_attention(op, scale, q=q, k_cache=k_cache, v_cache=v_cache)
    for name, t in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
        if t.requires_grad and torch.is_grad_enabled():
            raise InputError(f"{op}: {name} requires a gradient, and there is none; use no_grad, or attention")
    if lengths is not None:
        _check_kind(op, "lengths", lengths, torch.int32, q.device)
        if lengths.shape != (batch,):
            shape = tuple(lengths.shape)
            raise InputError(f"{op}: lengths have shape {shape}; they must be ({batch},), one a sequence")
    if block_table is not None:
        _check_kind(op, "block_table", block_table, torch.int32, q.device)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise InputError(f"{op}: block_table is {tuple(block_table.shape)}; it must be ({batch}, max_pages)")
        if 0 in k_cache.shape[:2]:
            raise InputError(f"{op}: k_cache has shape {tuple(k_cache.shape)}; it must hold a page of at least one key")
    elif k_cache.shape[0] != batch:
        raise InputError(
            f"{op}: k_cache has shape {tuple(k_cache.shape)} but q {tuple(q.shape)}; their batch must be the same,"
            " or give a block_table"
        )
    return q, k_cache, v_cache, lengths, block_table, scale


def gelu(x: Tensor, *, approximate: str = "none") -> tuple[Any, ...]:
    _check_float("gelu", x=x)
    _check_approximate("gelu", approximate)
    return x, approximate


def bias_gelu(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> tuple[Any, ...]:
    _check_rows("bias_gelu", x, bias=bias)
    _check_approximate("bias_gelu", approximate)
    return x, bias, approximate


def _check_alike(op: str, **tensors: Tensor) -> None:
    """Two tensors of one shape and dtype."""
    _check_float(op, **tensors)
    (name, x), (other, y) = tensors.items()
    if x.shape != y.shape or x.dtype != y.dtype:
        raise InputError(f"{op}: {name} is {tuple(x.shape)} {x.dtype} but {other} {tuple(y.shape)} {y.dtype}")


def swiglu(gate: Tensor, up: Tensor) -> tuple[Any, ...]:
    _check_alike("swiglu", gate=gate, up=up)
    return gate, up


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "tanh") -> tuple[Any, ...]:
    _check_alike("geglu", gate=gate, up=up)
    _check_approximate("geglu", approximate)
    return gate, up, approximate


def _check_linear(op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """weight is (M, N) and bias (M,) or None for x of (..., N), of one dtype, which for the bias may be float32, too;
    `name` is what x is called."""
    layer = {"weight": weight} | ({} if bias is None else {"bias": bias})
    _check_float(op, **{name: x}, **layer)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        shapes = f"{name} is {tuple(x.shape)} and weight {tuple(weight.shape)}"
        raise InputError(f"{op}: {shapes}; they must be (..., N) and (M, N)")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise InputError(f"{op}: bias has shape {tuple(bias.shape)}; it must be ({weight.shape[0]},), as weight's rows")
    for other, t in layer.items():
        if t.dtype is not x.dtype and (t is weight or t.dtype is not torch.float32):
            raise InputError(f"{op}: {other} has dtype {t.dtype} but {name} {x.dtype}; cast them to one dtype")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Any, ...]:
    _check_linear("linear", "x", x, weight, bias)
    return x, weight, bias


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
    _check_linear(op, "x", x, weight, bias)
    _check_rows(op, x, x_bias=x_bias)
    if up is not None:
        _check_alike(op, x=x, up=up)
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise InputError(f"{op}: activation is {activation!r}; it must be 'silu', 'gelu' or 'gelu_tanh'")
    return x, x_bias, up, weight, bias, activation


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> tuple[Any, ...]:
    _check_float("rope", x=x, cos=cos, sin=sin)
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


def _check_loss(op: str, label_smoothing: float, z_loss: float, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"{op}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"{op}: label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if not 0.0 <= z_loss < math.inf:
        raise InputError(f"{op}: z_loss is {z_loss}; it must be 0 or more")


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
    _check_float("cross_entropy", logits=logits)
    _check_kind("cross_entropy", "targets", targets, torch.int64, logits.device)
    if logits.dim() != 2 or targets.shape != logits.shape[:1]:
        shapes = f"logits are {tuple(logits.shape)} and targets {tuple(targets.shape)}"
        raise InputError(f"cross_entropy: {shapes}; they must be (N, V) and (N,)")
    _check_loss("cross_entropy", label_smoothing, z_loss, reduction)
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
    _check_linear(op, "x", x, weight, bias)
    _check_kind(op, "targets", targets, torch.int64, x.device)
    if x.dim() != 2 or targets.shape != x.shape[:1]:
        shapes = f"x is {tuple(x.shape)} and targets {tuple(targets.shape)}"
        raise InputError(f"{op}: {shapes}; they must be (N, D) and (N,)")
    _check_loss(op, label_smoothing, z_loss, reduction)
    return x, weight, targets, bias, ignore_index, float(label_smoothing), float(z_loss), reduction


def embedding(weight: Tensor, tokens: Tensor, *, padding_idx: int | None = None) -> tuple[Any, ...]:
    _check_float("embedding", weight=weight)
    _check_kind("embedding", "tokens", tokens, torch.int64, weight.device)
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
        _check_float("adamw", **{"parameters": first[0], name: tensors[0]})
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
    "activation_linear": activation_linear,
    "rope": rope,
    "cross_entropy": cross_entropy,
    "linear_cross_entropy": linear_cross_entropy,
    "embedding": embedding,
    "adamw": adamw,
}
