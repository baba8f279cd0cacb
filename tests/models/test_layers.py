"""The parts of a decoder block."""

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.models.layers import split_heads

SIZES = (4, 2, 2)


def gradients(x: Tensor, backend: str) -> tuple[Tensor, list[Tensor]]:
    """x: (B, T, all heads, D) -> the gradient of x as it arrives there, and those of q, k and v."""
    arrived: list[Tensor] = []
    x = x.clone().requires_grad_()
    x.register_hook(arrived.append)
    sections = split_heads(x, SIZES)
    parts: list[Tensor] = []
    for section in sections:
        section.register_hook(parts.append)
    out = ops.attention(*sections, causal=True, backend=backend)
    (out * torch.arange(out.numel(), device=x.device).view(out.shape).cos()).sum().backward()
    assert len(parts) == 3
    return arrived[0], sorted(parts, key=Tensor.storage_offset)


def test_attentions_gradients_are_not_copied(device: str) -> None:
    pytest.importorskip("triton")
    x = torch.randn(2, 9, sum(SIZES), 16, device=device)
    whole, parts = gradients(x, "triton")
    assert [p.data_ptr() for p in parts] == [s.data_ptr() for s in whole.split(SIZES, dim=2)]
    expected, _ = gradients(x, "reference")
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["apart", "another order", "transposed", "of a larger one"])
def test_gradients_of_sections_however_they_lie(kind: str) -> None:
    x = torch.randn(2, 3, sum(SIZES), 4, requires_grad=True)
    values = torch.randn(2, 3, sum(SIZES) + 2, 4)[:, :, : sum(SIZES)]
    if kind == "apart":
        grads = [part.clone() for part in values.split(SIZES, dim=2)]
    elif kind == "another order":
        q, v, k = values.clone().split(SIZES, dim=2)
        grads = [q, k, v]
    elif kind == "transposed":
        grads = list(values.clone().transpose(0, 1).contiguous().transpose(0, 1).split(SIZES, dim=2))
    else:
        grads = list(values.split(SIZES, dim=2))
    torch.autograd.backward(split_heads(x, SIZES), grads)
    assert x.grad is not None
    assert torch.equal(x.grad, torch.cat(grads, dim=2))
