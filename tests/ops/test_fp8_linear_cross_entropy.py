"""`fp8_linear_cross_entropy` where targets are left out, alone in their chunk or all of them."""

import pytest
import torch

from llmfast import ops

BACKENDS = ["triton", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_do_not_count_give_nothing(backend: str, device: str) -> None:
    """Of 40 rows, which are three chunks of 16, one chunk has none that counts."""
    if backend == "triton":
        pytest.importorskip("triton")
    x, weight = torch.randn(40, 16, device=device), torch.randn(19, 16, device=device)
    targets = torch.arange(40, device=device) % 19
    targets[16:33] = -100
    x.requires_grad_()
    loss = ops.fp8_linear_cross_entropy(x, weight, targets, backend=backend)
    (dx,) = torch.autograd.grad(loss, x)
    assert loss.isfinite() and not dx[16:33].any() and dx[[0, 15, 33, 39]].any(1).all()
    kept = targets != -100
    alone = ops.fp8_linear_cross_entropy(x[kept], weight, targets[kept], backend=backend)
    torch.testing.assert_close(alone, loss, rtol=0.02, atol=0.0)  # another largest magnitude may be another scale
    nothing = ops.fp8_linear_cross_entropy(x, weight, torch.full_like(targets, -100), backend=backend)
    assert nothing == 0 and not torch.autograd.grad(nothing, x)[0].any()


def test_a_target_that_is_no_class_is_not_a_number(device: str) -> None:
    """The reference refuses it, on a GPU by an assertion that ends the process."""
    pytest.importorskip("triton")
    x, weight = torch.randn(3, 16, device=device).requires_grad_(), torch.randn(16, 16, device=device)
    loss = ops.fp8_linear_cross_entropy(x, weight, torch.tensor([0, 16, 5], device=device), backend="triton")
    assert loss.isnan() and torch.autograd.grad(loss, x)[0][1].isnan().all()
