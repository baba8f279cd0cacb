"""The public ops: signature, shapes, validation and dispatch. Every one takes `backend=` and is differentiable.

Tensors may have any strides; the result has the first tensor's dtype. A wrong argument raises InputError with its name.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InputError
from ..hardware import several_gpus
from . import autograd, reference, registry

FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}


def softmax(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Softmax over the last dimension. x: (..., N) -> (..., N)."""
    return _run("softmax", backend, _softmax_args(x))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension. x: (..., N); weight, bias: (N,), of x's dtype or float32."""
    return _run("layer_norm", backend, _layer_norm_args(x, weight, bias, eps))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention. q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) -> (B, Tq, H, D).

    H is a multiple of Hkv (grouped-query attention). `causal` is aligned bottom right: query i sees keys
    j <= i + Tk - Tq; a query that sees no key gives zeros. `scale` is 1/sqrt(D) by default.
    """
    return _run("attention", backend, _attention_args(q, k, v, causal=causal, scale=scale))


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, backend: str | None = None) -> Tensor:
    """Root-mean-square normalisation over the last dimension. x: (..., N); weight: (N,), of x's dtype or float32."""
    return _run("rms_norm", backend, _rms_norm_args(x, weight, eps))


def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: str | None = None) -> Tensor:
    """x * Phi(x), element by element; `approximate="tanh"` is GPT-2's."""
    return _run("gelu", backend, _gelu_args(x, approximate=approximate))


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: Literal["none", "tanh"] = "none",
    backend: str | None = None,
) -> Tensor:
    """gelu(x + bias): a linear layer's bias and activation in one pass. x: (..., N); bias: (N,), as layer_norm's."""
    return _run("bias_gelu", backend, _bias_gelu_args(x, bias, approximate=approximate))


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, element by element; both of one shape and dtype."""
    return _run("swiglu", backend, _swiglu_args(gate, up))


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str | None = None) -> Tensor:
    """Rotary position embedding, half layout. x: (B, T, H, D) with D even; cos, sin: (T, D/2)."""
    return _run("rope", backend, _rope_args(x, cos, sin))


def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, backend: str | None = None) -> Tensor:
    """Mean negative log-likelihood, in nats, over the targets that are not `ignore_index`; 0 if there are none.

    logits: (N, V); targets: (N,) int64 in [0, V). Returns a float32 scalar (float64 for float64 logits).
    """
    return _run("cross_entropy", backend, _cross_entropy_args(logits, targets, ignore_index=ignore_index))


def adamw_(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float = 1.0,
    backend: str | None = None,
) -> None:
    """AdamW's update of `parameter` and both moments, in place and in one pass, for the gradient grad * grad_scale.

    All four of one shape, dtype and device; `step` counts from 1. Nothing is differentiated through it.
    """
    settings = {"learning_rate": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    args = _adamw_args(parameter, grad, exp_avg, exp_avg_sq, step=step, grad_scale=grad_scale, **settings)
    kernels = registry.choose("adamw", backend, args)
    with torch.no_grad():
        (reference.adamw if kernels is None else kernels.adamw_fwd)(*args)


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Every backend of `op` for this call, a line each: whether it is chosen, and by what, or why it cannot run.

    Takes the arguments of the op, without `backend=`.
    """
    if op not in _ARGS:
        raise InputError(f"unknown op {op!r}; choose one of: {', '.join(_ARGS)}")
    full = _ARGS[op](*args, **kwargs)
    chosen, asked = registry.chosen(op, full), registry.current_backend()
    how = "chosen by auto" if asked == registry.AUTO else f"chosen, as {asked} is asked for"
    lines = []
    for name, reason in registry.reasons(op, full).items():
        lines.append(f"{op}: {name}: {reason or ('can run' if name != chosen else how)}")
    return "\n".join(lines)


def _run(op: str, backend: str | None, args: tuple[Any, ...]) -> Tensor:
    if torch.compiler.is_compiling():
        from . import compiled

        return compiled.run(op, backend, *args)
    kernels = registry.choose(op, backend, args)
    x = args[0]
    if kernels is None or not x.is_cuda or not several_gpus() or x.get_device() == torch.cuda.current_device():
        return autograd.apply(op, kernels, args)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors'
        return autograd.apply(op, kernels, args)


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


def _softmax_args(x: Tensor) -> tuple[Any, ...]:
    _check_rows("softmax", x)
    return (x,)


def _layer_norm_args(
    x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Any, ...]:
    _check_rows("layer_norm", x, weight=weight, bias=bias)
    return x, weight, bias, eps


