"""Cross-entropy at its edges, on every backend that does what is asked, and in place."""

from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops.registry import BACKENDS, REFERENCE

EACH = pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["cross_entropy"]), REFERENCE])
WITH_OPTIONS = pytest.mark.parametrize("backend", ["triton", REFERENCE])


@pytest.fixture(autouse=True)
def importable(request: pytest.FixtureRequest) -> None:
    if getattr(request.node, "callspec", None) and request.node.callspec.params.get("backend") == "triton":
        pytest.importorskip("triton")


def loss_and_gradient(logits: Tensor, targets: Tensor, backend: str, **options) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    loss = ops.cross_entropy(leaf, targets, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


@EACH
@pytest.mark.parametrize("classes", [5, 3000])
def test_no_target_counts(classes: int, backend: str, device: str) -> None:
    loss, grad = loss_and_gradient(
        torch.randn(3, classes, device=device), torch.full((3,), -100, device=device), backend
    )
    assert loss == 0 and (grad == 0).all()


def test_ignored_rows_may_hold_anything(device: str) -> None:
    """They are not read."""
    pytest.importorskip("triton")
    logits, targets = torch.randn(3, 50, device=device), torch.tensor([4, -1, 0], device=device)
    logits[1] = float("nan")
    options = {"ignore_index": -1, "label_smoothing": 0.1, "z_loss": 0.1, "reduction": "none"}
    loss, grad = loss_and_gradient(logits, targets, "triton", **options)
    assert loss.isfinite().all() and loss[1] == 0 and grad.isfinite().all() and (grad[1] == 0).all()


@EACH
def test_large_and_infinite_logits(backend: str, device: str) -> None:
    """-inf is a class that cannot be; +inf, NaN and a row of nothing but -inf make the loss NaN, as in PyTorch."""
    logits = 1000 * torch.randn(6, 700, device=device)
    logits[1, 5:] = float("-inf")
    targets = torch.tensor([3, 2, 0, 1, 2, 3], device=device)
    loss, grad = loss_and_gradient(logits[:3], targets[:3], backend)
    expected, expected_grad = loss_and_gradient(logits[:3].double(), targets[:3], REFERENCE)
    torch.testing.assert_close((loss.double(), grad.double()), (expected, expected_grad), rtol=1e-5, atol=1e-6)
    for row, value in ((3, float("-inf")), (4, float("inf")), (5, float("nan"))):
        bad = logits.clone()
        bad[row, slice(None) if row == 3 else 9] = value
        assert loss_and_gradient(bad, targets, backend)[0].isnan()


@pytest.mark.parametrize("target", [-1, 50, 2**40, -(2**40)])
@pytest.mark.parametrize("n_classes", [50, 64])
def test_target_out_of_range(target: int, n_classes: int, device: str) -> None:
    """NaN of its row alone, and nothing is read outside the row."""
    pytest.importorskip("triton")
    logits, targets = torch.randn(3, 64, device=device), torch.tensor([4, target, 0], device=device)
    with ops.use_backend("triton"):
        loss, grad = loss_and_gradient(logits, targets, "triton", reduction="none", n_classes=n_classes)
    outside = not 0 <= target < n_classes
    assert loss.isnan().tolist() == [False, outside, False]
    assert grad[:, :n_classes].isnan().all(-1).tolist() == [False, outside, False] and (grad[:, n_classes:] == 0).all()


@WITH_OPTIONS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_any_upstream_gradient(reduction: str, backend: str, device: str) -> None:
    logits, targets = torch.randn(5, 90, device=device), torch.tensor([4, -100, 0, 89, 7], device=device)
    truth, ours = (t.detach().requires_grad_() for t in (logits.double(), logits))
    expected = ops.cross_entropy(truth, targets, reduction=reduction, backend=REFERENCE)
    got = ops.cross_entropy(ours, targets, reduction=reduction, backend=backend)
    upstream = torch.randn(9, device=device)[::2] if reduction == "none" else torch.tensor(-0.3, device=device)
    (a,), (b,) = torch.autograd.grad(got, ours, upstream), torch.autograd.grad(expected, truth, upstream.double())
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-7)


