"""What only a GPU can show: offsets beyond 2^31 elements, repeatability under load, graphs, and other streams."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import BackendError
from llmfast.ops.registry import BACKENDS
from llmfast.testing.accuracy import compare, outputs, upstream
from llmfast.testing.cases import (
    ROW_INPUTS,
    ActivationLinearCase,
    AttentionCase,
    Case,
    CrossEntropyCase,
    EmbeddingCase,
    Fp8LinearCase,
    Fp8LinearCrossEntropyCase,
    Fp8MLPCase,
    LinearCase,
    LinearCrossEntropyCase,
    MLPCase,
    RopeCase,
    RowCase,
    make_inputs,
)

pytestmark = pytest.mark.gpu
TRITON = "triton"
# Every op over rows, on every backend that runs on a GPU.
ROW_OPS = [
    (op, row.name)
    for op in BACKENDS
    for row in BACKENDS[op]
    if "cuda" in row.devices and op in (*ROW_INPUTS, "cross_entropy")
]
EACH_ROW_OP = pytest.mark.parametrize(("op", "backend"), ROW_OPS)


def row_case(op: str, rows: int, cols: int) -> RowCase | CrossEntropyCase:
    return CrossEntropyCase(rows, cols) if op == "cross_entropy" else RowCase(op, rows, cols)


def far_apart(t: Tensor, gap: int) -> Tensor:
    """The same values in a buffer where the leading dimension's stride is `gap` elements."""
    buffer = torch.empty((t.shape[0] - 1) * gap + t[0].numel(), dtype=t.dtype, device=t.device)
    view = buffer.as_strided(t.shape, (gap, *t[0].contiguous().stride()))
    view.copy_(t)
    return view


@EACH_ROW_OP
def test_rows_beyond_2_31_elements(op: str, backend: str, device: str) -> None:
    case = row_case(op, 3, 1000)
    inputs = make_inputs(case, device, torch.bfloat16)
    spread = [far_apart(inputs[0].detach(), 2**30 + 2**29 + 16).requires_grad_(), *inputs[1:]]
    grad = torch.randn(case.output, device=device).bfloat16()
    comparisons = compare(case, spread, far_apart(grad, 2**30 + 2**29 + 16) if grad.dim() else grad, backend)
    assert all(c.ok for c in comparisons), comparisons


@pytest.mark.parametrize(
    "case", [RopeCase(3, 7, 2, 64), RopeCase(3, 7, 2, 64, interleaved=True)], ids=lambda c: c.label
)
def test_rope_beyond_2_31_elements(case: RopeCase, device: str) -> None:
    (x,) = make_inputs(case, device, torch.bfloat16)
    spread = [far_apart(x.detach(), 2**31 + 16).requires_grad_()]
    grad = far_apart(torch.randn(case.output, device=device).bfloat16(), 2**31 + 16)
    comparisons = compare(case, spread, grad, TRITON)
    assert all(c.ok for c in comparisons), comparisons


