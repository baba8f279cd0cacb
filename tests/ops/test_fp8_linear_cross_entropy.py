"""`fp8_linear_cross_entropy` where targets are left out or apart, classes padded, gradients large."""

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


def test_padding_of_the_classes_takes_no_part(device: str) -> None:
    """33 classes are padded to 48, whose logits, 0, would be far above those of classes."""
    pytest.importorskip("triton")
    x = torch.full((17, 32), 4.0, device=device).requires_grad_()
    weight = (torch.randn(33, 32, device=device) / 16 - 2).requires_grad_()
    targets = torch.arange(17, device=device)
    results = []
    for backend in BACKENDS:
        loss = ops.fp8_linear_cross_entropy(x, weight, targets, backend=backend)
        results.append([loss.detach(), *torch.autograd.grad(loss, (x, weight))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_targets_may_be_strided(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    x, weight = torch.randn(9, 16, device=device), torch.randn(16, 16, device=device)
    targets = torch.stack([torch.arange(9), torch.arange(9).flip(0)], 1).to(device)
    whole = ops.fp8_linear_cross_entropy(x, weight, targets[:, 0].contiguous(), backend=backend)
    assert torch.equal(ops.fp8_linear_cross_entropy(x, weight, targets[:, 0], backend=backend), whole)


def test_sums_that_float16_does_not_hold(device: str) -> None:
    """Of a chunk's losses the weight's gradient is 160,000 in sum, of the mean of all 10,000."""
    pytest.importorskip("triton")
    x = torch.full((128, 16), 1e4, dtype=torch.float16, device=device)
    weight = torch.zeros(16, 16, dtype=torch.float16, device=device).requires_grad_()
    targets = torch.zeros(128, dtype=torch.int64, device=device)
    loss = ops.fp8_linear_cross_entropy(x, weight, targets, backend="triton")
    (dw,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(dw[0], torch.full_like(dw[0], -1e4 * 15 / 16), rtol=0.1, atol=0.0)
