"""What the norms owe each other: one pass over a sum and its norm equals two, and an offset is part of the weight."""

import importlib

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops.registry import BACKENDS, REFERENCE

DTYPES = {"cpp": torch.bfloat16}  # the interpreter computes bfloat16 wrongly, and cpp has no float16
NORMS = {"add_layer_norm": "layer_norm", "add_rms_norm": "rms_norm"}
EACH = pytest.mark.parametrize(
    ("op", "backend"), [(op, name) for op in NORMS for name in (*(row.name for row in BACKENDS[op]), REFERENCE)]
)


def leaves(op: str, backend: str, device: str, rows: int, cols: int) -> list[Tensor]:
    """x, residual, weight and, for layer norm, bias."""
    dtype = DTYPES.get(backend, torch.float16)
    shapes = [(rows, cols)] * 2 + [(cols,)] * (2 if op == "add_layer_norm" else 1)
    return [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]


def needs(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")


@EACH
@pytest.mark.parametrize("cols", [300, 9001])
def test_one_pass_equals_the_sum_and_its_norm(op: str, cols: int, backend: str, device: str) -> None:
    """The sum bit for bit; what depends on sums along the row, whose order may differ, to an ulp."""
    needs(backend)
    x, residual, *parameters = leaves(op, backend, device, 5, cols)
    y, total = getattr(ops, op)(x, residual, *parameters, backend=backend)
    assert torch.equal(total, x + residual)
    separate = total.detach().requires_grad_()
    expected = getattr(ops, NORMS[op])(separate, *parameters, backend=backend)
    ulp = torch.finfo(y.dtype).eps
    torch.testing.assert_close(y, expected, rtol=ulp, atol=ulp)
    grad = torch.randn_like(y)
    dx, dresidual, *d_parameters = torch.autograd.grad(y, [x, residual, *parameters], grad)
    d_separate, *d_expected = torch.autograd.grad(expected, [separate, *parameters], grad)
    assert torch.equal(dx, dresidual)
    for ours, theirs in zip([dx, *d_parameters], [d_separate, *d_expected], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=ulp, atol=ulp)


@pytest.mark.parametrize("cols", [300, 9001])
def test_one_pass_goes_back_as_the_norm_does(cols: int, device: str) -> None:
    """The Triton kernels from one forward pass's statistics, bit for bit: with nothing by way of the sum, and with that
    added before dx is rounded."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.norm")
    x, residual, weight, bias = (t.detach() for t in leaves("add_layer_norm", "triton", device, 5, cols))
    _, total, mean, rstd = kernels.add_layer_norm_fwd(x, residual, weight, bias, 1e-5)
    dy, dtotal = torch.randn_like(x), torch.randn_like(x)
    expected = kernels.layer_norm_bwd(dy, total, weight, mean, rstd, True)
    nothing = kernels.add_layer_norm_bwd(dy, torch.zeros_like(x), total, weight, mean, rstd, True)
    assert all(torch.equal(a, b) for a, b in zip(nothing, expected, strict=True))
    dx, *parameters = kernels.add_layer_norm_bwd(dy, dtotal, total, weight, mean, rstd, True)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected[1:], strict=True))
    torch.testing.assert_close(dx, expected[0] + dtotal, rtol=2 * torch.finfo(x.dtype).eps, atol=2e-3)


def test_tiles_keep_what_the_kernels_take_for_granted() -> None:
    """Rows that are read once fit their block; elements a lane and warps stay within the registers there are."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.norm")
    for cols in (1, 7, 64, 128, 768, 1023, 1024, 1025, 1600, 2304, 3072, 3584, 5120, 8192, 9001, 33000, 131072, 10**6):
        forward = [kernels._forward_tile(cols, rms, residual) for rms in (False, True) for residual in (False, True)]
        backward = kernels._backward_tile(cols)
        for tile in (*forward, backward):
            assert all(n & (n - 1) == 0 for n in tile) and tile.warps <= 32
            assert 8 <= tile.rows * tile.block // (32 * tile.warps) <= 32
        assert cols > 1024 or all(tile.block >= cols for tile in forward)
        assert (backward.block >= cols) == (cols <= 8192)
        assert backward.warps == 1 or backward.block >= 256 * backward.warps  # so that sums over rows stay in a lane
    assert [kernels._forward_tile(768 * 4, rms, False).block for rms in (True, False)] == [1024, 1024]  # 3 pieces each


@EACH
def test_the_residual_has_strides_of_its_own(op: str, backend: str, device: str) -> None:
    needs(backend)
    x, residual, *parameters = leaves(op, backend, device, 6, 40)
    wide = torch.cat((residual, residual), 1)
    for other in (residual.t().contiguous().t(), wide[:, :40], residual[:1].expand(6, 40)):
        results = [getattr(ops, op)(x, r, *parameters, backend=backend) for r in (other, other.contiguous())]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["rms_norm"]), REFERENCE])
def test_an_offset_is_added_to_the_weight(backend: str, device: str) -> None:
    """And so it moves neither the weight's gradient nor anything where there is no weight."""
    needs(backend)
    x, residual, weight = (t.detach().float() for t in leaves("add_rms_norm", backend, device, 5, 300))
    leaf, moved = weight.clone().requires_grad_(), (weight + 1.0).requires_grad_()
    grad = torch.randn_like(x)
    for op, inputs in (("rms_norm", (x,)), ("add_rms_norm", (x, residual))):
        norm = getattr(ops, op)
        outs = [norm(*inputs, w, offset=o, backend=backend) for w, o in ((leaf, 1.0), (moved, 0.0), (None, 1.0))]
        with_offset, expected, without_weight = (out if op == "rms_norm" else out[0] for out in outs)
        torch.testing.assert_close(with_offset, expected, rtol=1e-6, atol=1e-6)
        (dw,), (d_expected,) = (
            torch.autograd.grad(out, w, grad) for out, w in ((with_offset, leaf), (expected, moved))
        )
        torch.testing.assert_close(dw, d_expected, rtol=1e-6, atol=1e-6)
        plain = norm(*inputs, None, backend=backend)
        assert torch.equal(without_weight, plain if op == "rms_norm" else plain[0])
