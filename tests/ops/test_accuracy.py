"""Every backend of every op against the float64 truth, forward and gradients, over the shared table of cases."""

import importlib
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops import registry
from llmfast.ops.registry import BACKENDS, REFERENCE
from llmfast.testing.accuracy import compare, outputs, upstream
from llmfast.testing.cases import (
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
from llmfast.testing.tables import TEST_CASES

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COVERED = {op: [*(row.name for row in BACKENDS[op]), REFERENCE] for op in TEST_CASES}


def backends(case: Case) -> list[str]:
    """Those that do all that the case asks for."""
    return [name for name in COVERED[case.op] if case.plain or name in (REFERENCE, "triton")]


def supported(op: str, backend: str, dtype: torch.dtype) -> bool:
    if backend == "triton" and dtype is torch.bfloat16 and not torch.cuda.is_available():
        return False  # the interpreter computes bfloat16 wrongly: there it is left to a GPU
    return backend == REFERENCE or any(row.name == backend and dtype in row.dtypes for row in BACKENDS[op])


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check(case: Case, inputs: list[Tensor], backend: str, grad: Tensor | None = None) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    if grad is None:
        generator = torch.Generator(inputs[0].device).manual_seed(1)
        grad = torch.randn(case.output, device=inputs[0].device, generator=generator).to(inputs[0].dtype)
    comparisons = compare(case, inputs, grad, backend)
    assert all(c.ok for c in comparisons), "; ".join(str(c) for c in comparisons)


@pytest.mark.parametrize(
    ("case", "backend", "dtype"),
    [
        pytest.param(case, backend, dtype, id=f"{op}-{case.label.replace(' ', '-')}-{backend}-{dtype_name(dtype)}")
        for op, cases in TEST_CASES.items()
        for case in cases
        for backend in backends(case)
        for dtype in DTYPES
        if supported(op, backend, dtype)
    ],
)
def test_against_truth(case: Case, backend: str, dtype: torch.dtype, device: str) -> None:
    check(case, make_inputs(case, device, dtype), backend)


ORDINARY: list[Case] = [
    RowCase("softmax", 37, 300),
    RowCase("layer_norm", 37, 300),
    RowCase("layer_norm", 9, 9001),
    RowCase("rms_norm", 37, 300),
    RowCase("add_layer_norm", 37, 300),
    RowCase("add_rms_norm", 37, 300),
    RowCase("gelu", 37, 300),
    RowCase("bias_gelu", 37, 300),
    RowCase("swiglu", 37, 300),
    RowCase("geglu", 37, 300),
    CrossEntropyCase(37, 300),
    CrossEntropyCase(37, 300, 0.1, 0.01, "none", 30),
    RopeCase(2, 9, 3, 64),
    RopeCase(2, 9, 3, 64, interleaved=True),
    RopeCase(2, 9, 3, 64, by_row=True),
    EmbeddingCase(90, 37, 300),
    LinearCase(37, 300, 400),
    Fp8LinearCase(37, 304, 400),
    Fp8MLPCase(37, 48, 80),
    Fp8LinearCrossEntropyCase(90, 32, 37),
    ActivationLinearCase(37, 300, 40, bias=True),
    MLPCase(37, 40, 80),
    LinearCrossEntropyCase(90, 30, 37, bias=True),
    AttentionCase(2, 70, 90, 4, 2, 64, causal=True),
]
EACH = pytest.mark.parametrize(
    ("case", "backend"),
    [pytest.param(c, b, id=f"{c.op}-{c.label.replace(' ', '-')}-{b}") for c in ORDINARY for b in backends(c)],
)


@pytest.mark.parametrize("forward", [True, False], ids=["forward", "backward"])
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(c, b, id=f"{c.op}-{c.label.replace(' ', '-')}-{b}")
        for c in ORDINARY
        for b in ["cuda" if torch.cuda.is_available() else "cpp"]  # where Triton's kernels run, too
        if {b, "triton"} <= set(backends(c)) and c.op != "mlp"  # of which the C++ keeps more
    ],
)
def test_passes_of_two_backends(
    case: Case, backend: str, forward: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one saves, another's backward can use: a native library's forward with Triton's backward, and vice versa."""
    rows = [next(row for row in BACKENDS[case.op] if row.name == name) for name in (backend, "triton")]
    mixed = registry._kernels(case.op, *(rows if forward else reversed(rows)))
    name = f"{case.op} of {mixed.__name__}"  # one of its own: the registry keeps what it has imported
    monkeypatch.setitem(sys.modules, name, mixed)
    monkeypatch.setitem(BACKENDS, case.op, (replace(rows[0], module=name),))
    check(case, make_inputs(case, device, torch.float32), backend)


@EACH
@pytest.mark.parametrize("scale", [1e-3, 10.0])
def test_magnitudes(case: Case, backend: str, scale: float, device: str) -> None:
    """Small values, and large ones whose scores and variances are far from 1."""
    dtype = torch.float32
    if case.op == "attention" and scale > 1:
        # Scores of +-60: past that, luck in the rounding of q k^T decides for everyone. The interpreter's BLAS rounds
        # the k q^T of the backward pass differently, which only a 16-bit dtype's own error covers; a GPU does not.
        scale, dtype = 4.0, {"cpp": torch.bfloat16}.get(backend, torch.float32 if device == "cuda" else torch.float16)
    check(case, make_inputs(case, device, dtype, scale=scale), backend)


@pytest.mark.parametrize(
    ("cols", "backend", "dtype"),
    [
        pytest.param(cols, backend, dtype, id=f"{cols}-{backend}-{dtype_name(dtype)}")
        for cols in (300, 5000, 9001, 40_000)
        for backend in COVERED["layer_norm"]
        for dtype in DTYPES
        if supported("layer_norm", backend, dtype)
    ],
)
def test_large_mean(cols: int, backend: str, dtype: torch.dtype, device: str) -> None:
    """Means of 1000 deviations, 30 in bfloat16: a variance taken as E[x^2] - E[x]^2 loses all its digits here."""
    case, mean = RowCase("layer_norm", 9, cols), 30.0 if dtype is torch.bfloat16 else 1000.0
    inputs = [(t.detach() + mean).requires_grad_() for t in make_inputs(case, device, dtype)]
    check(case, inputs, backend)


def strided(t: Tensor) -> Tensor:
    """The same values with a gap after every row and every element of the leading dimensions."""
    wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), float("nan"), device=t.device, dtype=t.dtype)
    wide[..., 1 : 1 + t.shape[-1]] = t
    return wide[..., 1 : 1 + t.shape[-1]]


