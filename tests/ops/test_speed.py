"""Times of every op and backend by pytest-benchmark: run with --benchmark-enable; without it each runs once.

No time is asserted. Figures that compare with other libraries, with a cold cache, are those of benchmarks/.
"""

from typing import Any

import pytest
import torch

from llmfast.ops.registry import BACKENDS, REFERENCE
from llmfast.testing.accuracy import outputs, upstream
from llmfast.testing.cases import Case, make_inputs
from llmfast.testing.tables import BENCHMARK_CASES, CPU_BENCHMARK_CASES

pytest.importorskip("pytest_benchmark")

CUDA = torch.cuda.is_available()
# On a GPU one case per op: the first is the smallest, and the larger ones are for benchmarks/.
CASES = (
    [case for cases in BENCHMARK_CASES.values() for case in cases[:1]]
    if CUDA
    else sum(CPU_BENCHMARK_CASES.values(), [])
)


def backends(case: Case) -> list[str]:
    """The interpreter's speed says nothing: kernels are timed on their own devices."""
    device = "cuda" if CUDA else "cpu"
    return [*(row.name for row in BACKENDS[case.op] if device in row.devices), REFERENCE]


EACH = pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c.op}-{c.label.replace(' ', '-')}-{b}") for c in CASES for b in backends(c)],
)


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def prepare(case: Case, device: str, benchmark: Any, direction: str) -> list[torch.Tensor]:
    benchmark.group = f"{case.op} {case.label} {direction}"
    return make_inputs(case, device, torch.bfloat16 if CUDA else torch.float32)


@EACH
def test_forward(case: Case, backend: str, device: str, benchmark: Any) -> None:
    inputs = prepare(case, device, benchmark, "forward")

    def forward() -> tuple[torch.Tensor, ...]:
        with torch.no_grad():
            outs = outputs(case.ours(*inputs, backend=backend))
        wait()
        return outs

    assert all(out.isfinite().all() for out in benchmark(forward))


@EACH
def test_backward(case: Case, backend: str, device: str, benchmark: Any) -> None:
    if not case.differentiable:
        pytest.skip("has no gradient")
    inputs = prepare(case, device, benchmark, "backward")
    outs = outputs(case.ours(*inputs, backend=backend))
    given = upstream(outs, torch.randn_like(outs[0]))

    def backward() -> tuple[torch.Tensor, ...]:
        grads = torch.autograd.grad(outs, inputs, given, retain_graph=True)
        wait()
        return grads

    assert all(g.isfinite().all() for g in benchmark(backward))
