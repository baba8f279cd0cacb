"""How torch.compile sees an op: as calls that it does not look into, so that no choice of backend breaks its graph.

The choice is made while the graph is traced, and stays. Native ops are torch's already; Triton's launchers become so
here. Importing this module imports torch's compiler, which takes a second: `functional` does so only once a compiler
is tracing it.
"""

import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import autograd, registry

NAMESPACE = "llmfast_triton"
_SCHEMA_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    None: "Tensor?",
    bool: "bool",
    int: "int",
    int | None: "int?",
    float: "float",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[bool, bool]: "bool[2]",
    tuple[bool, bool, bool]: "bool[3]",
    tuple[bool, bool, bool, bool, bool]: "bool[5]",
    tuple[int, int]: "SymInt[2]",
    tuple[int, int, int, int]: "SymInt[4]",
}


@torch.compiler.allow_in_graph
def run(op: str, backend: str | None, *args: Any) -> Any:
    """The op by the backend chosen now; the compiler follows its tensors alone."""
    kernels = registry.choose(op, backend, args)
    return autograd.apply(op, kernels and _traceable(op, kernels), args)


@functools.cache
def _traceable(op: str, kernels: ModuleType) -> ModuleType:
    """The op's functions of `kernels`, those that launch Triton kernels as ops of torch's."""
    module = ModuleType(kernels.__name__)
    for name, function in vars(kernels).items():
        if name.startswith(f"{op}_"):
            setattr(module, name, _as_torch_op(function) if name in _RESULTS and _is_triton(function) else function)
    return module


def _is_triton(function: Any) -> bool:
    return function.__module__.startswith("llmfast.kernels.")


