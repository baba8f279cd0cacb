"""Functions of torch.nn.functional by the same names, arguments and meaning, over `llmfast.ops`."""

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from ..errors import BackendError
from ..ops import arguments, registry
from ..ops.functional import run


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, PyTorch's own for what our kernels have not.

    query: (B, H, Tq, D); key, value: (B, Hkv, Tk, D) -> (B, H, Tq, D). `is_causal` is aligned top left, as PyTorch has
    it: query i sees keys j <= i. Masks, dropout, other shapes and dtypes without a kernel go to PyTorch's function,
    which a BackendFallbackWarning says once; `explain` says it of a call. In strict mode, and where a backend is asked
    for by name, they raise BackendError. Under autocast the three are cast, as there. A single query that needs no
    gradient runs ops.decode_attention, anything else ops.attention.
    """
    call = plan(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        fall_back("scaled_dot_product_attention", call, query.device.type)
        options = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(query, key, value, attn_mask, **options)
    op, args = call
    return run(op, None, args).transpose(1, 2)


def explain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> str:
    """What runs this call of scaled_dot_product_attention: the op and its backends, or PyTorch's function and why."""
    call = plan(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if isinstance(call, str):
        return f"scaled_dot_product_attention: PyTorch's, because {call}"
    return registry.explain(*call)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(ops.BackendFallbackWarning(message), stacklevel=4)


@torch.compiler.assume_constant_result  # a compiler runs it while it traces, so that compiled code is no quieter
def fall_back(function: str, reason: str, device: str) -> None:
    """Say once that PyTorch's attention runs in place of ours, or raise where ops.attention would: see registry.choose.

    Under a compiler that is settled while it traces, as the choice of a backend is.
    """
    asked, rows = registry.current_backend(), registry.BACKENDS["attention"]
    if any(row.name == asked for row in rows):
        raise BackendError(f"{function}: {asked} cannot run it, because {reason}; backend 'auto' runs PyTorch's")
    strict = asked == registry.AUTO and registry.strict()
    if strict and any(device in row.devices for row in rows):
        raise BackendError(f"{function}: strict mode forbids PyTorch's, and {reason}")
    _warn_once(f"{function}: PyTorch's runs, because {reason}")


Call = tuple[str, tuple[Any, ...]]  # an op of ours and its arguments, checked


def plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    window: int | None = None,
) -> Call | str:
    """The op that computes it with a kernel, or why there is none. With a `window` a query sees the last so many of the
    keys that it would see, which are those up to its own.

    For fewer queries than keys, causal from the top left means the first keys alone. Where auto would take the
    reference, which holds all the probabilities at once, PyTorch's function is better.
    """
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is not None:
        return reason
    queries, keys = query.shape[2], key.shape[2]
    if is_causal and queries < keys:
        key, value = key[:, :, :queries], value[:, :, :queries]
    query, key, value = autocast(query, key, value)
    if query.dtype != key.dtype or query.dtype != value.dtype or not query.is_floating_point():
        return "the tensors are not of one floating dtype"
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if queries == 1 and not (torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)):
        call = op, args = "decode_attention", arguments.decode_attention(q, k, v, scale=scale, window=window)
    else:
        causal = is_causal or window is not None
        call = op, args = "attention", arguments.attention(q, k, v, causal=causal, scale=scale, window=window)
    if torch.compiler.is_compiling() or registry.current_backend() != registry.AUTO:
        return call
    if registry.chosen(op, args)[0] != registry.REFERENCE:
        return call
    return "; ".join(f"{name} {reason}" for name, reason in registry.reasons(op, args).items() if reason)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as autocast would give them to PyTorch's function."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):  # which refuses to be asked of meta
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t.dtype is torch.float64 else t.to(dtype) for t in tensors)


def _why_not(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    """Why none of our ops means the same; None if one does."""
    if attn_mask is not None:
        return "attn_mask is given"
    if dropout_p != 0.0:
        return "dropout_p is not 0"
    if query.is_nested or key.is_nested or value.is_nested or not query.dim() == key.dim() == value.dim() == 4:
        return "a tensor is nested or has other than 4 dimensions"
    q, k = query.shape, key.shape  # each look at it takes a while
    if k != value.shape or q[0] != k[0] or q[3] != k[3]:
        return "key and value are not of one shape with query's batch and head_dim"
    if 0 in q or 0 in k:
        return "a tensor is empty"
    if q[1] != k[1] and not (enable_gqa and q[1] % k[1] == 0):
        return "the heads of key and value are not query's, nor shared with enable_gqa"
    if is_causal and q[2] > k[2]:
        return "is_causal aligns more queries than keys top left"
    return None
