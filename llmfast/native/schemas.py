"""The schemas of the native ops, `torch.ops.llmfast.*`, and their shapes for torch.compile.

Both libraries implement them, each for its dispatch key. Gradients are not registered here: `llmfast.ops.autograd` has
one function per op over every backend.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


@functools.cache
def define() -> torch.library.Library:
    """Define every op, once a process; the result keeps them defined."""
    library = torch.library.Library("llmfast", "DEF")
    for schema, fake in _OPS:
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"llmfast::{schema.split('(')[0]}", fake, lib=library)
    return library


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _float(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _attention_statistics(q: Tensor) -> Tensor:
    batch, length, heads, _ = q.shape
    return _float(q, 2, batch, heads, length)


def _n_rows(x: Tensor) -> Any:
    return math.prod(x.shape[:-1])


_OPS: list[tuple[str, Callable[..., Any]]] = [
    ("softmax_fwd(Tensor x) -> Tensor", _like),
    ("softmax_bwd(Tensor dy, Tensor y) -> Tensor", lambda dy, y: _like(y)),
    (
        "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
        lambda x, weight, bias, eps: (_like(x), _float(x, _n_rows(x)), _float(x, _n_rows(x))),
    ),
    (
        "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
        lambda dy, x, weight, mean, rstd: (_like(x), _float(x, x.shape[-1]), _float(x, x.shape[-1])),
    ),
    (
        "rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)",
        lambda x, weight, eps: (_like(x), _float(x, _n_rows(x))),
    ),
    (
        "rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd) -> (Tensor, Tensor)",
        lambda dy, x, weight, rstd: (_like(x), _float(x, x.shape[-1])),
    ),
    ("bias_gelu_fwd(Tensor x, Tensor? bias, bool tanh) -> Tensor", lambda x, bias, tanh: _like(x)),
    (
        "bias_gelu_bwd(Tensor dy, Tensor x, Tensor? bias, bool tanh) -> (Tensor, Tensor)",
        lambda dy, x, bias, tanh: (_like(x), _float(x, 0 if bias is None else x.shape[-1])),
    ),
    ("swiglu_fwd(Tensor gate, Tensor up) -> Tensor", lambda gate, up: _like(gate)),
    (
        "swiglu_bwd(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
        lambda dy, gate, up: (_like(gate), _like(up)),
    ),
    ("rope(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor", lambda x, cos, sin, inverse: _like(x)),
    (
        "cross_entropy_fwd(Tensor logits, Tensor targets, int ignore_index) -> (Tensor, Tensor, Tensor)",
        lambda logits, targets, ignore_index: (_float(logits), _float(logits, 2, logits.shape[0]), _float(logits)),
    ),
    (
        "cross_entropy_bwd(Tensor grad, Tensor logits, Tensor targets, Tensor statistics, Tensor count,"
        " int ignore_index) -> Tensor",
        lambda grad, logits, *_: _like(logits),
    ),
    (
        "attention_fwd(Tensor q, Tensor k, Tensor v, bool causal, float scale, bool statistics) -> (Tensor, Tensor)",
        lambda q, k, v, causal, scale, statistics: (_like(q), _attention_statistics(q) if statistics else _float(q, 0)),
    ),
    (
        "attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor statistics, bool causal,"
        " float scale) -> (Tensor, Tensor, Tensor)",
        lambda dout, q, k, v, *_: (_like(q), _like(k), _like(v)),
    ),
    (
        "adamw_(Tensor(a!) parameter, Tensor grad, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, float learning_rate,"
        " float beta1, float beta2, float eps, float weight_decay, float correction1, float correction2,"
        " float grad_scale) -> ()",
        lambda *_: None,
    ),
]