def transposed(t: Tensor) -> Tensor:
    """The same values with the last dimension not the fastest."""
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@EACH
@pytest.mark.parametrize("layout", [strided, transposed])
def test_layouts(case: Case, backend: str, layout, device: str) -> None:
    """Strides change nothing: the results are those of contiguous copies.

    Of layers, whose products PyTorch's library sums in another order for another layout, they are as near the truth.
    """
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = [t.detach() for t in make_inputs(case, device, torch.float32)]
    grad = torch.randn(case.output, device=device)
    if isinstance(case, LinearCase | ActivationLinearCase) or type(case) is MLPCase:
        check(case, [layout(t).requires_grad_() for t in inputs], backend, layout(grad))
        return
    results = []
    for change in (torch.Tensor.contiguous, layout):
        leaves = [change(t).requires_grad_() for t in inputs]
        outs = outputs(case.ours(*leaves, backend=backend))
        grads = upstream(outs, change(grad) if grad.dim() else grad)
        results.append([*outs, *torch.autograd.grad(outs, leaves, grads)])
    for contiguous, strided_one in zip(*results, strict=True):
        torch.testing.assert_close(strided_one, contiguous)


@EACH
def test_expanded_gradient(case: Case, backend: str, device: str) -> None:
    """`out.sum().backward()` hands back one number with every stride 0."""
    inputs = make_inputs(case, device, torch.float32)
    check(case, inputs, backend, torch.full((), 0.7, device=device).expand(case.output))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("backend", COVERED["rope"])
