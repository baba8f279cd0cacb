"""Which backend runs an op: the table of backends, the rule of choice, and the reasons why not.

Precedence: argument > `use_backend(...)` > `LLMFAST_BACKEND` > auto. Only auto may fall back to the reference; where it
does so on a device that a kernel exists for, it warns once, and `explain` gives the reason.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import environment
from ..errors import BackendError, InputError
from .preference import PREFERRED, PREFERRED_WHERE_SMALL, SMALL

REFERENCE = "reference"
AUTO = "auto"
Direction = Literal["fwd", "bwd"]


@dataclass(frozen=True, eq=False)  # a row equals itself alone, which makes it a cheap key of the caches below
class Backend:
    """One implementation of one op.

    `module` is imported on first use and supplies `<op>_fwd` and, if the op has a gradient, `<op>_bwd` (tensors in,
    tensors out). Where it has limits beyond device and dtype, `<op>_limits(*args) -> str | None` tells the reason why
    it cannot run a call; where it has several kernels, `<op>_kernels(*args) -> str` tells which run one. What an op's
    forward saves for its backward is the same for all backends of a device, so that auto may mix them.
    """

    name: str
    module: str
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]


_HALF_AND_FLOAT = frozenset({torch.float32, torch.float16, torch.bfloat16})


def _triton(module: str) -> Backend:
    return Backend("triton", f"llmfast.kernels.{module}", frozenset({"cuda"}), _HALF_AND_FLOAT)


_CPP = Backend("cpp", "llmfast.native.cpp", frozenset({"cpu"}), frozenset({torch.float32, torch.bfloat16}))
_CUDA = Backend("cuda", "llmfast.native.cuda", frozenset({"cuda"}), _HALF_AND_FLOAT)

# Backends of each op besides the reference; auto tries them in this order, but that of `preference` first.
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "softmax": (_triton("softmax"), _CUDA, _CPP),
    "layer_norm": (_triton("norm"), _CUDA, _CPP),
    "attention": (_triton("attention"), _CPP),
    "attention_varlen": (_triton("attention"),),
    "decode_attention": (_triton("decode_attention"), _CPP),
    "append_kv": (_triton("append_kv"),),
    "rms_norm": (_triton("norm"), _CUDA, _CPP),
    "add_layer_norm": (_triton("norm"), _CUDA, _CPP),
    "add_rms_norm": (_triton("norm"), _CUDA, _CPP),
    "gelu": (_triton("activation"), _CUDA, _CPP),
    "bias_gelu": (_triton("activation"), _CUDA, _CPP),
    "swiglu": (_triton("activation"), _CPP),
    "geglu": (_triton("activation"),),
    "linear": (_triton("linear"),),
    "fp8_linear": (_triton("fp8_linear"),),
    "fp8_mlp": (_triton("fp8_mlp"),),
    "activation_linear": (_triton("activation_linear"), _CPP),
    "mlp": (_triton("mlp"), _CPP),
    "rope": (_triton("rope"), _CPP),
    "cross_entropy": (_triton("cross_entropy"), _CUDA, _CPP),
    "linear_cross_entropy": (_triton("linear_cross_entropy"),),
    "fp8_linear_cross_entropy": (_triton("fp8_linear_cross_entropy"),),
    "embedding": (_triton("embedding"),),
    "adamw": (
        Backend("triton", "llmfast.kernels.adamw", frozenset({"cuda"}), frozenset({torch.float32})),
        Backend("cpp", "llmfast.native.cpp", frozenset({"cpu"}), frozenset({torch.float32})),
    ),
}
NAMES = (AUTO, REFERENCE, *dict.fromkeys(row.name for rows in BACKENDS.values() for row in rows))

_override: ContextVar[str | None] = ContextVar("llmfast_backend", default=None)
_strict: ContextVar[bool] = ContextVar("llmfast_strict", default=False)


class BackendFallbackWarning(UserWarning):
    """auto took the reference although a kernel exists for this device."""


def strict() -> bool:
    """Whether auto raises where it would fall back: `use_backend(strict=True)`, or LLMFAST_STRICT=1."""
    return _strict.get() or environment.strict()


def _check_name(name: str, origin: str) -> str:
    if name not in NAMES:
        raise InputError(f"unknown backend {name!r} ({origin}); choose one of: {', '.join(NAMES)}")
    return name


def current_backend() -> str:
    """The backend that a call without `backend=` asks for: from `use_backend`, else `LLMFAST_BACKEND`, else auto."""
    return _override.get() or _check_name(environment.backend(), "LLMFAST_BACKEND")


@contextmanager
def use_backend(name: str, *, strict: bool = False) -> Iterator[None]:
    """Ask for backend `name` in every op call inside the block (this thread and context only).

    With `strict`, as with `LLMFAST_STRICT=1`, auto raises BackendError where it would fall back to the reference.
    """
    tokens = _override.set(_check_name(name, "use_backend")), _strict.set(strict or _strict.get())
    try:
        yield
    finally:
        _override.reset(tokens[0])
        _strict.reset(tokens[1])


@functools.cache
def _load(module: str) -> ModuleType | str:
    """The backend's module, or why it cannot be imported."""
    try:
        return importlib.import_module(module)
    except BackendError as error:  # a native library that is not there says why
        return str(error)
    except Exception as error:  # a broken Triton raises anything at import; the reason is kept and shown
        return f"{module} cannot be imported: {type(error).__name__}: {error}".splitlines()[0]


