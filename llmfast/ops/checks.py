"""Checks that the arguments of several ops share. What fails raises InputError, as `arguments` says."""

import math

import torch
from torch import Tensor

from ..errors import InputError

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def check_float(op: str, **tensors: Tensor) -> None:
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


def check_kind(op: str, name: str, t: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    """t is a tensor of this dtype on this device."""
    if not isinstance(t, Tensor) or t.dtype is not dtype or t.device != device:
        got = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
        raise InputError(f"{op}: {name} is {got}; it must be a {dtype} tensor on {device}")


def check_rows(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """x has a last dimension N, and each parameter that is there is (N,), of x's dtype or of float32."""
    present = {name: p for name, p in parameters.items() if p is not None}
    check_float(op, x=x, **present)
    length, dtype = x.shape[-1] if x.dim() else 0, x.dtype
    if length == 0:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; its last dimension must hold at least one element")
    for name, p in present.items():
        if p.shape != (length,):
            raise InputError(f"{op}: {name} has shape {tuple(p.shape)}; it must be ({length},), as x's last dimension")
        if p.dtype is not dtype and p.dtype is not torch.float32:
            allowed = " or ".join(dict.fromkeys((str(dtype), "torch.float32")))
            raise InputError(f"{op}: {name} has dtype {p.dtype}; with this x it must be {allowed}")


def check_approximate(op: str, approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise InputError(f"{op}: approximate is {approximate!r}; it must be 'none' or 'tanh'")


def check_activation(op: str, activation: str) -> None:
    if activation not in ("silu", "gelu", "gelu_tanh"):
        raise InputError(f"{op}: activation is {activation!r}; it must be 'silu', 'gelu' or 'gelu_tanh'")


def check_residual(op: str, x: Tensor, residual: Tensor) -> None:
    check_float(op, x=x, residual=residual)
    if residual.shape != x.shape or residual.dtype is not x.dtype:
        raise InputError(
            f"{op}: residual is {tuple(residual.shape)} {residual.dtype}; it must be as x, {tuple(x.shape)} {x.dtype}"
        )


def check_attention(op: str, scale: float | None, **tensors: Tensor) -> float:
    """q, keys and values have four dimensions, one dtype and device, and heads that fit; the scale to use."""
    check_float(op, **tensors)
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


def check_scores(op: str, causal: bool, window: int | None, softcap: float) -> None:
    if window is not None and (type(window) is not int or window < 1 or not causal):
        remedy = "it must be a positive integer, with causal=True" if causal else "it needs causal=True"
        raise InputError(f"{op}: window is {window!r}; {remedy}")
    if not 0.0 <= softcap < math.inf:
        raise InputError(f"{op}: softcap is {softcap}; it must be positive and finite, or 0 for none")


def check_alike(op: str, **tensors: Tensor) -> None:
    """Two tensors of one shape and dtype."""
    check_float(op, **tensors)
    (name, x), (other, y) = tensors.items()
    if x.shape != y.shape or x.dtype != y.dtype:
        raise InputError(f"{op}: {name} is {tuple(x.shape)} {x.dtype} but {other} {tuple(y.shape)} {y.dtype}")


def check_cache(op: str, batch: int, k_cache: Tensor, lengths: Tensor | None, block_table: Tensor | None) -> None:
    """k_cache: (B, capacity, ...), or pages where there is a block_table (B, max_pages); lengths: (B,) or None."""
    device = k_cache.device
    if lengths is not None:
        check_kind(op, "lengths", lengths, torch.int32, device)
        if lengths.shape != (batch,):
            shape = tuple(lengths.shape)
            raise InputError(f"{op}: lengths have shape {shape}; they must be ({batch},), one a sequence")
    if block_table is not None:
        check_kind(op, "block_table", block_table, torch.int32, device)
        if block_table.dim() != 2 or block_table.shape[0] != batch:
            raise InputError(f"{op}: block_table is {tuple(block_table.shape)}; it must be ({batch}, max_pages)")
        if 0 in k_cache.shape[:2]:
            raise InputError(f"{op}: k_cache has shape {tuple(k_cache.shape)}; it must hold a page of at least one key")
    elif k_cache.shape[0] != batch:
        raise InputError(
            f"{op}: k_cache has shape {tuple(k_cache.shape)} but there are {batch} sequences; give it as many, or a"
            " block_table"
        )


def check_linear(
    op: str, name: str, x: Tensor, weight: Tensor, bias: Tensor | None, called: tuple[str, str] = ("weight", "bias")
) -> None:
    """weight is (M, N) and bias (M,) or None for x of (..., N), of one dtype, which for the bias may be float32, too;
    `name` is what x is called."""
    weight_name, bias_name = called
    layer = {weight_name: weight} | ({} if bias is None else {bias_name: bias})
    check_float(op, **{name: x}, **layer)
    if x.dim() == 0 or weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        shapes = f"{name} is {tuple(x.shape)} and {weight_name} {tuple(weight.shape)}"
        raise InputError(f"{op}: {shapes}; they must be (..., N) and (M, N)")
    if bias is not None and bias.shape != weight.shape[:1]:
        must = f"({weight.shape[0]},), as {weight_name}'s rows"
        raise InputError(f"{op}: {bias_name} has shape {tuple(bias.shape)}; it must be {must}")
    for other, t in layer.items():
        if t.dtype is not x.dtype and (t is weight or t.dtype is not torch.float32):
            raise InputError(f"{op}: {other} has dtype {t.dtype} but {name} {x.dtype}; cast them to one dtype")


def check_loss(op: str, label_smoothing: float, z_loss: float, reduction: str) -> None:
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"{op}: reduction is {reduction!r}; it must be 'mean', 'sum' or 'none'")
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"{op}: label_smoothing is {label_smoothing}; it must be from 0 to 1")
    if not 0.0 <= z_loss < math.inf:
        raise InputError(f"{op}: z_loss is {z_loss}; it must be 0 or more")