def test_rope_reads_halves_of_wider_tables(backend: str, interleaved: bool, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    if backend == "cpp" and interleaved:
        pytest.skip("cpp has one layout")
    x, wide = torch.randn(2, 5, 3, 8, device=device), torch.randn(2, 5, 8, device=device)
    expected = ops.rope(x, *wide[..., :4].contiguous(), interleaved=interleaved, backend=backend)
    assert torch.equal(ops.rope(x, *wide[..., :4], interleaved=interleaved, backend=backend), expected)
    apart = wide[0, :, :4], wide[1, :, :4].contiguous()  # each with strides of its own
    assert torch.equal(ops.rope(x, *apart, interleaved=interleaved, backend=backend), expected)


@pytest.mark.parametrize("backend", COVERED["attention"])
def test_attention_reads_packed_qkv_by_strides(backend: str, device: str) -> None:
    """q, k and v as slices of one projection, as the model hands them over, equal their copies bit for bit."""
    if backend == "triton":
        pytest.importorskip("triton")
    packed = torch.randn(2, 50, 8, 64, device=device)
    slices = packed.split((4, 2, 2), dim=2)
    copies = [t.contiguous() for t in slices]
    got = ops.attention(*slices, causal=True, backend=backend)
    assert torch.equal(got, ops.attention(*copies, causal=True, backend=backend))


@pytest.mark.parametrize("backend", COVERED["attention"])
def test_attention_queries_without_keys_give_zeros(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = make_inputs(AttentionCase(1, 80, 16, 2, 2, 32, causal=True), device, torch.float32)
    out = ops.attention(q, k, v, causal=True, backend=backend)
    assert (out[:, :64] == 0).all() and (out[:, 64:] != 0).any()
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :64] == 0).all()


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
@pytest.mark.parametrize("backend", COVERED["attention"])
def test_attention_scale(backend: str, scale: float, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(AttentionCase(1, 40, 70, 2, 2, 64, causal=True), device, torch.float32)
    truth = ops.attention(*(t.double() for t in inputs), causal=True, scale=scale, backend="reference")
    torch.testing.assert_close(
        ops.attention(*inputs, causal=True, scale=scale, backend=backend).double(), truth, rtol=1e-5, atol=1e-5
    )


LSE_OPTIONS: list[dict[str, Any]] = [
    *({}, {"causal": True}, {"scale": -0.3}, {"scale": 0.0}),
    *({"causal": True, "window": 5}, {"softcap": 3.0}),
]


@pytest.mark.parametrize(
    ("backend", "options"),
    [(b, o) for b in COVERED["attention"] for o in LSE_OPTIONS if b != "cpp" or not {"window", "softcap"} & set(o)],
    ids=str,
)
def test_attention_log_sum_exp(backend: str, options: dict[str, Any], device: str) -> None:
    """Of the scores as they are scaled, capped and masked; -inf for the 20 queries that see no key. The output and its
    gradients are those without it, and it has none."""
    q, k, v = make_inputs(AttentionCase(2, 50, 30, 4, 2, 16, True), device, torch.float32)
    out, lse = ops.attention(q, k, v, return_lse=True, backend=backend, **options)
    with torch.no_grad():
        alone = ops.attention(q, k, v, return_lse=True, backend=backend, **options)
    assert lse.dtype == torch.float32 and not lse.requires_grad
    assert torch.equal(lse, alone[1])
    scores = torch.einsum("bqhd,bkhd->bhqk", q.double(), k.double().repeat_interleave(2, 2)) * options.get(
        "scale", 0.25
    )
    if cap := options.get("softcap"):
        scores = cap * torch.tanh(scores / cap)
    if "causal" in options:
        seen = torch.ones(50, 30, dtype=torch.bool, device=device).tril(-20).triu(-19 - options.get("window", 99))
        scores = scores.masked_fill(~seen, float("-inf"))
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1).detach(), rtol=1e-5, atol=1e-5)
    plain = ops.attention(q, k, v, backend=backend, **options)
    assert torch.equal(out, plain)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (out, plain)), strict=True):
        assert torch.equal(a, b)