def test_in_place_takes_the_logits_memory(device: str) -> None:
    pytest.importorskip("triton")
    leaf, targets = (
        torch.randn(5, 90, device=device, requires_grad=True),
        torch.tensor([4, -100, 0, 89, 7], device=device),
    )
    expected = torch.autograd.grad(ops.cross_entropy(leaf, targets, backend="triton"), leaf)[0]
    logits = leaf * 1.0
    loss = ops.cross_entropy(logits, targets, in_place=True, backend="triton")
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert grad.data_ptr() == logits.data_ptr() and torch.equal(grad, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, logits)


def test_in_place_is_refused_to_whoever_else_needs_the_logits(device: str) -> None:
    pytest.importorskip("triton")
    leaf, targets = torch.randn(5, 90, device=device, requires_grad=True), torch.arange(5, device=device)
    logits = leaf * 1.0
    other = logits.square().sum()  # its gradient needs the logits
    ops.cross_entropy(logits, targets, in_place=True, backend="triton").backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()


def test_in_place_of_rows_that_are_not_adjacent(device: str) -> None:
    pytest.importorskip("triton")
    wide = torch.randn(90, 5, device=device)
    expected = loss_and_gradient(wide.t().contiguous(), torch.arange(5, device=device), "triton")
    leaf = wide.clone().t().requires_grad_()
    loss = ops.cross_entropy(leaf, torch.arange(5, device=device), in_place=True, backend="triton")
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected[1])


@pytest.mark.parametrize("backend", ["triton", "cpp", REFERENCE])
@pytest.mark.parametrize("strides", [(0, 1), (2, 1), (1, 0), (1, 2)], ids=str)
def test_in_place_of_rows_that_share_memory(strides: tuple[int, int], backend: str, device: str) -> None:
    """As an expanded tensor's do: each row's gradient is its own, and the logits are left alone."""
    memory, targets = torch.randn(100, device=device), torch.tensor([4, -100, 0, 8, 7], device=device)
    logits = memory.as_strided((5, 9), strides)
    expected, before = loss_and_gradient(logits.contiguous(), targets, backend), memory.clone()
    torch.testing.assert_close(loss_and_gradient(logits, targets, backend, in_place=True)[1], expected[1])
    assert torch.equal(memory, before)


@pytest.mark.parametrize("grad", [1.0, 0.3])
def test_linear_cross_entropy_scales_without_rounding_the_scale(grad: float, device: str) -> None:
    """An upstream gradient of 0.3 would lose its digits were it rounded to float16 first, as on a GPU it easily is."""
    pytest.importorskip("triton")
    x, weight = (torch.randn(s, 16, device=device).half().requires_grad_() for s in (20, 33))
    targets = torch.arange(20, device=device)
    loss = ops.linear_cross_entropy(x, weight, targets, reduction="sum", backend="triton")
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(grad, device=device), retain_graph=True)
    (unit,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(dx, (unit.float() * torch.tensor(grad, device=device)).half())


def test_linear_cross_entropy_of_frozen_inputs(device: str) -> None:
    """Gradients that nobody asks for are not made, and those asked for are the same."""
    pytest.importorskip("triton")
    x, weight, bias = (torch.randn(*s, device=device) for s in ((20, 16), (33, 16), (33,)))
    targets = torch.arange(20, device=device)

    def gradients(*wanted: int) -> list[Tensor]:
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate((x, weight, bias))]
        loss = ops.linear_cross_entropy(*leaves[:2], targets, leaves[2], backend="triton")
        return list(torch.autograd.grad(loss, [leaves[i] for i in wanted]))

    together = gradients(0, 1, 2)
    for i in range(3):
        assert torch.equal(gradients(i)[0], together[i])
    assert not ops.linear_cross_entropy(x, weight, targets, bias, backend="triton").requires_grad


# Each alone, then together. ignore_index is a class here, so that targets outside would not stand for it.
LINEAR_OPTIONS: list[dict[str, Any]] = [
    *({}, {"label_smoothing": 0.2}, {"z_loss": 0.05}, {"ignore_index": 3}, {"reduction": "sum"}),
    {"label_smoothing": 0.2, "z_loss": 0.05, "ignore_index": 3, "reduction": "sum"},
]


