"""AdamW's update: every backend against float64 and PyTorch's own optimiser."""

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import BackendError
from llmfast.ops.registry import BACKENDS, REFERENCE

EACH = pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["adamw"]), REFERENCE])
SETTINGS = {"learning_rate": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def importable(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")


def updated(parameter: Tensor, grads: list[Tensor], backend: str, grad_scale: float = 1.0) -> Tensor:
    importable(backend)
    p = parameter.clone()
    moments = [torch.zeros_like(p) for _ in range(2)]
    for step, grad in enumerate(grads, 1):
        ops.adamw_(p, grad, *moments, step=step, grad_scale=grad_scale, backend=backend, **SETTINGS)
    return p


@EACH
@pytest.mark.parametrize("shape", [(), (1,), (7,), (33, 65), (0, 4), (300, 257)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
def test_against_torch(shape: tuple[int, ...], scale: float, backend: str, device: str) -> None:
    """Ten updates: within twice the error of torch.optim.AdamW and a few units in the last place."""
    parameter = torch.randn(shape, device=device)
    grads = [scale * torch.randn(shape, device=device) for _ in range(10)]
    theirs = torch.nn.Parameter(parameter.clone())
    optimizer = torch.optim.AdamW([theirs], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
    truth = updated(parameter.double(), [g.double() for g in grads], REFERENCE)
    if truth.numel():
        error, peer = ((p.detach().double() - truth).abs().max() for p in (updated(parameter, grads, backend), theirs))
        assert error <= 2 * peer + torch.finfo(torch.float32).eps * truth.abs().max()


@EACH
def test_grad_scale_is_a_clip(backend: str, device: str) -> None:
    parameter, grads = torch.randn(50, device=device), [torch.randn(50, device=device) for _ in range(3)]
    expected = updated(parameter, [g * 0.25 for g in grads], backend)
    torch.testing.assert_close(updated(parameter, grads, backend, grad_scale=0.25), expected)


def test_what_the_kernel_cannot_update_in_place() -> None:
    tensors = [torch.zeros(4, 3).t() for _ in range(4)]
    pytest.importorskip("llmfast.native.cpp", exc_type=BackendError)
    with pytest.raises(BackendError, match="adamw: cpp needs contiguous parameters and moments"):
        ops.adamw_(*tensors, step=1, learning_rate=0.1, backend="cpp")


SHAPES = [(7,), (33, 65), (0, 4), (), (50, 60)]


@EACH
def test_many_at_once_equal_one_by_one(backend: str, device: str) -> None:
    importable(backend)
    tensors = [[torch.randn(s, device=device) for s in SHAPES] for _ in range(2)]
    tensors += [[torch.rand(s, device=device) for s in SHAPES] for _ in range(2)]
    alone = [[t.clone() for t in group] for group in tensors]
    ops.adamw_(*tensors, step=3, backend=backend, **SETTINGS)
    for i in range(len(SHAPES)):
        ops.adamw_(*(group[i] for group in alone), step=3, backend=backend, **SETTINGS)
    assert all(torch.equal(a, b) for x, y in zip(tensors, alone, strict=True) for a, b in zip(x, y, strict=True))


@EACH
def test_what_it_changed_cannot_be_gone_back_to(backend: str, device: str) -> None:
    """Autograd refuses a backward pass through weights that have been updated since."""
    importable(backend)
    p, grad, m, v = (torch.rand(6, device=device) for _ in range(4))
    loss = p.requires_grad_().square().sum()
    ops.adamw_(p, grad, m, v, step=1, backend=backend, **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


WITH_COPIES = pytest.mark.parametrize("backend", ["triton", REFERENCE])


@WITH_COPIES
def test_16_bit_gradients_and_copies(backend: str, device: str) -> None:
    importable(backend)
    parameters, moments = [torch.randn(s, device=device) for s in SHAPES], torch.zeros
    grads = [torch.randn(s, device=device).half() for s in SHAPES]
    copies = [torch.zeros(s, device=device, dtype=torch.float16) for s in SHAPES]
    averages, squares = ([moments(s, device=device) for s in SHAPES] for _ in range(2))
    expected = [updated(p, [g.float()], backend) for p, g in zip(parameters, grads, strict=True)]
    ops.adamw_(parameters, grads, averages, squares, copies, step=1, backend=backend, **SETTINGS)
    for p, c, e in zip(parameters, copies, expected, strict=True):
        assert torch.equal(p, e) and torch.equal(c, e.half())


@WITH_COPIES
@pytest.mark.parametrize("scale", [0.25, 0.0, float("inf"), float("nan")])
def test_scale_on_the_device(scale: float, backend: str, device: str) -> None:
    """It clips as a number does; where it is not finite, nothing changes."""
    importable(backend)
    tensors = [torch.randn(50, device=device) for _ in range(3)] + [torch.rand(50, device=device)]
    expected = [t.clone() for t in tensors]
    if scale < 1:
        ops.adamw_(*expected, step=2, grad_scale=scale, backend=backend, **SETTINGS)
    ops.adamw_(*tensors, step=2, grad_scale=torch.tensor(scale, device=device), backend=backend, **SETTINGS)
    for got, want in zip(tensors, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