def test_attention_reads_no_block_left_of_the_window(device: str) -> None:
    pytest.importorskip("triton")
    q, k, v = (t.detach() for t in make_inputs(AttentionCase(1, 5, 900, 2, 1, 16, True), device, torch.float32))
    k[:, :600] = v[:, :600] = float("nan")
    got = ops.attention(q, k, v, causal=True, window=30, backend="triton")
    torch.testing.assert_close(got, ops.attention(q, k[:, 600:], v[:, 600:], causal=True, window=30, backend=REFERENCE))


@pytest.mark.parametrize("backend", COVERED["attention"])
def test_attention_does_not_read_past_its_keys(backend: str, device: str) -> None:
    """Keys as the front of a larger buffer of garbage, as in a key-value cache."""
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = (t.detach() for t in make_inputs(AttentionCase(2, 5, 37, 4, 2, 64, causal=True), device, torch.float32))
    buffers = [torch.full((2, 100, 2, 64), float("nan"), device=device) for _ in range(2)]
    for buffer, t in zip(buffers, (k, v), strict=True):
        buffer[:, :37] = t
    cached = ops.attention(q, buffers[0][:, :37], buffers[1][:, :37], causal=True, backend=backend)
    assert torch.equal(cached, ops.attention(q, k, v, causal=True, backend=backend))


