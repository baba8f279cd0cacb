"""What `fp8_linear` does with numbers that 8 bits hold badly: extremes of scale, zeros, infinities, NaN."""

import pytest
import torch
from torch import Tensor

from llmfast import ops

BACKENDS = ["triton", "reference"]


def identity(x: Tensor, backend: str) -> Tensor:
    """x as e4m3 holds it: a product with the identity."""
    if backend == "triton":
        pytest.importorskip("triton")
    return ops.fp8_linear(x, torch.eye(x.shape[1], device=x.device), backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("largest", [448.0, 449.0, 1.75, 1.7500001, 1.0, 2.0**-100, 2.0**110])
def test_scaled_by_a_power_of_two_that_fits(backend: str, largest: float, device: str) -> None:
    """Every number of four bits within 2^15 of the largest is held as it is, whatever the largest."""
    x = largest * torch.tensor([[1.0, -0.5, 0.25, 2**-3, 2**-5, -(2**-10), 2**-14, 0.0] * 2], device=device)
    held = identity(x, backend)
    exact = largest != 449.0 and largest != 1.7500001
    torch.testing.assert_close(held, x, rtol=0.0 if exact else 2**-4, atol=0.0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zeros_and_what_is_not_finite(backend: str, device: str) -> None:
    x = torch.randn(3, 16, device=device)
    assert not identity(torch.zeros_like(x), backend).any()
    x[1, 5] = float("nan")
    held = identity(x, backend)
    assert held[1].isnan().all() and held[[0, 2]].isfinite().all()
    x[1, 5] = float("inf")
    assert identity(x, backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_gradient_is_no_finite_one(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x, weight = (torch.randn(n, 16, device=device, requires_grad=True) for n in (3, 32))
    grad = torch.randn(3, 32, device=device)
    grad[2, 3] = float("inf")
    gradients = torch.autograd.grad(ops.fp8_linear(x, weight, backend=backend), (x, weight), grad)
    assert all(g.isnan().all() for g in gradients)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bias_may_be_strided_or_one_number(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    x, weight, biases = (torch.randn(shape, device=device).to(dtype) for shape in ((3, 16), (32, 16), (32, 2)))
    for bias in (biases[:, 1], biases[0, :1].expand(32)):
        whole = ops.fp8_linear(x, weight, bias.clone(memory_format=torch.contiguous_format), backend=backend)
        assert torch.equal(ops.fp8_linear(x, weight, bias, backend=backend), whole)


def test_results_within_float32_of_operands_near_its_ends(device: str) -> None:
    """Sums of products of 8-bit floats, before they are scaled, stay finite only if scaled operands are multiplied."""
    pytest.importorskip("triton")
    x, weight = torch.full((16, 4096), 2.0**110, device=device), torch.full((16, 4096), 2.0**-110, device=device)
    torch.testing.assert_close(ops.fp8_linear(x, weight, backend="triton"), torch.full((16, 16), 4096.0, device=device))
