"""Ops whose tensors are on the second of two GPUs while the first is the current one, and what is kept for a device."""

import pytest
import torch

from llmfast import ops
from llmfast.ops.registry import BACKENDS
from llmfast.testing.accuracy import compare
from llmfast.testing.cases import AttentionCase, Case, MLPCase, make_inputs
from llmfast.testing.tables import SMALL_CASES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]

HOPPER = [AttentionCase(1, 256, 256, 2, 1, 64, True), MLPCase(16896, 64, 256)]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, row.name, id=f"{case.op}-{case.label.replace(' ', '-')}-{row.name}")
        for case in (*SMALL_CASES.values(), *HOPPER)
        for row in BACKENDS[case.op]
        if row.name != "cpp"
    ],
)
def test_accuracy(case: Case, backend: str) -> None:
    """On one, the other, and back."""
    for device in ("cuda:1", "cuda:0", "cuda:1"):
        inputs = make_inputs(case, device, torch.bfloat16)
        comparisons = compare(case, inputs, torch.randn(case.output, device=device).bfloat16(), backend)
        assert all(c.ok for c in comparisons), comparisons
        assert torch.cuda.current_device() == 0


def test_in_place() -> None:
    """Of ops that give nothing back."""
    found = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        parameter, grad, cache, new = (
            torch.randn(shape).to(device) for shape in ((300, 40), (300, 40), (2, 9, 3, 16), (2, 2, 3, 16))
        )
        moments = [torch.zeros_like(parameter) for _ in range(2)]
        ops.adamw_(parameter, grad, *moments, step=1, learning_rate=0.1, backend="triton")
        caches = cache.clone(), cache.clone()
        ops.append_kv_(*caches, new, -new, torch.tensor([3, 9], dtype=torch.int32, device=device), backend="triton")
        found.append([t.cpu() for t in (parameter, *moments, *caches)])
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(found[0][3], found[0][4])