@pytest.mark.parametrize("backend", COVERED["attention"])
@pytest.mark.parametrize("queries", [1, 30])
def test_attention_scores_that_rise_along_the_keys(queries: int, backend: str, device: str) -> None:
    """By 3000 from the first key to the last: exponentials against any but the largest maximum overflow."""
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = make_inputs(AttentionCase(1, queries, 600, 2, 1, 64, False), device, torch.float32)
    q, k, v = q.detach(), k.detach(), v.detach()
    q[..., 0], k[..., 0] = 8.0, torch.linspace(0, 3000, 600, device=device)[None, :, None]
    truth = ops.attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(ops.attention(q, k, v, backend=backend).double(), truth, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("backend", COVERED["softmax"])
@pytest.mark.parametrize("cols", [50, 40_000])
def test_softmax_infinities(backend: str, cols: int, device: str) -> None:
    """-inf gets probability 0, a row of nothing else is NaN as in PyTorch, and so is one with +inf or NaN."""
    if backend == "triton":
        pytest.importorskip("triton")
    x = torch.randn(5, cols, device=device)
    x[0, : cols // 2] = float("-inf")
    x[1] = float("-inf")
    x[2, 3] = float("inf")
    x[3, cols - 1] = float("nan")
    y, expected = ops.softmax(x, backend=backend), torch.softmax(x, -1)
    assert torch.equal(y.isnan(), expected.isnan())
    torch.testing.assert_close(y, expected, equal_nan=True)


MASKS = {  # over x of shape (2, 3, 5, n)
    "full": (2, 3, 5, None),
    "one for all heads": (2, 1, 5, None),
    "keys": (2, 1, 1, None),
    "queries and keys": (5, None),
    "queries": (5, 1),
}


@pytest.mark.parametrize("backend", ["triton", REFERENCE])
@pytest.mark.parametrize("cols", [3, 50, 40_000])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", [None, *MASKS])
def test_softmax_of_what_is_visible(layout: str | None, causal: bool, cols: int, backend: str, device: str) -> None:
    """Against PyTorch's own softmax of -inf; rows that see nothing give zeros and pass no gradient on."""
    if backend == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, cols, generator=generator).to(device).requires_grad_()
    mask = None
    if layout is not None:
        mask = (torch.rand([n or cols for n in MASKS[layout]], generator=generator) > 0.5).to(device)
        mask.flatten(0, -2)[0] = False
    visible = torch.ones(5, cols, dtype=torch.bool, device=device)
    visible = (visible.tril(cols - 5) if causal else visible) & (visible if mask is None else mask)
    hidden = torch.softmax(x.double().masked_fill(~visible, float("-inf")), -1)
    truth = torch.where(visible, hidden, 0.0)
    y = ops.softmax(x, mask=mask, causal=causal, backend=backend)
    torch.testing.assert_close(y.double(), truth, rtol=2e-6, atol=1e-9)
    assert (y[~visible.expand(x.shape)] == 0).all()
    grad = torch.randn(x.shape, generator=generator).to(device)
    expected = truth * (grad - (grad * truth).sum(-1, keepdim=True))
    (dx,) = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(dx.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", REFERENCE])
def test_masked_softmax_keeps_nan(backend: str, device: str) -> None:
    """A visible NaN spoils its row, a hidden one does not; a row whose visible values are all -inf is NaN."""
    if backend == "triton":
        pytest.importorskip("triton")
    x = torch.zeros(4, 6, device=device)
    x[0, 1], x[1, 4], x[2, :4] = float("nan"), float("nan"), float("-inf")
    y = ops.softmax(x, mask=torch.arange(6, device=device) < 4, backend=backend)
    assert y.isnan().tolist() == [[True] * 4 + [False] * 2, [False] * 6, [True] * 4 + [False] * 2, [False] * 6]


@pytest.mark.parametrize("backend", ["triton", REFERENCE])
def test_embedding_of_padding_gets_no_gradient(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    weight, tokens = torch.randn(5, 8, device=device, requires_grad=True), torch.tensor([[1, 4], [4, 0]], device=device)
    out = ops.embedding(weight, tokens, padding_idx=-1, backend=backend)
    assert torch.equal(out, weight[tokens])
    (grad,) = torch.autograd.grad(out.sum(), weight)
    assert grad[:, 0].tolist() == [1, 1, 0, 0, 0]


@EACH
def test_backward_is_bitwise_repeatable(case: Case, backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(case, device, torch.float32)
    outs = outputs(case.ours(*inputs, backend=backend))
    grads = upstream(outs, torch.randn_like(outs[0]))
    first = torch.autograd.grad(outs, inputs, grads, retain_graph=True)
    for _ in range(100 if device == "cuda" else 3):
        again = torch.autograd.grad(outs, inputs, grads, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", COVERED["softmax"])
@pytest.mark.parametrize("cols", [50, 40_000])
def test_softmax_of_large_values(backend: str, cols: int, device: str) -> None:
    """Values of +-1000, whose exponentials overflow unless the row's maximum is taken off first."""
    if backend == "triton":
        pytest.importorskip("triton")
    x = 300 * torch.randn(4, cols, device=device)
    torch.testing.assert_close(ops.softmax(x, backend=backend), torch.softmax(x, -1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.softmax(x - 1e4, backend=backend), torch.softmax(x - 1e4, -1), rtol=1e-5, atol=1e-6)


def test_attention_copies_rows_too_far_apart_for_32_bit_offsets() -> None:
    """Where the multiples of a stride inside one tile pass 2^31; meta tensors, as the real ones take gigabytes."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.attention")
    buffer = torch.empty(2**33, dtype=torch.float16, device="meta")
    far, near = (buffer.as_strided((1, 31, 1, 16), (0, stride, 16, 1)) for stride in (2**27, 2**20))
    assert kernels._readable(far).stride(1) == 16
    assert kernels._readable(near) is near