@pytest.mark.parametrize("options", LINEAR_OPTIONS, ids=str)
@pytest.mark.parametrize("classes", [64, 300, 17_001])
def test_linear_cross_entropy_options(classes: int, options: dict[str, Any], device: str) -> None:
    """Rows of a block and of three, with columns that are no class (the memory of a row is a multiple of 64 of them)
    and without, in two chunks."""
    pytest.importorskip("triton")
    leaves = [torch.randn(s, device=device).requires_grad_() for s in ((9, 5), (classes, 5), (classes,))]
    targets = torch.tensor([3, 0, classes - 1, 3, 7, 63, 1, 3, 2], device=device)
    results = []
    for backend, dtype in (("triton", torch.float32), (REFERENCE, torch.float64)):
        x, weight, bias = (t.to(dtype) for t in leaves)
        loss = ops.linear_cross_entropy(x, weight, targets, bias, backend=backend, **options)
        results.append((loss.double(), *torch.autograd.grad(loss, leaves, torch.tensor(0.7, device=device).to(dtype))))
    (loss, dx, *rest), (true_loss, true_dx, *true_rest) = results
    torch.testing.assert_close((loss, *rest), (true_loss, *true_rest), rtol=1e-5, atol=1e-6)
    # Of x each number is a sum over all classes: as exact as the largest, in whatever order a library adds.
    torch.testing.assert_close(dx, true_dx, rtol=0.0, atol=1e-5 * true_dx.abs().max().item())


@pytest.mark.parametrize("classes", [50, 17_001])
@pytest.mark.parametrize("target", [4, -100, 49, -1, 10**6])
def test_loss_and_gradient_at_once_are_those_one_after_the_other(classes: int, target: int, device: str) -> None:
    """Of a row that is a linear layer's weight, whose gradient then is the logits', whatever it holds."""
    pytest.importorskip("triton")
    rows = torch.randn(6, classes, device=device) * torch.tensor([1.0, 1000.0, 1, 1, 1, 1], device=device)[:, None]
    rows[2, 5:] = rows[3] = float("-inf")
    rows[4, 9], rows[5, 9] = float("inf"), float("nan")
    targets = torch.tensor([target], device=device)
    options = {"label_smoothing": 0.1, "z_loss": 0.01, "reduction": "sum"}
    for row in rows:
        expected = loss_and_gradient(row[None], targets, "triton", **options)
        weight = row[:, None].requires_grad_()
        loss = ops.linear_cross_entropy(torch.ones(1, 1, device=device), weight, targets, backend="triton", **options)
        got = loss.detach(), torch.autograd.grad(loss, weight)[0].t()
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5, equal_nan=True)  # a sum's order differs


def test_linear_cross_entropy_reads_no_row_without_a_target(device: str) -> None:
    """Its logits may be anything: here NaN, which the loss and the other gradients do not see."""
    pytest.importorskip("triton")
    x, weight = torch.randn(4, 1, device=device), torch.randn(70, 1, device=device).requires_grad_()
    x[2] = float("nan")
    leaf = x.requires_grad_()
    loss = ops.linear_cross_entropy(leaf, weight, torch.tensor([4, 0, -100, 69], device=device), backend="triton")
    assert loss.isfinite()
    dx = torch.autograd.grad(loss, leaf)[0]
    assert dx.isfinite().all() and dx[2] == 0


def test_linear_cross_entropy_keeps_the_small_probabilities_of_a_large_batch(device: str) -> None:
    """2000 equal logits in each of 508 rows: divided by both numbers a probability is 16.5 times the least that float16
    has, and would become 17 times it. All weights 1, a row's gradient of x is 0, the sum of the logits' gradients."""
    pytest.importorskip("triton")
    x = torch.zeros(508, 1, device=device, dtype=torch.float16, requires_grad=True)
    weight = torch.ones(2000, 1, device=device, dtype=torch.float16)
    targets = torch.zeros(508, dtype=torch.int64, device=device)
    loss = ops.linear_cross_entropy(x, weight, targets, backend="triton")
    (dx,) = torch.autograd.grad(loss, x, torch.tensor(508.0, device=device))
    assert dx.abs().max() < 2e-3
