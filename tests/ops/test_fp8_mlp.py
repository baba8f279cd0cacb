"""`fp8_mlp` beside the layers and the activation that it is made of, and what it does with what is not finite."""

import pytest
import torch
from torch import Tensor

from llmfast import ops

BACKENDS = ["triton", "reference"]


def wide(device: str) -> torch.dtype:
    """16 bits: of the two, the type that Triton's CPU interpreter computes rightly."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def leaves(gated: bool, device: str, size: float = 1.0) -> list[Tensor]:
    """x, up, its bias, down, its bias."""
    width = 160 if gated else 80
    shapes = [((130, 48), 1.0), ((width, 48), 0.2 * size), ((width,), 0.1), ((64, 80), 0.1), ((64,), 0.1)]
    generator = torch.Generator(device).manual_seed(0)
    return [
        (scale * torch.randn(shape, device=device, generator=generator)).to(wide(device)).requires_grad_()
        for shape, scale in shapes
    ]


def composed(activation: str, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    h = ops.fp8_linear(x, up, up_bias, backend="triton")
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    if up.shape[0] == down.shape[1]:
        y = ops.bias_gelu(h, approximate=approximate, backend="triton")
    else:
        first, second = h.chunk(2, dim=-1)
        gated = ops.swiglu if activation == "silu" else ops.geglu
        options = {} if activation == "silu" else {"approximate": approximate}
        y = gated(first, second, **options, backend="triton")
    return ops.fp8_linear(y, down, down_bias, backend="triton")


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize(
    ("activation", "gated"), [("gelu", False), ("gelu_tanh", False), ("silu", True), ("gelu_tanh", True)]
)
def test_is_its_parts_one_after_another(activation: str, gated: bool, size: float, device: str) -> None:
    """But for one rounding in place of two of what the activation and its gradient give: of some of their elements in a
    hundred the last bit."""
    pytest.importorskip("triton")
    tensors = leaves(gated, device, size)
    grad = torch.randn(130, 64, device=device).to(wide(device))
    results = []
    for function in (
        lambda *t: ops.fp8_mlp(*t, activation=activation, backend="triton"),
        lambda *t: composed(activation, *t),
    ):
        out = function(*tensors)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for name, ours, parts in zip(("out", "x", "up", "up_bias", "down", "down_bias"), *results, strict=True):
        assert ours.dtype is parts.dtype and ours.shape == parts.shape
        error = ((ours - parts).double().norm() / parts.double().norm()).item()
        assert error < (1e-6 if name in ("down", "down_bias") else 0.04), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_what_is_not_finite_stays_so(backend: str, gated: bool, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = [t.detach().float() for t in leaves(gated, device)]
    tensors[0][7, 3] = float("nan")
    x = tensors[0].requires_grad_()
    out = ops.fp8_mlp(x, *tensors[1:], backend=backend)
    assert out[7].isnan().all() and out[[0, 6, 8, 129]].isfinite().all()
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert dx[7].isnan().all() and dx[[0, 6, 8, 129]].isfinite().all()
    grad[5, 5] = float("inf")
    (dx,) = torch.autograd.grad(out, x, grad)
    assert not dx[5].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend: str, device: str) -> None:
    """A gradient is the same, whichever others are asked for."""
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = leaves(True, device)
    grad = torch.randn(130, 64, device=device).to(wide(device))
    whole = torch.autograd.grad(ops.fp8_mlp(*tensors, backend=backend), tensors, grad)
    for i, expected in enumerate(whole):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (found,) = torch.autograd.grad(ops.fp8_mlp(*alone, backend=backend), alone[i], grad)
        assert torch.equal(found, expected)