@functools.cache
def _as_torch_op(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.ops.llmfast_triton.<name>, called and answering as `function` does.

    An op gives the same number of tensors always, so a result that is None travels as an empty one of booleans, and
    results that share memory, which an op's must not, as copies.
    """
    name = function.__name__

    def pack(results: Any, args: tuple[Any, ...]) -> list[Tensor]:
        many = results if isinstance(results, tuple) else (results,)
        like = next(t for t in args if isinstance(t, Tensor))
        return [like.new_empty(0, dtype=torch.bool) if r is None else r.contiguous() for r in many]

    parameters = inspect.signature(function, eval_str=True).parameters.values()
    schema = ", ".join(f"{_SCHEMA_TYPES[p.annotation]} {p.name}" for p in parameters)
    torch.library.define(f"{NAMESPACE}::{name}", f"({schema}) -> Tensor[]", tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(f"{NAMESPACE}::{name}", ("cpu", "cuda"), lambda *args: pack(function(*args), args))
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda *args: pack(_RESULTS[name](*args), args))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*args: Any) -> Any:
        results = [None if r.dtype == torch.bool else r for r in op(*args)]
        return results[0] if len(results) == 1 else tuple(results)

    return call


def _like(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _float(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float32)


def _fp8(x: Tensor, *shape: Any) -> Tensor:
    return x.new_empty(shape, dtype=torch.float8_e4m3fn)


def _fp8_mlp_kept(x: Tensor, up: Tensor, _: Any, down: Tensor, *options: Any) -> tuple[Tensor, ...]:
    needs, n_rows, (n_out, n_cols) = options[-1], math.prod(x.shape[:-1]), down.shape
    behind, padded = any(needs[:4]), (n_rows + 15) // 16 * 16
    return (
        x.new_empty((*x.shape[:-1], n_out)),
        _fp8(x, x.shape[-1], padded if needs[1] else 0),
        _fp8(x, up.shape[1], up.shape[0] if needs[0] else 0),
        _fp8(x, n_cols, n_out if behind else 0),
        x.new_empty((n_rows, up.shape[0]) if behind else 0),
        *(_float(x) for _ in range(5)),
    )


def _weight_gradient(x: Tensor, weight: Tensor) -> Tensor:
    """Of logits that are one chunk in bfloat16, else in float32."""
    return _like(weight) if x.dtype == torch.bfloat16 and x.shape[0] <= 2 * x.shape[1] else _float(x, *weight.shape)


def _scaled_gradient(grad: Tensor, count: Tensor, gradient: Tensor, reduction: str, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty(gradient.shape, dtype=dtype)


def _per_row(x: Tensor) -> Tensor:
    return _float(x, math.prod(x.shape[:-1]))


def _sums(x: Tensor, *wanted: bool) -> tuple[Tensor | None, ...]:
    """The gradients of vectors as long as a row."""
    return tuple(_float(x, x.shape[-1]) if w else None for w in wanted)


# What every launcher gives: tensors of the right shapes and dtypes.
_RESULTS: dict[str, Callable[..., Any]] = {
    "softmax_fwd": lambda x, mask, causal: _like(x),
    "softmax_bwd": lambda dy, y: _like(y),
    "layer_norm_fwd": lambda x, *_: (_like(x), _per_row(x), _per_row(x)),
    "layer_norm_bwd": lambda dy, x, w, mean, rstd, has_bias: (_like(x), *_sums(x, w is not None, has_bias)),
    "rms_norm_fwd": lambda x, *_: (_like(x), _per_row(x)),
    "rms_norm_bwd": lambda dy, x, w, *_: (_like(x), *_sums(x, w is not None)),
    "add_layer_norm_fwd": lambda x, *_: (_like(x), _like(x), _per_row(x), _per_row(x)),
    "add_layer_norm_bwd": lambda dy, dt, x, w, mean, rstd, has_bias: (_like(x), *_sums(x, w is not None, has_bias)),
    "add_rms_norm_fwd": lambda x, *_: (_like(x), _like(x), _per_row(x)),
    "add_rms_norm_bwd": lambda dy, dt, x, w, *_: (_like(x), *_sums(x, w is not None)),
    "gelu_fwd": lambda x, *_: _like(x),
    "gelu_bwd": lambda dy, x, *_: _like(x),
    "bias_gelu_fwd": lambda x, *_: _like(x),
    "bias_gelu_bwd": lambda dy, x, bias, *_: (_like(x), *_sums(x, bias is not None)),
    "swiglu_fwd": lambda gate, up: _like(gate),
    "swiglu_bwd": lambda dy, gate, up: (_like(gate), _like(up)),
    "geglu_fwd": lambda gate, *_: _like(gate),
    "geglu_bwd": lambda dy, gate, up, *_: (_like(gate), _like(up)),
    "activation_linear_fwd": lambda x, x_bias, up, weight, *_: (x.new_empty((*x.shape[:-1], weight.shape[0])), None),
    "activation_linear_bwd": lambda dout, x, x_bias, up, weight, kept, has_bias, activation: (
        *(_like(x), *_sums(x, x_bias is not None), None if up is None else _like(up), _like(weight)),
        _float(weight, weight.shape[0]) if has_bias else None,
    ),
    "linear_fwd": lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    "linear_bwd": lambda dout, x, weight, needs: (
        dout.new_empty((*dout.shape[:-1], weight.shape[1])) if needs[0] else None,
        _like(weight) if needs[1] else None,
        _float(weight, weight.shape[0]) if needs[2] else None,
    ),
    "fp8_linear_fwd": lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
    "fp8_linear_kept": lambda x, weight, bias, needs: (
        x.new_empty((*x.shape[:-1], weight.shape[0])),
        _fp8(x, x.shape[-1], (math.prod(x.shape[:-1]) + 15) // 16 * 16) if needs[1] else None,
        _fp8(x, weight.shape[1], weight.shape[0]) if needs[0] else None,
        _float(x),
        _float(x),
    ),
    "fp8_linear_bwd": lambda dout, x, weight, x_scale, w_scale, shape, needs: (
        dout.new_empty((*dout.shape[:-1], shape[1])) if needs[0] else None,
        dout.new_empty(shape) if needs[1] else None,
        _float(dout, shape[0]) if needs[2] else None,
    ),
    "fp8_mlp_fwd": lambda x, up, up_bias, down, *_: x.new_empty((*x.shape[:-1], down.shape[0])),
    "fp8_mlp_kept": _fp8_mlp_kept,
    "fp8_mlp_bwd": lambda dout, *args: (
        dout.new_empty((*dout.shape[:-1], args[-2][1])) if args[-1][0] else None,
        dout.new_empty(args[-2][:2]) if args[-1][1] else None,
        _float(dout, args[-2][0]) if args[-1][2] else None,
        dout.new_empty(args[-2][2:]) if args[-1][3] else None,
        _float(dout, args[-2][2]) if args[-1][4] else None,
    ),
    "mlp_fwd": lambda x, up, up_bias, down, *_: (
        x.new_empty((*x.shape[:-1], down.shape[0])),
        x.new_empty((*x.shape[:-1], up.shape[0])),
        None,
    ),
    "mlp_bwd": lambda dout, x, up, up_bias, down, h, kept, activation, needs: (
        dout.new_empty((*dout.shape[:-1], up.shape[1])) if needs[0] else None,
        _like(up) if needs[1] else None,
        _float(up, up.shape[0]) if needs[2] else None,
        _like(down) if needs[3] else None,
        _float(down, down.shape[0]) if needs[4] else None,
    ),
    "rope_fwd": lambda x, *_: _like(x),
    "rope_bwd": lambda dy, *_: _like(dy),
    "cross_entropy_fwd": lambda logits, targets, ignore_index, smoothing, z_loss, reduction, *_: (
        _float(logits, *targets.shape) if reduction == "none" else _float(logits),
        _float(logits, 2, logits.shape[0]),
        _float(logits),
    ),
    "cross_entropy_bwd": lambda grad, logits, *_: _like(logits),
    "linear_cross_entropy_fwd": lambda x, *_: _float(x),
    "linear_cross_entropy_gradients": lambda x, weight, targets, bias, *options: (
        _float(x),
        _float(x),
        _like(x) if options[-1][0] else None,
        _weight_gradient(x, weight) if options[-1][1] else None,
        _float(x, weight.shape[0]) if options[-1][2] else None,
    ),
    "linear_cross_entropy_bwd": _scaled_gradient,
    "fp8_linear_cross_entropy_fwd": lambda x, *_: _float(x),
    "fp8_linear_cross_entropy_gradients": lambda x, weight, *options: (
        _float(x),
        _float(x),
        _like(x) if options[-1][0] else None,
        _float(x, *weight.shape) if options[-1][1] else None,
    ),
    "fp8_linear_cross_entropy_bwd": _scaled_gradient,  # found by this name, though it is linear_cross_entropy's
    "embedding_bwd": lambda dy, weight, *_: _like(weight),
    "attention_fwd": lambda q, *_: (_like(q), _float(q, 2, q.shape[0], q.shape[2], q.shape[1])),
    "attention_varlen_fwd": lambda q, *_: (_like(q), _float(q, 2, q.shape[1], q.shape[0])),
    "attention_varlen_bwd": lambda dout, q, k, v, *_: (_like(q), _like(k), _like(v)),
    "attention_bwd": lambda dout, q, k, v, *_: (_like(q), _like(k), _like(v)),
    "decode_attention_fwd": lambda q, *_: _like(q),
}
