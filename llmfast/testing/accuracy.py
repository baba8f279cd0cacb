"""The accuracy rule: |ours - truth| <= 2 x |PyTorch at that dtype - truth| + 1 ulp, forward and every gradient.

Truth is the reference in float64 from the same (rounded) inputs. Differences are the largest absolute ones in a tensor,
and the ulp is that of its largest magnitude: the criterion that FlashAttention made common, which needs no magic
tolerance (https://github.com/Dao-AILab/flash-attention/blob/main/tests/test_flash_attn.py).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .cases import Case, Result


class Comparison(NamedTuple):
    """One tensor's largest error, PyTorch's own, and the most that the rule allows."""

    name: str
    error: float
    torch_error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # False for NaN

    def __str__(self) -> str:
        return f"{self.name}: error {self.error:.3g}, PyTorch's {self.torch_error:.3g}, allowed {self.allowed:.3g}"


def compare(case: Case, inputs: list[Tensor], grad: Tensor, backend: str) -> list[Comparison]:
    """Run the case's op forward and backward on `backend`, on PyTorch's own function and on the float64 truth."""
    probed, probed_grad = [case.probe(t) for t in inputs], case.probe(grad)
    upstreams = (grad, probed_grad) if case.differentiable else (None, None)
    ours = run(lambda *t: case.ours(*t, backend=backend), inputs, upstreams[0], inputs[0].dtype)
    peer = run(case.torch, inputs, upstreams[0], inputs[0].dtype)
    truth = run(lambda *t: case.ours(*t, backend="reference"), probed, upstreams[1], torch.float64)
    names = [f"d{name}" for name in case.inputs] if case.differentiable else []
    names = [case.op] * (len(ours) - len(names)) + names
    magnitude = case.amplification * max(_largest(t) for t in (*probed, grad))
    return [
        _compare(name, case.probe(o), case.probe(p), t, magnitude, case.looseness(o))
        for name, o, p, t in zip(names, ours, peer, truth, strict=True)
    ]


def run(function: Callable[..., Result], inputs: list[Tensor], grad: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
    """The outputs of `function` at `dtype`, and gradients for `grad` if there is one. Strides of inputs are kept."""
    leaves = [t.detach().to(dtype).requires_grad_(grad is not None) for t in inputs]
    outs = outputs(function(*leaves))
    gradients = () if grad is None else torch.autograd.grad(outs, leaves, upstream(outs, grad))
    return [*(out.detach() for out in outs), *gradients]


def outputs(result: Result) -> tuple[Tensor, ...]:
    """All that an op gave."""
    return result if isinstance(result, tuple) else (result,)


def upstream(outs: tuple[Tensor, ...], grad: Tensor) -> list[Tensor]:
    """The gradient of each output: `grad` of the first, and of others another, so that none can stand for it."""
    return [(grad if i == 0 else grad.flip(-1)).to(out.dtype) for i, out in enumerate(outs)]


def _compare(name: str, ours: Tensor, peer: Tensor, truth: Tensor, magnitude: float, looseness: float) -> Comparison:
    assert ours.shape == truth.shape and ours.dtype == peer.dtype, f"{name}: {ours.shape} {ours.dtype}"
    if truth.numel() == 0:
        return Comparison(name, 0.0, 0.0, 0.0)
    error, peer_error = (_largest(t.double() - truth) for t in (ours, peer))
    allowed = looseness * peer_error + torch.finfo(ours.dtype).eps * _largest(truth)
    rounding = 8 * torch.finfo(torch.float32).eps * magnitude
    if (
        _largest(truth) < rounding
    ):  # a true zero, as dq over a single key: what is left is float32 rounding of its terms
        allowed += rounding
    return Comparison(name, error, peer_error, allowed)


def _largest(t: Tensor) -> float:
    return float(t.detach().abs().max()) if t.numel() else 0.0