def _rms_norm_args(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> tuple[Any, ...]:
    _check_rows("rms_norm", x, weight=weight)
    return x, weight, eps


def _attention_args(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, scale: float | None = None
) -> tuple[Any, ...]:
    _check_float("attention", q=q, k=k, v=v)
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.dim() != 4:
            raise InputError(
                f"attention: {name} has shape {tuple(t.shape)}; it must be (batch, length, heads, head_dim)"
            )
        if t.dtype != q.dtype:
            raise InputError(f"attention: {name} has dtype {t.dtype} but q {q.dtype}; cast them to one dtype")
    if k.shape != v.shape:
        raise InputError(f"attention: k has shape {tuple(k.shape)} but v {tuple(v.shape)}; they must be equal")
    batch, _, heads, head_dim = q.shape
    if k.shape[0] != batch or k.shape[3] != head_dim or head_dim == 0:
        raise InputError(
            f"attention: k has shape {tuple(k.shape)} but q {tuple(q.shape)}; k must be ({batch}, Tk, Hkv, {head_dim})"
        )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise InputError(
            f"attention: {heads} query heads cannot share {k.shape[2]} key heads; q's heads must be a multiple of k's"
        )
    if scale is None:
        scale = 1.0 / math.sqrt(head_dim)
    elif not math.isfinite(scale):
        raise InputError(f"attention: scale is {scale}; it must be finite")
    return q, k, v, bool(causal), float(scale)


def _gelu_args(x: Tensor, *, approximate: str = "none") -> tuple[Any, ...]:
    _check_float("gelu", x=x)
    _check_approximate("gelu", approximate)
    return x, approximate


def _bias_gelu_args(x: Tensor, bias: Tensor | None = None, *, approximate: str = "none") -> tuple[Any, ...]:
    _check_rows("bias_gelu", x, bias=bias)
    _check_approximate("bias_gelu", approximate)
    return x, bias, approximate


def _swiglu_args(gate: Tensor, up: Tensor) -> tuple[Any, ...]:
    _check_float("swiglu", gate=gate, up=up)
    if gate.shape != up.shape or gate.dtype != up.dtype:
        raise InputError(f"swiglu: gate is {tuple(gate.shape)} {gate.dtype} but up {tuple(up.shape)} {up.dtype}")
    return gate, up


def _rope_args(x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Any, ...]:
    _check_float("rope", x=x, cos=cos, sin=sin)
    if x.dim() != 4 or x.shape[-1] % 2:
        raise InputError(
            f"rope: x has shape {tuple(x.shape)}; it must be (batch, length, heads, head_dim), head_dim even"
        )
    expected = (x.shape[1], x.shape[3] // 2)
    for name, t in (("cos", cos), ("sin", sin)):
        if t.shape != expected:
            raise InputError(f"rope: {name} has shape {tuple(t.shape)}; with x {tuple(x.shape)} it must be {expected}")
    return x, cos, sin


def _cross_entropy_args(logits: Tensor, targets: Tensor, *, ignore_index: int = -100) -> tuple[Any, ...]:
    _check_float("cross_entropy", logits=logits)
    if not isinstance(targets, Tensor):
        raise InputError(f"cross_entropy: targets must be a torch.Tensor, not {type(targets).__name__}")
    if targets.device != logits.device:
        raise InputError(
            f"cross_entropy: targets are on {targets.device} but logits on {logits.device}; move them there"
        )
    if logits.dim() != 2 or targets.shape != logits.shape[:1] or targets.dtype != torch.int64:
        raise InputError(
            f"cross_entropy: logits are {tuple(logits.shape)} and targets {tuple(targets.shape)} {targets.dtype};"
            " they must be (N, V) and (N,) torch.int64"
        )
    return logits, targets, ignore_index


def _adamw_args(
    parameter: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float = 1.0,
) -> tuple[Any, ...]:
    tensors = {"parameter": parameter, "grad": grad, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    _check_float("adamw", parameter=parameter, grad=grad, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    for name, t in tensors.items():
        if t.shape != parameter.shape or t.dtype != parameter.dtype:
            raise InputError(
                f"adamw: {name} is {tuple(t.shape)} {t.dtype} but parameter {tuple(parameter.shape)} {parameter.dtype}"
            )
    if step < 1:
        raise InputError(f"adamw: step is {step}; the first update is number 1")
    return *tensors.values(), step, learning_rate, *betas, eps, weight_decay, grad_scale


_ARGS = {
    "softmax": _softmax_args,
    "layer_norm": _layer_norm_args,
    "attention": _attention_args,
    "rms_norm": _rms_norm_args,
    "gelu": _gelu_args,
    "bias_gelu": _bias_gelu_args,
    "swiglu": _swiglu_args,
    "rope": _rope_args,
    "cross_entropy": _cross_entropy_args,
    "adamw": _adamw_args,
}