@functools.cache
def _unfit(row: Backend, device: str, dtype: torch.dtype, interpreted: bool) -> str | None:
    """Why `row` runs no call at all on this device and dtype."""
    if device not in row.devices and not interpreted:
        remedy = " (TRITON_INTERPRET=1 runs it on the CPU, for tests)" if row.name == "triton" else ""
        return f"runs on {'/'.join(sorted(row.devices))}, not on {device}{remedy}"
    if dtype not in row.dtypes:
        return f"has no {str(dtype).removeprefix('torch.')} kernel"
    if interpreted and dtype is torch.bfloat16:
        return "Triton's CPU interpreter computes bfloat16 wrongly; use float32 or float16"
    module = _load(row.module)
    return module if isinstance(module, str) else None


@functools.cache
def _limits(op: str, module: str) -> Callable[..., str | None] | None:
    return getattr(_load(module), f"{op}_limits", None)


def first_tensor(args: tuple[Any, ...]) -> Tensor:
    """The tensor that stands for all: the first, or the first of the first list."""
    return args[0] if isinstance(args[0], Tensor) else args[0][0]


def _why_not(op: str, row: Backend, args: tuple[Any, ...]) -> str | None:
    x = first_tensor(args)
    device = x.device.type
    interpreted = row.name == "triton" and device == "cpu" and environment.triton_interpreted()
    reason = _unfit(row, device, x.dtype, interpreted)
    if reason is None and torch._C._are_functorch_transforms_active():
        return "cannot be transformed by torch.func (vmap, grad, jvp)"
    if reason is None and forward_ad._current_level >= 0:
        return "has no forward-mode derivative"
    if reason is None and (limits := _limits(op, row.module)):
        return limits(*args)
    return reason


@functools.cache
def _warn_once(op: str, reasons: str) -> None:
    message = f"{op}: auto runs the reference, because {reasons}"
    warnings.warn(BackendFallbackWarning(message), stacklevel=5)


@functools.lru_cache(maxsize=4096)
def _in_order(
    op: str, direction: Direction, rows: tuple[Backend, ...], device: str, length: int, small: bool
) -> list[Backend]:
    """The `rows` that auto tries on `device`: the one measured fastest for rows of this length first."""
    here = [row for row in rows if device in row.devices]  # so it never takes the interpreter
    if len(here) > 1 and op in PREFERRED:
        classes = PREFERRED[op][direction]
        best = next((name for limit, name in classes if length <= limit), classes[-1][1])
        best = PREFERRED_WHERE_SMALL.get(op, {}).get(direction, best) if small else best
        here.sort(key=lambda row: row.name != best)
    return here


