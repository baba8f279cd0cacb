"""What only a GPU shows of the CUDA ops: opcheck, refusals, targets out of range, leaks, and torch.compile."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmfast import ops
from llmfast.testing.arguments import native_arguments

from .test_ops import call_with_changes

pytestmark = pytest.mark.gpu


LIBRARY = "cuda"  # which conftest loads
WITHOUT = {"swiglu_fwd", "swiglu_bwd", "rope", "attention_fwd", "attention_bwd", "adamw_"}
OPS = [op for op in native_arguments() if op not in WITHOUT]


def good(dtype: torch.dtype) -> dict[str, list[Any]]:
    arguments = native_arguments(dtype, "cuda")
    return {op: arguments[op] for op in OPS}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(getattr(torch.ops.llmfast, op).default, tuple(good(dtype)[op]))


@pytest.mark.parametrize(("op", "position", "change", "said"), [
    ("softmax_fwd", 0, lambda t: t.double(), "softmax_fwd: x has a dtype"),
    ("softmax_bwd", 0, lambda t: t.cpu(), "softmax_bwd: dy is on another device"),
    ("softmax_bwd", 0, lambda t: t[:, :5], r"softmax_bwd: dy has shape \(4, 5\) but y \(4, 6\)"),
    ("layer_norm_fwd", 1, lambda t: t.cpu(), "layer_norm_fwd: weight is on another device"),
    ("layer_norm_fwd", 0, lambda t: t.t().contiguous().t(), "layer_norm_fwd: x must have adjacent elements"),
    ("rms_norm_bwd", 3, lambda t: t.half(), "rms_norm_bwd: rstd has a dtype"),
    ("bias_gelu_fwd", 1, lambda t: t[:3], r"bias_gelu_fwd: bias has shape \(3\); it must be \(6,\)"),
    ("cross_entropy_fwd", 1, lambda t: t.int(), "cross_entropy_fwd: targets has a dtype"),
    ("cross_entropy_bwd", 3, lambda t: t[:1], "cross_entropy_bwd: statistics has shape"),
])  # fmt: skip
def test_messages(op: str, position: int, change, said: str) -> None:
    arguments = good(torch.float32)[op]
    arguments[position] = change(arguments[position])
    with pytest.raises(RuntimeError, match=said):
        getattr(torch.ops.llmfast, op)(*arguments)


@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_arguments_are_refused_by_name_and_never_crash(data: st.DataObject) -> None:
    call_with_changes(data, "cuda", OPS, [torch.float32, torch.float16, torch.bfloat16])
    torch.cuda.synchronize()  # where a kernel that read what it must not would say so


def test_a_target_out_of_range_gives_nan_and_no_crash() -> None:
    logits = torch.randn(5, 7, device="cuda", requires_grad=True)
    targets = torch.tensor([0, 7, -1, -100, 6], device="cuda")
    loss = ops.cross_entropy(logits, targets, backend="cuda")
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.isnan() and grad[1:3].isnan().all() and grad[[0, 3, 4]].isfinite().all()


def test_no_call_leaks() -> None:
    arguments = good(torch.bfloat16)

    def once() -> None:
        for op, a in arguments.items():
            getattr(torch.ops.llmfast, op)(*a)

    once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(500):
        once()
    assert torch.cuda.memory_allocated() == before
