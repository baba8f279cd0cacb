"""AdamW's update: every backend against float64 and PyTorch's own optimiser."""

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import BackendError
from llmfast.ops.registry import BACKENDS, REFERENCE

EACH = pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["adamw"]), REFERENCE])
SETTINGS = {"learning_rate": 3e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def updated(parameter: Tensor, grads: list[Tensor], backend: str, grad_scale: float = 1.0) -> Tensor:
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
    with pytest.raises(BackendError, match="adamw: cpp needs a contiguous parameter and moments"):
        ops.adamw_(*tensors, step=1, learning_rate=0.1, backend="cpp")
