"""Packed sequences that do not fill their tensors: what lies after the last one has no effect, and gives zeros."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops.registry import REFERENCE

from .test_gpu import recorded

pytest.importorskip("triton")
EACH = pytest.mark.parametrize("backend", ["triton", REFERENCE])
HEADS, KV_HEADS, D = 4, 2, 64


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New memory holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def starts(*rows: int, device: str) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32, device=device)


def normal(*shape: int, device: str) -> Tensor:
    """Of the dtype that sm_90's own kernels take; Triton's interpreter computes that wrongly."""
    return torch.randn(shape, device=device).to(torch.float32 if device == "cpu" else torch.bfloat16)


def with_rest(t: Tensor, rows: int) -> Tensor:
    return torch.cat((t, torch.full_like(t[:1], float("nan")).expand(rows, *t.shape[1:])))


@EACH
@pytest.mark.parametrize("rest", [(3, 0), (0, 5), (150, 300)], ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True, "window": 3}, {"scale": -0.3}], ids=str)
def test_rows_after_the_last_sequence(
    options: dict[str, Any], rest: tuple[int, int], backend: str, device: str
) -> None:
    """Zeros, with zero gradients, of NaN; all else is bit for bit what it is without them."""
    first_q, first_k = starts(0, 5, 5, 40, device=device), starts(0, 7, 9, 30, device=device)
    tensors = [normal(n, h, D, device=device) for n, h in ((40, HEADS), (30, KV_HEADS), (30, KV_HEADS), (40, HEADS))]
    results = []
    for queries, keys in ((0, 0), rest):
        *leaves, grad = (with_rest(t, n) for t, n in zip(tensors, (queries, keys, keys, queries), strict=True))
        for leaf in leaves:
            leaf.requires_grad_()
        out, lse = ops.attention_varlen(*leaves, first_q, first_k, 35, 21, return_lse=True, backend=backend, **options)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad), lse.t()])
    for alone, padded, rows in zip(*results, (rest[0], rest[0], rest[1], rest[1], rest[0]), strict=True):
        assert torch.equal(padded[: len(alone)], alone) and len(padded) == len(alone) + rows
        assert (padded[len(alone) :] == (0.0 if padded.dim() == 3 else float("-inf"))).all()


@EACH
@pytest.mark.parametrize("sequences", [0, 2])
def test_gradients_side_by_side(sequences: int, backend: str, device: str) -> None:
    """Of q, k and v that are one product's result; also where there is no sequence at all."""
    first = starts(0, 4, 10, device=device)[: sequences + 1]
    leaf = normal(17, HEADS + 2 * KV_HEADS, D, device=device).requires_grad_()
    together = leaf.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
    results = []
    for q, k, v in (together, [t.contiguous() for t in together]):
        out = ops.attention_varlen(q, k, v, first, first, 6, 6, backend=backend)
        results.append([out, *torch.autograd.grad(out, leaf, torch.ones_like(out))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and (a[int(first[-1]) :] == 0).all()


@pytest.mark.gpu
def test_a_graph_replays_with_other_sequences(device: str) -> None:
    """Fewer and more rows than it was captured with: the host reads no length."""
    first = starts(0, 100, 250, device=device)
    q, k, v = (normal(300, h, D, device=device).requires_grad_() for h in (HEADS, KV_HEADS, KV_HEADS))

    def once() -> list[Tensor]:
        out = ops.attention_varlen(q, k, v, first, first, 300, 300, causal=True, backend="triton")
        return [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]

    graph, captured = recorded(once)
    for rows in ((0, 7, 20), (0, 0, 300), (0, 0, 0)):
        first.copy_(starts(*rows, device=device))
        graph.replay()
        assert all(torch.equal(a, b) and (a[rows[-1] :] == 0).all() for a, b in zip(captured, once(), strict=True))