def _tried(op: str, direction: Direction, args: tuple[Any, ...]) -> list[Backend]:
    x = first_tensor(args)
    length = x.shape[-1] if x.dim() else 1
    # A size that torch.compile keeps open cannot be hashed; compared, it only adds a guard.
    in_order = _in_order if type(length) is int else _in_order.__wrapped__
    return in_order(op, direction, BACKENDS[op], x.device.type, length, bool(x.numel() <= SMALL))


@functools.cache
def _kernels(op: str, forward: Backend, backward: Backend) -> ModuleType:
    """One backend's module, or the forward of one with the backward of the other."""
    ahead, back = _load(forward.module), _load(backward.module)
    assert not isinstance(ahead, str) and not isinstance(back, str)  # or _why_not had said so
    if ahead is back:
        return ahead
    mixed = ModuleType(f"{ahead.__name__}+{back.__name__}")
    setattr(mixed, f"{op}_fwd", getattr(ahead, f"{op}_fwd"))
    setattr(mixed, f"{op}_bwd", getattr(back, f"{op}_bwd"))
    return mixed


def _backward_of(op: str, forward: Backend, args: tuple[Any, ...]) -> Backend:
    """The backend that auto takes the backward from; a backend that can run a call can run it both ways."""
    if not torch.is_grad_enabled():
        return forward
    rows = _tried(op, "bwd", args)
    return next(row for row in rows if row is forward or _why_not(op, row, args) is None)


def choose(op: str, requested: str | None, args: tuple[Any, ...]) -> ModuleType | None:
    """What holds the `<op>_fwd` and `<op>_bwd` that run this call; None means the reference.

    Raises BackendError if an explicitly requested backend cannot run it. `use_backend` and `LLMFAST_BACKEND` speak of
    every op: one that has no backend of that name runs its reference.
    """
    name = current_backend() if requested is None else _check_name(requested, "backend=")
    if name == REFERENCE:
        return None
    rows = _tried(op, "fwd", args) if name == AUTO else [row for row in BACKENDS[op] if row.name == name]
    if requested is not None and name != AUTO and not rows:
        raise BackendError(f"{op}: there is no {name} backend for it; use backend='auto'")
    reasons = []
    for row in rows:
        reason = _why_not(op, row, args)
        if reason is None:
            return _kernels(op, row, _backward_of(op, row, args) if name == AUTO else row)
        reasons.append(f"{row.name} {reason}")
    if not reasons:
        return None
    if name != AUTO:
        raise BackendError(f"{op}: {reasons[0]}; backend='auto' takes one that can run")
    if strict():
        raise BackendError(f"{op}: strict mode forbids the reference, and {'; '.join(reasons)}")
    _warn_once(op, "; ".join(reasons))
    return None


def chosen(op: str, args: tuple[Any, ...]) -> tuple[str, str]:
    """The names of the backends whose forward and backward a call without `backend=` asks for here and now."""
    name = current_backend()
    if name != AUTO:
        name = name if name in {row.name for row in BACKENDS[op]} else REFERENCE
        return name, name
    for row in _tried(op, "fwd", args):
        if _why_not(op, row, args) is None:
            return row.name, _backward_of(op, row, args).name
    return REFERENCE, REFERENCE


def reasons(op: str, args: tuple[Any, ...]) -> dict[str, str | None]:
    """For every backend of `op`, best first: None if it can run this call, else the reason why not."""
    return {row.name: _why_not(op, row, args) for row in BACKENDS[op]} | {REFERENCE: None}


def explain(op: str, args: tuple[Any, ...]) -> str:
    """A line for every backend: whether it runs this call, and by whose choice, or why it cannot."""
    taken, asked = chosen(op, args), current_backend()
    how = "chosen by auto" if asked == AUTO else f"chosen, as {asked} is asked for"
    lines = []
    modules = {row.name: row.module for row in BACKENDS[op]}
    for name, reason in reasons(op, args).items():
        kernels = getattr(_load(modules[name]), f"{op}_kernels", None) if reason is None and name in modules else None
        for direction, backend in zip(("forward", "backward"), taken, strict=True):
            if name == backend:
                reason = how if taken == (name, name) else f"{how} for the {direction} pass"
        lines.append(f"{op}: {name}: {reason or 'can run'}" + (f" ({kernels(*args)})" if kernels else ""))
    return "\n".join(lines)
