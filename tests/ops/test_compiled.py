"""Every backend under torch.compile: one graph, no break, and the results of an eager call."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops import compiled
from llmfast.ops.registry import BACKENDS
from llmfast.testing.accuracy import outputs, upstream
from llmfast.testing.cases import (
    ActivationLinearCase,
    AttentionCase,
    Case,
    CrossEntropyCase,
    DecodeAttentionCase,
    EmbeddingCase,
    Fp8LinearCase,
    Fp8LinearCrossEntropyCase,
    Fp8MLPCase,
    LinearCase,
    LinearCrossEntropyCase,
    MLPCase,
    RopeCase,
    RowCase,
    VarlenAttentionCase,
    make_inputs,
)

CASES: list[Case] = [
    *(RowCase(op, 9, 40) for op in ("softmax", "layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")),
    *(RowCase(op, 9, 40) for op in ("gelu", "bias_gelu", "swiglu", "geglu")),
    CrossEntropyCase(9, 40),
    CrossEntropyCase(9, 40, 0.1, 0.01, "none", 30),
    LinearCase(9, 40, 24),
    Fp8LinearCase(9, 48, 32),
    Fp8MLPCase(9, 48, 32),
    Fp8MLPCase(9, 48, 32, "silu", gated=True, bias=False),
    Fp8LinearCrossEntropyCase(9, 48, 32),
    Fp8LinearCase(0, 48, 32),
    Fp8MLPCase(0, 48, 32),
    Fp8LinearCrossEntropyCase(0, 48, 32),
    ActivationLinearCase(9, 40, 24, bias=True),
    MLPCase(9, 40, 24),
    MLPCase(9, 40, 24, "silu", gated=True, bias=False),
    LinearCrossEntropyCase(9, 40, 24, bias=True),
    RopeCase(2, 5, 2, 16),
    RopeCase(2, 5, 2, 16, interleaved=True),
    EmbeddingCase(30, 9, 40),
    VarlenAttentionCase(((9, 9), (0, 0), (4, 7)), 4, 2, 16, causal=True),
    AttentionCase(2, 9, 9, 4, 2, 16, causal=True),
    AttentionCase(2, 9, 9, 4, 2, 16, causal=True, window=3, softcap=2.0),
    DecodeAttentionCase(2, 3, 9, 4, 2, 16),
    DecodeAttentionCase(2, 3, 9, 4, 2, 16, page_size=3),
]

# Those that also a CPU can run without a look at values, such as lengths.
OPEN = [case for case in CASES if case.op not in ("attention_varlen", "decode_attention")]


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def results(function: Callable[..., Any], inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    outs = outputs(function(*inputs))
    if not inputs[0].requires_grad:  # the op has no gradient
        return [*outs]
    return [*outs, *torch.autograd.grad(outs, inputs, upstream(outs, grad))]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, row.name, id=f"{case.op}-{case.label.replace(' ', '-')}-{row.name}")
        for case in CASES
        for row in BACKENDS[case.op]
        if row.name == "triton" or (case.plain and case.op != "decode_attention")  # whose C++ reads the lengths
    ],
)
def test_one_graph(case: Case, backend: str, dynamic: bool, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    inputs = make_inputs(case, device, torch.float32)
    grad = torch.randn(case.output, device=device)
    function = torch.compile(
        lambda *t: case.ours(*t, backend=backend), fullgraph=True, dynamic=dynamic, backend="aot_eager"
    )
    eager = results(lambda *t: case.ours(*t, backend=backend), inputs, grad)
    for ours, expected in zip(results(function, inputs, grad), eager, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    "case",
    [
        c
        for c in CASES
        if c.op in ("linear", "fp8_linear", "fp8_mlp", "linear_cross_entropy", "activation_linear", "mlp")
    ],
    ids=lambda c: f"{c.op}-{c.label.replace(' ', '-')}",
)
def test_gradients_of_some_alone(case: Case, device: str) -> None:
    """Of one that is frozen an op gives none."""
    pytest.importorskip("triton")
    inputs = make_inputs(case, device, torch.float32)
    grad = torch.randn(case.output, device=device)
    for i, alone in enumerate(inputs):
        if not alone.requires_grad:
            continue
        some = [t.detach().requires_grad_(i == j) if t.requires_grad else t for j, t in enumerate(inputs)]
        torch._dynamo.reset()
        function = torch.compile(lambda *t: case.ours(*t, backend="triton"), fullgraph=True, backend="aot_eager")
        found, expected = (
            torch.autograd.grad(outs := outputs(f(*some)), some[i], upstream(outs, grad))
            for f in (function, lambda *t: case.ours(*t, backend="triton"))
        )
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.label.replace(' ', '-')}")
def test_launchers_give_what_the_compiler_is_told(
    case: Case, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes and dtypes, which code around the op is planned with, each tensor with memory of its own."""
    pytest.importorskip("triton")
    row = next(row for row in BACKENDS[case.op] if row.name == "triton")
    kernels = importlib.import_module(row.module)
    seen = []

    def spy(name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            results = getattr(kernels, name)(*args)
            seen.append((name, described(results), described(compiled._RESULTS[name](*args))))
            return results

        return call

    module = ModuleType(f"spy_{case.op}_{case.label}_{dtype}")  # a new name: the registry keeps what it has imported
    vars(module).update(
        {n: spy(n) if n in compiled._RESULTS else f for n, f in vars(kernels).items() if n.startswith(f"{case.op}_")}
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(BACKENDS, case.op, (replace(row, module=module.__name__),))
    inputs = make_inputs(case, device, dtype)
    results(lambda *t: case.ours(*t, backend="triton"), inputs, torch.randn(case.output, device=device))
    assert seen and all(given == promised for _, given, promised in seen), seen


def described(results: Any) -> list[Any]:
    many = results if isinstance(results, tuple) else (results,)
    alone = len({t.untyped_storage().data_ptr() for t in many if t is not None}) == sum(t is not None for t in many)
    return [alone, *(t if t is None else (t.shape, t.dtype, t.device) for t in many)]


# Not embedding, whose token ids the graph would make: a minute of compilation.
@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.op != "embedding"], ids=lambda c: f"{c.op}-{c.label.replace(' ', '-')}"
)
def test_auto_in_inductors_code(case: Case) -> None:
    """What auto takes, in bfloat16, among code that Inductor makes itself."""
    inputs = make_inputs(case, "cuda", torch.bfloat16)
    grad = torch.randn(case.output, device="cuda").bfloat16()
    function = torch.compile(lambda *t: case.ours(*(2 * x for x in t), backend="auto"), fullgraph=True)
    eager = results(lambda *t: case.ours(*(2 * x for x in t), backend="auto"), inputs, grad)
    for ours, expected in zip(results(function, inputs, grad), eager, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", OPEN, ids=lambda c: f"{c.op}-{c.label.replace(' ', '-')}")
def test_auto_where_sizes_stay_open(case: Case, device: str) -> None:
    """The choice by the length of a row takes sizes that are no numbers while the compiler traces."""
    inputs = make_inputs(case, device, torch.float32)
    grad = torch.randn(case.output, device=device)
    function = torch.compile(
        lambda *t: case.ours(*t, backend="auto"), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    eager = results(lambda *t: case.ours(*t, backend="auto"), inputs, grad)
    for ours, expected in zip(results(function, inputs, grad), eager, strict=True):
        assert torch.equal(ours, expected)


def test_loss_in_place_is_an_ordinary_one(device: str) -> None:
    """The logits stay as they were: a compiler plans memory itself."""
    logits, targets = torch.randn(9, 40, device=device, requires_grad=True), torch.arange(9, device=device)
    kept = logits.detach().clone()
    loss = torch.compile(lambda x: ops.cross_entropy(x, targets, in_place=True), fullgraph=True, backend="aot_eager")
    loss(logits).backward()
    assert torch.equal(logits, kept)