def test_embedding_beyond_2_31_elements(device: str) -> None:
    """A table, and gradients of its rows, that end past 2^31 elements."""
    rows, cols = 2**18 + 64, 8192
    weight = torch.zeros(rows, cols, dtype=torch.bfloat16, device=device).requires_grad_()
    tokens = torch.tensor([rows - 1, 0, rows - 1], device=device)
    out = ops.embedding(weight, tokens, backend=TRITON)
    grad = far_apart(torch.randn(3, cols, device=device).bfloat16(), 2**30 + 2**29 + 16)
    (dw,) = torch.autograd.grad(out, weight, grad)
    assert torch.equal(dw[rows - 1], (grad[0].float() + grad[2].float()).bfloat16()) and torch.equal(dw[0], grad[1])
    assert not dw[1 : rows - 1].any()


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_many_rows_beyond_2_31_elements(backend: str, device: str) -> None:
    """A contiguous tensor of 2^31 + 2^20 elements: its last rows against the same rows alone."""
    x = torch.randn(2**19 + 256, 4096, device=device, dtype=torch.bfloat16)
    w = torch.randn(4096, device=device, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    tail = x[-7:].clone()
    assert torch.equal(ops.softmax(x, backend=backend)[-7:], ops.softmax(tail, backend=backend))
    assert torch.equal(ops.layer_norm(x, w, w, backend=backend)[-7:], ops.layer_norm(tail, w, w, backend=backend))


def test_more_than_2_31_rows(device: str) -> None:
    """Of one element each: the last of them, forward and backward, against the same rows alone."""
    x = torch.zeros(2**31 + 300, 1, device=device, dtype=torch.bfloat16)
    x[-300:] = torch.randn(300, 1, device=device)
    results = []
    for leaf in (x[-300:].clone().requires_grad_(), x.requires_grad_()):
        y = ops.gelu(leaf, backend=TRITON)
        (dx,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        results.append((y.detach()[-300:], dx[-300:]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@EACH_ROW_OP
@pytest.mark.parametrize("cols", [768, 5000, 131072])
def test_rows_repeat_bitwise(op: str, cols: int, backend: str, device: str) -> None:
    """100 repeats, forward and every gradient, while other work keeps the card busy."""
    case = row_case(op, 700, cols)
    inputs = make_inputs(case, device, torch.bfloat16)
    grad = torch.randn(case.output, device=device)

    def once() -> list[Tensor]:
        outs = outputs(case.ours(*inputs, backend=backend))
        return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, upstream(outs, grad))]

    first, different = once(), torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(100):
        for a, b in zip(first, once(), strict=True):
            different += (a != b).sum()
    assert int(different) == 0


@pytest.mark.parametrize("causal", [False, True])
def test_attention_beyond_2_31_elements(causal: bool) -> None:
    """Batch strides, and then sequence strides, that put the last element past 2^31."""
    case = AttentionCase(2, 300, 300, 2, 1, 64, causal)
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    gap = 2**31 + 2**20
    spread = [far_apart(t.detach(), gap).requires_grad_() for t in inputs]
    grad = far_apart(torch.randn(2, 300, 2, 64, device="cuda").bfloat16(), gap)
    comparisons = compare(case, spread, grad, TRITON)
    assert all(c.ok for c in comparisons), comparisons

    one = AttentionCase(1, 300, 300, 2, 1, 64, causal)
    inputs = make_inputs(one, "cuda", torch.bfloat16)
    gap = (2**31 + 2**24) // 299 // 16 * 16 + 16
    spread = [far_apart(t.detach()[0], gap)[None].requires_grad_() for t in inputs]
    comparisons = compare(one, spread, torch.randn(1, 300, 2, 64, device="cuda").bfloat16(), TRITON)
    assert all(c.ok for c in comparisons), comparisons


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_repeats_bitwise_under_load(head_dim: int, causal: bool, dtype: torch.dtype) -> None:
    """250 repeats at a large batch: a missing barrier shows as a difference in some of them."""
    case = AttentionCase(60, 239, 333, 4, 2, head_dim, causal)
    inputs = make_inputs(case, "cuda", dtype)
    grad = torch.randn(case.inputs["q"], device="cuda").to(dtype)

    def once() -> list[Tensor]:
        out = case.ours(*inputs, backend=TRITON)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    comparisons = compare(case, inputs, grad, TRITON)
    assert all(c.ok for c in comparisons), comparisons
    first = once()
    different = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(250):
        for a, b in zip(first, once(), strict=True):
            different += (a != b).sum()
    assert int(different) == 0


@pytest.mark.parametrize("case", [
    AttentionCase(2, 2048, 2048, 8, 2, 64, True),
    AttentionCase(1, 4224, 4224, 4, 4, 128, True),
    AttentionCase(2, 1023, 1024, 4, 4, 128, True),
    AttentionCase(2, 1024, 1023, 4, 4, 64, True),
    AttentionCase(2, 799, 3, 4, 4, 64, False),
    AttentionCase(1, 1, 16000, 16, 2, 128, True),
    AttentionCase(1, 640, 128, 6, 6, 80, True),
    AttentionCase(1, 777, 1555, 6, 3, 256, True),
], ids=lambda c: c.label.replace(" ", "-"))  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_attention_long(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = make_inputs(case, "cuda", dtype)
    comparisons = compare(case, inputs, torch.randn(case.inputs["q"], device="cuda").to(dtype), TRITON)
    assert all(c.ok for c in comparisons), comparisons


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_memory(head_dim: int, causal: bool) -> None:
    """Nothing grows with the square of the length; beside the gradients no more than dq in float32 and row by row."""
    case = AttentionCase(1, 8192, 8192, 4, 2, head_dim, causal)
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    grad = torch.randn(case.output, device="cuda").bfloat16()
    for _ in range(2):  # the first compiles
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        out = case.ours(*inputs, backend=TRITON)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradients = torch.autograd.grad(out, inputs, grad)
        backward = torch.cuda.max_memory_allocated() - before
        given = sum(t.nbytes for t in gradients)
        del gradients
    rows = 4 * case.n_queries * case.heads  # a float32 number for each query
    assert forward <= inputs[0].nbytes + 2 * rows + 2**16
    assert backward <= given + 2 * inputs[0].nbytes + 4 * rows + 2**16


@pytest.mark.parametrize("scale", [-0.2, 0.0])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_attention_gradients_of_any_scale(head_dim: int, scale: float) -> None:
    """And of an expanded gradient, whose strides are zero."""
    case = AttentionCase(2, 200, 300, 4, 2, head_dim, True, scale=scale)
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    grad = torch.randn(4, head_dim, device="cuda").bfloat16().expand(case.output)
    comparisons = compare(case, inputs, grad, TRITON)
    assert all(c.ok for c in comparisons), comparisons


@EACH_ROW_OP
@pytest.mark.parametrize("cols", [768, 4096, 8192, 9000, 16384, 32768, 50257, 50304, 65536, 131072, 140000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_rows_long(op: str, cols: int, backend: str, dtype: torch.dtype, device: str) -> None:
    case = row_case(op, 517, cols)
    inputs = make_inputs(case, device, dtype)
    comparisons = compare(case, inputs, torch.randn(case.output, device=device).to(dtype), backend)
    assert all(c.ok for c in comparisons), comparisons


GRAPHED = [
    *((row_case(op, 64, cols), backend) for op, backend in ROW_OPS for cols in (1000, 70_000)),
    (AttentionCase(2, 100, 100, 4, 2, 64, True), TRITON),
    (RopeCase(2, 30, 3, 64), TRITON),
    (EmbeddingCase(300, 50, 200), TRITON),
    (LinearCase(70, 64, 300), TRITON),
    (Fp8LinearCase(70, 64, 304), TRITON),
    (Fp8MLPCase(70, 64, 304), TRITON),
    (Fp8LinearCrossEntropyCase(70, 64, 304), TRITON),
    (ActivationLinearCase(70, 64, 32, bias=True), TRITON),
    (MLPCase(70, 64, 96), TRITON),
    (MLPCase(16896, 64, 256), TRITON),
    (LinearCrossEntropyCase(70, 64, 333, bias=True), TRITON),
]


def recorded(once: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    """What `once` launches as a graph, and the tensors that its replays fill; it has run before, on another stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        once()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = once()
    return graph, captured


@pytest.mark.parametrize(
    ("case", "backend"), [pytest.param(c, b, id=f"{c.op}-{c.label.replace(' ', '-')}-{b}") for c, b in GRAPHED]
)
def test_cuda_graph_and_side_stream(case: Case, backend: str, device: str) -> None:
    """Forward and backward, captured on another stream, replay to the eager result on new values: no host reads."""
    inputs = make_inputs(case, device, torch.bfloat16)
    grad = torch.randn(case.output, device=device)

    def once() -> list[Tensor]:
        outs = outputs(case.ours(*inputs, backend=backend))
        return [*outs, *torch.autograd.grad(outs, inputs, upstream(outs, grad))]

    graph, captured = recorded(once)
    with torch.no_grad():
        for t in inputs:
            t.copy_(torch.randn_like(t))
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, once(), strict=True))


def test_linear_cross_entropy_holds_a_chunk_of_the_logits(device: str) -> None:
    """All of them would take 4 GiB here, and an eighth 0.5; the weight and its gradient in float32 are small."""
    x = torch.randn(65536, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(32768, 256, device=device, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(0, 32768, (65536,), device=device)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_cross_entropy(x, weight, targets, backend=TRITON).backward()
    assert torch.cuda.max_memory_allocated() - before < 0.75 * 2**30


def test_adamw_is_refused_in_a_cuda_graph(device: str) -> None:
    """A replay would update whatever lies at the addresses of the capture."""
    tensors = [torch.rand(5000, device=device) for _ in range(4)]
    with torch.cuda.graph(torch.cuda.CUDAGraph()), pytest.raises(BackendError, match="CUDA graph"):
        ops.adamw_(*tensors, step=1, learning_rate=0.1, backend=TRITON)
