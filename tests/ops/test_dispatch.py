"""Which backend runs a call: precedence, refusal with a reason, fallback with a warning, and what explain says."""

import importlib
import importlib.util
import inspect
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from llmfast import environment, ops
from llmfast.errors import BackendError, InputError
from llmfast.ops import BackendFallbackWarning, autograd, reference, registry
from llmfast.ops.registry import BACKENDS, Backend
from llmfast.testing.accuracy import outputs

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("LLMFAST_STRICT", raising=False)
    set_default(None, monkeypatch)
    yield
    environment.backend.cache_clear()


def set_default(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLMFAST_BACKEND as a new process would read it."""
    monkeypatch.delenv("LLMFAST_BACKEND", raising=False)
    if name is not None:
        monkeypatch.setenv("LLMFAST_BACKEND", name)
    environment.backend.cache_clear()


def ran(y: Tensor) -> str:
    """Which backend made y, as "forward+backward" where they differ: the autograd.Function keeps their module."""
    if not isinstance(y.grad_fn, BackwardCFunction):
        return "reference"
    modules = vars(y.grad_fn)["kernels"].__name__.split("+")
    names = ("triton" if m.startswith("llmfast.kernels.") else m.removeprefix("llmfast.native.") for m in modules)
    return "+".join(names)


def softmax_runs(device: str, backend: str | None = None) -> str:
    return ran(ops.softmax(torch.randn(2, 8, device=device, requires_grad=True), backend=backend))


# Small arguments of each op, as its users give them.
def calls(device: str, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    def t(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    return {
        "softmax": (t(2, 8),),
        "layer_norm": (t(2, 8), t(8), t(8)),
        "rms_norm": (t(2, 8), t(8)),
        "attention": (t(1, 4, 2, 16), t(1, 4, 1, 16), t(1, 4, 1, 16)),
        "attention_varlen": (
            *(t(4, 2, 16), t(4, 1, 16), t(4, 1, 16)),
            *[torch.tensor([0, 3, 4], dtype=torch.int32, device=device)] * 2,
            *(3, 3),
        ),
        "gelu": (t(2, 8),),
        "bias_gelu": (t(2, 8), t(8)),
        "swiglu": (t(2, 8), t(2, 8)),
        "geglu": (t(2, 8), t(2, 8)),
        "add_layer_norm": (t(2, 8), t(2, 8), t(8), t(8)),
        "add_rms_norm": (t(2, 8), t(2, 8), t(8)),
        "linear": (t(2, 8), t(3, 8), t(3)),
        "fp8_linear": (t(2, 16), t(32, 16), t(32)),
        "fp8_mlp": (t(2, 16), t(32, 16), t(32), t(16, 32), t(16)),
        "mlp": (t(2, 8), t(16, 8), t(16), t(8, 16), t(8)),
        "activation_linear": (t(2, 8), t(3, 8), t(3)),
        "rope": (t(1, 4, 2, 16), t(4, 8).detach(), t(4, 8).detach()),
        "linear_cross_entropy": (t(3, 8), t(5, 8), torch.tensor([0, 4, 2], device=device)),
        "fp8_linear_cross_entropy": (t(3, 16), t(5, 16), torch.tensor([0, 4, 2], device=device)),
        "embedding": (t(5, 8), torch.tensor([[0, 4, 0]], device=device)),
        "cross_entropy": (t(3, 8), torch.tensor([0, 7, 2], device=device)),
    }


# But for those without a gradient: tests/ops/test_adamw.py, test_append_kv.py and test_decode_attention.py.
OPS = [op for op in BACKENDS if op not in ("adamw", "append_kv", "decode_attention")]
WITH_TRITON = [op for op in OPS if any(row.name == "triton" for row in BACKENDS[op])]
WITHOUT_TRITON = [op for op in OPS if op not in WITH_TRITON]


@needs_triton
@pytest.mark.parametrize(
    ("argument", "block", "variable", "expected"),
    [
        (None, None, None, "auto"),
        (None, None, "triton", "triton"),
        (None, None, "reference", "reference"),
        (None, "triton", "reference", "triton"),
        (None, "reference", "triton", "reference"),
        (None, "auto", "triton", "auto"),
        (None, "auto", "reference", "auto"),
        ("triton", "reference", "reference", "triton"),
        ("reference", "triton", "triton", "reference"),
        ("auto", "triton", "triton", "auto"),
        ("auto", "reference", "reference", "auto"),
    ],
)
def test_precedence(
    argument: str | None,
    block: str | None,
    variable: str | None,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
    device: str,
) -> None:
    """Argument > use_backend > LLMFAST_BACKEND > auto, which takes a kernel and never the interpreter."""
    set_default(variable, monkeypatch)
    if expected == "auto":
        with ops.use_backend("auto"):
            pair = registry.chosen("softmax", (torch.randn(2, 8, device=device), None, False))
            expected = "+".join(dict.fromkeys(pair))
    if block is None:
        assert softmax_runs(device, argument) == expected
    else:
        with ops.use_backend(block):
            assert ops.current_backend() == block
            assert softmax_runs(device, argument) == expected
    assert ops.current_backend() == (variable or "auto")


@needs_triton
def test_auto_never_takes_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even when every condition but the device holds; and it has nothing to warn of."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in WITH_TRITON:
            monkeypatch.setitem(BACKENDS, op, tuple(row for row in BACKENDS[op] if row.name == "triton"))
            assert ran(outputs(getattr(ops, op)(*calls("cpu")[op]))[0]) == "reference"


@needs_triton
def test_nested_blocks_restore_the_outer_backend(device: str) -> None:
    with ops.use_backend("triton"):
        with ops.use_backend("reference"):
            assert softmax_runs(device) == "reference"
        assert softmax_runs(device) == "triton"
        with pytest.raises(KeyError), ops.use_backend("reference"):
            raise KeyError
        assert softmax_runs(device) == "triton"
    assert ops.current_backend() == "auto"


def test_threads_do_not_see_each_others_block() -> None:
    inside, seen = threading.Barrier(3), {}

    def work(name: str | None) -> None:
        if name is None:
            inside.wait(10)
            seen[name] = ops.current_backend()
            return
        with ops.use_backend(name):
            inside.wait(10)
            seen[name] = ops.current_backend()

    threads = [threading.Thread(target=work, args=(name,)) for name in ("triton", "reference", None)]
    with ops.use_backend("reference"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
    assert seen == {"triton": "triton", "reference": "reference", None: "auto"}


def by_argument(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ops.softmax(torch.ones(2), backend=name)


def by_block(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ops.use_backend(name):
        pytest.fail("the block must not be entered")


def by_variable(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    set_default(name, monkeypatch)
    ops.softmax(torch.ones(2))


@pytest.mark.parametrize(
    ("ask", "origin"), [(by_argument, "backend="), (by_block, "use_backend"), (by_variable, "LLMFAST_BACKEND")]
)
@pytest.mark.parametrize("name", ["tritn", "TRITON", "gpu"])
def test_unknown_backend(
    ask: Callable[[str, pytest.MonkeyPatch], None], origin: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError) as raised:
        ask(name, monkeypatch)
    message = str(raised.value)
    assert repr(name) in message and origin in message and "auto, reference, triton" in message


# Calls that the Triton backend cannot run, and the reason that it gives.
REFUSED = {
    "head_dim": (lambda d: ops.attention(*[torch.randn(1, 3, 1, 257, device=d)] * 3), "supports head_dim up to 256"),
    "float64-softmax": (lambda d: ops.softmax(torch.randn(2, 5, device=d).double()), "no float64 kernel"),
    "float64-layer_norm": (lambda d: ops.layer_norm(torch.randn(2, 5, device=d).double()), "no float64 kernel"),
    "float64-attention": (lambda d: ops.attention(*[torch.randn(1, 3, 1, 8).double().to(d)] * 3), "no float64 kernel"),
}
CPU_ONLY = {
    "bfloat16": (lambda _: ops.softmax(torch.randn(2, 5).bfloat16()), "interpreter computes bfloat16 wrongly"),
}


@needs_triton
@pytest.mark.parametrize(("call", "reason"), [pytest.param(*v, id=k) for k, v in (REFUSED | CPU_ONLY).items()])
def test_a_backend_asked_for_runs_or_says_why_not(
    call: Callable[[str], Tensor], reason: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    if device == "cuda" and (call, reason) in CPU_ONLY.values():
        pytest.skip("the interpreter is for machines without a GPU")
    torch.manual_seed(0)
    with ops.use_backend("reference"):
        expected = call(device)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallbackWarning)  # there may be a kernel to fall back from
        torch.testing.assert_close(call(device), expected)
    with ops.use_backend("triton"), pytest.raises(BackendError, match=reason):
        call(device)
    set_default("triton", monkeypatch)
    with pytest.raises(BackendError, match=reason):
        call(device)


@needs_triton
def test_triton_on_a_cpu_without_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="softmax: triton runs on cuda, not on cpu.*TRITON_INTERPRET=1.*'auto'"):
        ops.softmax(torch.ones(2), backend="triton")


@pytest.mark.parametrize("op", WITHOUT_TRITON)
def test_op_without_the_backend(op: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """An argument speaks of this op, so it is refused; a block and the variable speak of all ops."""
    arguments = calls(device)[op]
    with pytest.raises(BackendError, match=f"{op}: there is no triton backend"):
        getattr(ops, op)(*arguments, backend="triton")

    def first(backend: str | None = None) -> Tensor:
        return outputs(getattr(ops, op)(*arguments, backend=backend))[0]

    expected = first("reference")
    with ops.use_backend("triton"):
        assert torch.equal(first(), expected)
    set_default("triton", monkeypatch)
    assert torch.equal(first(), expected)


def broken(name: str) -> tuple[Backend, ...]:
    """A row of the table whose module is missing; a new name each time, as warnings are said once per reason."""
    return (Backend("triton", f"llmfast.kernels.{name}", frozenset({"cpu"}), frozenset({torch.float32})),)


def test_fallback_warns_once_and_names_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "softmax", broken("missing_softmax"))
    monkeypatch.setitem(BACKENDS, "layer_norm", broken("missing_norm"))
    x = torch.randn(2, 5)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            assert torch.equal(ops.softmax(x), ops.softmax(x, backend="reference"))
        assert [w.category for w in said] == [BackendFallbackWarning]
        ops.layer_norm(x)
    assert [str(w.message).split(":")[0] for w in said] == ["softmax", "layer_norm"]
    text = str(said[0].message)
    assert "triton llmfast.kernels.missing_softmax cannot be imported: ModuleNotFoundError" in text
    assert {w.filename for w in said} == {__file__}


def test_strict_makes_the_fallback_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "softmax", broken("missing_in_strict"))
    x = torch.randn(2, 5)
    for value in ("1", "yes"):
        monkeypatch.setenv("LLMFAST_STRICT", value)
        with pytest.raises(BackendError, match="softmax: strict mode .*missing_in_strict cannot be imported"):
            ops.softmax(x)
    ops.softmax(x, backend="reference")  # nothing falls back: the reference was asked for
    monkeypatch.setitem(BACKENDS, "gelu", ())
    ops.gelu(x)  # nor here: there is no kernel
    for value in ("0", ""):
        monkeypatch.setenv("LLMFAST_STRICT", value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BackendFallbackWarning)
            ops.softmax(x)


def test_explicit_backend_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "softmax", broken("missing_explicit"))
    with pytest.raises(BackendError, match="missing_explicit cannot be imported: ModuleNotFoundError"):
        ops.softmax(torch.ones(2), backend="triton")


def test_auto_takes_the_first_row_that_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past a row that cannot, without a warning: the reference is not what ran."""
    good = Backend("triton", "llmfast.ops.reference", frozenset({"cpu"}), frozenset({torch.float32}))
    monkeypatch.setitem(BACKENDS, "softmax", (*broken("missing_first"), good))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.choose("softmax", None, (torch.ones(2), None, False)) is reference


def test_auto_mixes_the_backends_that_are_fastest_each_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing will be differentiated, or the other cannot run, the forward's backend is all."""

    def plant(name: str, factor: float, limit: str | None = None) -> Backend:
        module = ModuleType(f"planted_{name}_{factor}_{limit}")  # a new name: the registry keeps what it has imported
        vars(module).update(
            gelu_fwd=lambda x, approximate: factor * x,
            gelu_bwd=lambda dy, x, approximate: factor * dy,
            gelu_limits=lambda *args: limit,
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
        return Backend(name, module.__name__, frozenset({"cpu"}), frozenset({torch.float32}))

    def factors() -> tuple[float, float]:
        x = torch.ones(2, requires_grad=True)
        y = ops.gelu(x)
        y.sum().backward()
        assert x.grad is not None
        return y[0].item(), x.grad[0].item()

    monkeypatch.setitem(registry.PREFERRED, "gelu", {"fwd": ((8, "cuda"),), "bwd": ((1, "cuda"), (8, "triton"))})
    monkeypatch.setitem(BACKENDS, "gelu", (plant("triton", 2.0), plant("cuda", 3.0)))
    monkeypatch.setitem(registry.PREFERRED_WHERE_SMALL, "gelu", {"fwd": "triton", "bwd": "triton"})
    assert factors() == (2.0, 2.0)
    monkeypatch.setattr(registry, "SMALL", 1)
    assert factors() == (3.0, 2.0)
    assert ops.explain("gelu", torch.ones(2)).splitlines()[:2] == [
        "gelu: triton: chosen by auto for the backward pass",
        "gelu: cuda: chosen by auto for the forward pass",
    ]
    with torch.no_grad():
        assert registry.choose("gelu", None, (torch.ones(2), "none")).__name__.startswith("planted_cuda")
    monkeypatch.setitem(BACKENDS, "gelu", (plant("triton", 2.0, "has no time"), plant("cuda", 3.0)))
    assert factors() == (3.0, 3.0)
    monkeypatch.setitem(BACKENDS, "gelu", (plant("triton", 2.0), plant("cuda", 3.0, "has no time")))
    assert factors() == (2.0, 2.0)


@pytest.mark.parametrize("op", OPS)
def test_explain_names_every_backend_and_its_reason(op: str, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    names = [*(row.name for row in BACKENDS[op]), "reference"]

    def explained(dtype: torch.dtype) -> list[str]:
        lines = ops.explain(op, *calls(device, dtype)[op]).splitlines()
        assert [line.split(": ")[:2] for line in lines] == [[op, name] for name in names]
        return [line.split(": ", 2)[2] for line in lines]

    *refused, last = explained(torch.float64)
    assert last == "chosen by auto"
    here = [row for row in BACKENDS[op] if device in row.devices]
    for row, reason in zip(BACKENDS[op], refused, strict=True):
        interpreted = row.name == "triton" and importlib.util.find_spec("triton")
        assert ("no float64 kernel" if row in here or interpreted else "runs on ") in reason
    said = dict(zip(names, explained(torch.float32), strict=True))
    taken = [name for name, reason in said.items() if reason.startswith("chosen by auto")]
    able = [row.name for row in here if said[row.name].startswith(("can run", "chosen by auto"))]
    assert 1 <= len(taken) <= 2 and set(taken) <= set(able or ["reference"])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if device == "cpu" and op in WITH_TRITON:
        assert "runs on cuda, not on cpu" in explained(torch.float32)[0]


@needs_triton
def test_explain_takes_the_ops_own_keywords(device: str) -> None:
    q = torch.randn(1, 4, 2, 257, device=device)
    explained = ops.explain("attention", q, q, q, causal=True, scale=0.5)
    assert "attention: triton: supports head_dim up to 256, not 257\n" in explained
    assert explained.endswith("attention: reference: chosen by auto")


def test_explain_refuses_unknown_ops() -> None:
    with pytest.raises(InputError, match="unknown op 'sofmax'; choose one of: softmax, layer_norm"):
        ops.explain("sofmax", torch.ones(2))


def test_the_table_covers_every_public_op() -> None:
    functions = {name for name in ops.__all__ if name in vars(reference) and name != "decode_attention"}
    assert functions == set(OPS) == set(calls("cpu")) and len(functions) == 21
    assert {op for op in OPS if BACKENDS[op]} <= set(autograd.FUNCTIONS)


@needs_triton
@pytest.mark.parametrize(
    ("op", "row"),
    [pytest.param(op, row, id=f"{op}-{row.name}") for op in (*OPS, "decode_attention") for row in BACKENDS[op]],
)
def test_backends_have_the_references_parameters(op: str, row: Backend) -> None:
    """Modules are named as strings and called by position, which hides a mistake from type checkers."""
    try:
        module = importlib.import_module(row.module)
    except BackendError as error:
        pytest.skip(str(error))
    expected = list(inspect.signature(getattr(reference, op)).parameters)
    assert list(inspect.signature(getattr(module, f"{op}_fwd")).parameters) == expected
    assert hasattr(module, f"{op}_bwd") is (op in autograd.FUNCTIONS)
    if hasattr(module, f"{op}_limits"):
        assert list(inspect.signature(getattr(module, f"{op}_limits")).parameters) == expected


@needs_triton
@pytest.mark.parametrize(
    ("op", "backend"), [pytest.param(op, row.name, id=f"{op}-{row.name}") for op in OPS for row in BACKENDS[op]]
)
def test_double_backward_is_refused(op: str, backend: str, device: str) -> None:
    """A kernel has no second derivative; a wrong one (zero) would be silent."""
    arguments = calls(device)[op]
    out = outputs(getattr(ops, op)(*arguments, backend=backend))[0]
    (grad,) = torch.autograd.grad(out.square().sum(), arguments[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


TRANSFORMED: dict[str, Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Any]]] = {
    "vmap": torch.vmap,
    "grad": lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),))[1],
    "forward mode": lambda f: lambda x: dual(f, x),
}


def dual(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(f(forward_ad.make_dual(x, x.cos()))).tangent
    assert tangent is not None
    return tangent


@pytest.mark.parametrize("transform", TRANSFORMED)
@pytest.mark.parametrize("backend", [row.name for row in BACKENDS["softmax"]])
def test_transforms_are_refused_by_kernels(transform: str, backend: str, device: str) -> None:
    """A kernel would give a tangent of zero, silently, or fail within; the reference is transformed."""
    try:
        importlib.import_module(next(row.module for row in BACKENDS["softmax"] if row.name == backend))
    except (BackendError, ImportError) as error:
        pytest.skip(str(error))
    x, make = torch.randn(3, 5, 8, device=device), TRANSFORMED[transform]
    with pytest.raises(BackendError, match="cannot be transformed|forward-mode|runs on"):
        make(lambda t: ops.softmax(t, backend=backend))(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BackendFallbackWarning)
        torch.testing.assert_close(make(ops.softmax)(x), make(lambda t: torch.softmax(t, -1))(x))
