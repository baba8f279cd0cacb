"""The native ops as torch sees them: what they refuse, their fakes, forks, threads, leaks, and each instruction set."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmfast import ops
from llmfast.errors import BackendError
from llmfast.native import library
from llmfast.ops import BackendFallbackWarning
from llmfast.testing.accuracy import compare
from llmfast.testing.arguments import native_arguments
from llmfast.testing.cases import AttentionCase, CrossEntropyCase, RowCase, make_inputs
from llmfast.testing.tables import TEST_CASES

VARIANTS = ("baseline", "avx2", "avx512", "avx512_bf16")


OPS = list(native_arguments())


def call(op: str, arguments: list[Any]) -> Any:
    return getattr(torch.ops.llmfast, op)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op: str, dtype: torch.dtype) -> None:
    """Schema, fake tensors and mutation are as declared."""
    torch.library.opcheck(getattr(torch.ops.llmfast, op).default, tuple(native_arguments(dtype)[op]))


def sparse(t: Tensor) -> Tensor:
    return t.to_sparse() if t.dim() else t.double()


CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "none": lambda t: None,
    "float64": lambda t: t.double(),
    "float16": lambda t: t.half(),
    "int32": lambda t: t.int(),
    "bool": lambda t: t.bool(),
    "complex": lambda t: t.to(torch.complex64),
    "longer": lambda t: torch.cat([t, t], -1) if t.dim() else t[None].expand(2),
    "taller": lambda t: torch.cat([t, t], 0) if t.dim() else t[None].expand(3),
    "empty": lambda t: t[..., :0] if t.dim() else t[None][:0],
    "no rows": lambda t: t[:0] if t.dim() else t[None][:0],
    "flat": lambda t: t.reshape(-1),
    "scalar": lambda t: t.reshape(-1)[0],
    "more dimensions": lambda t: t[None, None],
    "nine dimensions": lambda t: t.reshape(1, 1, 1, 1, 1, 1, 1, *t.shape),
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() else t,
    "every second": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.reshape(-1)[0].expand(t.shape),
    "reversed": lambda t: t.flip(0) if t.dim() else t,
    "sparse": sparse,
    "meta": lambda t: t.to("meta"),
    "cpu": lambda t: t.cpu(),
    "huge target": lambda t: torch.full_like(t, 2**60) if t.dtype == torch.int64 else t,
    "nan": lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t,
    "list": lambda t: t.tolist(),
    "unchanged": lambda t: t,
}


@settings(max_examples=2500, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_wrong_arguments_are_refused_by_name_and_never_crash(data: st.DataObject) -> None:
    call_with_changes(data, "cpu", OPS, [torch.float32, torch.bfloat16])


def call_with_changes(data: st.DataObject, device: str, names: list[str], dtypes: list[torch.dtype]) -> None:
    """One of these ops with up to three arguments changed runs, or raises one exception that says which is wrong."""
    op = data.draw(st.sampled_from(names))
    arguments = native_arguments(data.draw(st.sampled_from(dtypes)), device)[op]
    tensors = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]
    for i in data.draw(st.lists(st.sampled_from(tensors), max_size=3, unique=True)):
        arguments[i] = CHANGES[data.draw(st.sampled_from(sorted(CHANGES)))](arguments[i])
    parameters = [argument.name for argument in getattr(torch.ops.llmfast, op).default._schema.arguments]
    try:
        call(op, arguments)
    except (RuntimeError, IndexError, AttributeError, ValueError) as error:
        message = str(error)
        named = op in message and any(f" {name} " in message or f"'{name}'" in message for name in parameters)
        # A meta tensor goes to the fakes; a sparse one, or none at all, to no kernel: those refusals are torch's own.
        meta = any(isinstance(a, Tensor) and a.is_meta for a in arguments)
        torchs = ("no tensor arguments", f"Could not run 'llmfast::{op}'")
        assert named or meta or any(text in message for text in torchs), message


@pytest.mark.parametrize(("op", "position", "wrong", "said"), [
    ("softmax_fwd", 0, torch.ones(2, 0), "softmax_fwd: x must have a last dimension of at least one element"),
    ("softmax_fwd", 0, torch.ones(()), "softmax_fwd: x must have a last dimension"),
    ("softmax_fwd", 0, torch.ones(2, 3).double(), "softmax_fwd: x has a dtype"),
    ("softmax_fwd", 0, torch.ones(3, 2).t(), "softmax_fwd: x must have adjacent elements"),
    ("softmax_fwd", 0, torch.ones(4, 4, 6)[:, :3], "softmax_fwd: x has leading dimensions that do not form"),
    ("softmax_bwd", 0, torch.ones(4, 5), r"softmax_bwd: dy has shape \(4, 5\) but y \(4, 6\)"),
    ("layer_norm_fwd", 1, torch.ones(5), r"layer_norm_fwd: weight has shape \(5\); it must be \(6,\)"),
    ("layer_norm_fwd", 2, torch.ones(12)[::2], "layer_norm_fwd: bias must be contiguous"),
    ("layer_norm_bwd", 3, torch.ones(4).double(), "layer_norm_bwd: mean has a dtype"),
    ("rms_norm_bwd", 3, torch.ones(3), r"rms_norm_bwd: rstd has shape \(3\); it must be \(4,\)"),
    ("bias_gelu_fwd", 1, torch.ones(6).half(), "bias_gelu_fwd: bias has a dtype"),
    ("swiglu_bwd", 2, torch.ones(4, 6).bfloat16(), "swiglu_bwd: up has a dtype"),
    ("rope", 0, torch.ones(2, 3, 2, 5), "rope: x has shape .* head_dim even"),
    ("rope", 1, torch.ones(3, 4), r"rope: cos has shape \(3, 4\); it must be \(3, 3\)"),
    ("cross_entropy_fwd", 0, torch.ones(6), "cross_entropy_fwd: logits must have two dimensions"),
    ("cross_entropy_fwd", 1, torch.tensor([0, 6, 1, 2]), "cross_entropy_fwd: targets holds 6 at row 1; it must be bel"),
    ("cross_entropy_fwd", 1, torch.tensor([0, 1, -1, 2]), "cross_entropy_fwd: targets holds -1 at row 2"),
    ("cross_entropy_bwd", 3, torch.ones(2, 3), r"cross_entropy_bwd: statistics has shape \(2, 3\)"),
    ("cross_entropy_bwd", 0, torch.ones(2), "cross_entropy_bwd: grad must hold one element"),
    ("attention_fwd", 0, torch.ones(2, 5, 4), r"attention_fwd: q has shape \(2, 5, 4\); it must be \(batch, length"),
    ("attention_fwd", 1, torch.ones(2, 7, 3, 6), r"attention_fwd: v has shape .* but k \(2, 7, 3, 6\)"),
    ("attention_bwd", 5, torch.ones(2, 2, 4, 6), "attention_bwd: statistics has shape"),
    ("attention_bwd", 4, torch.ones(2, 5, 6, 4).transpose(2, 3), "attention_bwd: out must be contiguous"),
    ("adamw_", 1, torch.ones(6, 4), "adamw_: grad has shape"),
    ("adamw_", 0, torch.ones(6, 4).t(), "adamw_: parameter must be contiguous"),
    ("softmax_bwd", 0, None, "softmax_bwd: dy is not a tensor"),
])  # fmt: skip
def test_messages(op: str, position: int, wrong: Any, said: str) -> None:
    arguments = native_arguments()[op]
    arguments[position] = wrong
    with pytest.raises(RuntimeError, match=said):
        call(op, arguments)


@pytest.fixture
def select() -> Iterator[Callable[[str], bool]]:
    """Chooses the instruction set for one test."""
    loaded, before = library.load("cpu"), library.cpu_variant()
    loaded.llmfast_cpu_select.restype = ctypes.c_bool
    yield lambda name: loaded.llmfast_cpu_select(name.encode())
    assert loaded.llmfast_cpu_select(before.encode())


# Widths around every vector length and its multiples; the last ones are large enough for stores past the caches.
SHAPES = [(5, n) for n in (1, 3, 4, 5, 8, 15, 16, 17, 31, 33, 63, 65, 130, 2049)] + [(2200, 1024), (70, 33000)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["softmax", "layer_norm", "rms_norm", "gelu", "bias_gelu", "swiglu", "cross_entropy"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_instruction_set(variant: str, op: str, dtype: torch.dtype, select: Callable[[str], bool]) -> None:
    if not select(variant):
        pytest.skip(f"this CPU has no {variant}")
    assert library.cpu_variant() == variant
    for shape in SHAPES:
        case = CrossEntropyCase(*shape) if op == "cross_entropy" else RowCase(op, *shape)
        inputs = make_inputs(case, "cpu", dtype)
        comparisons = compare(case, inputs, torch.randn(case.output).to(dtype), "cpp")
        assert all(c.ok for c in comparisons), f"{case.label}: {'; '.join(map(str, comparisons))}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_activations_far_from_zero(variant: str, dtype: torch.dtype, select: Callable[[str], bool]) -> None:
    """They are x or 0, and their slopes 1 or 0, alone and before a linear layer: a large x magnifies no remainder."""
    if not select(variant):
        pytest.skip(f"this CPU has no {variant}")
    values = torch.tensor([-1e38, -1e12, -1e4, -100.0, 100.0, 1e4, 1e38], dtype=dtype).repeat(7)
    x, weight = values.clone().requires_grad_(), torch.eye(len(values), dtype=dtype)
    for y in (
        ops.gelu(x, backend="cpp"),
        ops.gelu(x, approximate="tanh", backend="cpp"),
        ops.bias_gelu(x, torch.zeros_like(values), backend="cpp"),
        ops.activation_linear(x[None], weight, activation="gelu", backend="cpp")[0],
        ops.activation_linear(x[None], weight, activation="gelu_tanh", backend="cpp")[0],
    ):
        torch.testing.assert_close(y, values.clamp(min=0), rtol=0, atol=0)
        (slope,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(slope, (values > 0).to(dtype), rtol=0, atol=1e-30)
    up = torch.ones_like(values).requires_grad_()
    slopes = torch.autograd.grad(ops.swiglu(x, up, backend="cpp").sum(), (x, up))
    torch.testing.assert_close(slopes, ((values > 0).to(dtype), values.clamp(min=0)), rtol=0, atol=1e-30)
    limits = ops.gelu(torch.tensor([float("-inf"), float("nan"), float("inf")], dtype=dtype), backend="cpp")
    assert limits.isnan().tolist() == [True, True, False] and limits[2] == float("inf")  # PyTorch has -inf times 0, too


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_on_every_instruction_set(variant: str, dtype: torch.dtype, select: Callable[[str], bool]) -> None:
    """And with no gradient wanted, when few queries take the path that decoding does."""
    if not select(variant):
        pytest.skip(f"this CPU has no {variant}")
    decoded = [AttentionCase(2, 3, 1300, 4, 2, 64, True), AttentionCase(1, 1, 513, 3, 3, 40, False)]
    for case in [*(case for case in TEST_CASES["attention"] if case.plain), *decoded]:
        inputs = make_inputs(case, "cpu", dtype)
        comparisons = compare(case, inputs, torch.randn(case.output).to(dtype), "cpp")
        assert all(c.ok for c in comparisons), f"{case.label}: {'; '.join(map(str, comparisons))}"
        with torch.no_grad():
            out = case.ours(*(t.detach() for t in inputs), backend="cpp")
            truth = case.ours(*(t.detach().double() for t in inputs), backend="reference")
            peer = case.torch(*(t.detach() for t in inputs))
        if out.numel():
            error, theirs = ((t.double() - truth).abs().max() for t in (out, peer))
            ulp = torch.finfo(dtype).eps * truth.abs().max()
            assert error <= 3 * theirs + ulp, f"{case.label}: {error} against {theirs}"


def test_an_unknown_instruction_set_is_refused(select: Callable[[str], bool]) -> None:
    assert not select("avx1024")


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    """Bit for bit, gradients of parameters included: the sums' order is that of the shape."""
    case = RowCase("layer_norm", 3000, 257)
    inputs, grad = make_inputs(case, "cpu", torch.float32), torch.randn(3000, 257)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = case.ours(*inputs, backend="cpp")
            results.append([out, *torch.autograd.grad(out, inputs, grad)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_threads_share_nothing() -> None:
    """Eight Python threads, each its own data: every result is the one that a single thread gets."""
    inputs = [torch.randn(64, 300 + i) for i in range(8)]
    expected = [ops.softmax(x, backend="cpp") for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(200):
            if not torch.equal(ops.softmax(inputs[i], backend="cpp"), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_can_call() -> None:
    """With one thread, as a DataLoader's worker sets it: torch's own pool does not survive a fork either."""
    x = torch.randn(2000, 300)
    expected = ops.softmax(x, backend="cpp")
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(ops.softmax(x, backend="cpp"), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("fails", [False, True])
def test_no_call_leaks(fails: bool) -> None:
    """Neither handles nor optional boxes nor outputs, also where a check throws."""
    arguments = native_arguments()
    if fails:
        arguments = {op: [*a[:-1], a[-1]] for op, a in arguments.items()}
        for a in arguments.values():
            a[0] = a[0].double()

    def once() -> None:
        for op, a in arguments.items():
            try:
                call(op, a)
                assert not fails
            except RuntimeError:
                assert fails

    for _ in range(200):
        once()
    gc.collect()
    before = resident_bytes()
    for _ in range(2000):
        once()
    gc.collect()
    assert resident_bytes() - before < 4 * 2**20


def test_optional_arguments_do_not_leak() -> None:
    """Their boxes are of 8 bytes, so it takes many calls: 100,000 leaked ones are 3 MB."""
    arguments = native_arguments()["layer_norm_fwd"]
    call("layer_norm_fwd", arguments)
    before = resident_bytes()
    for _ in range(50_000):
        call("layer_norm_fwd", arguments)
    assert resident_bytes() - before < 2**20


def test_mlp_beside_the_reference() -> None:
    """float32 biases beside a gate in bfloat16; what the C++ lacks; a layer of no width."""
    x, up, down = (torch.randn(shape).bfloat16() for shape in ((5, 8), (32, 8), (6, 16)))
    biases = torch.randn(32), torch.randn(6)
    ours, expected = (ops.mlp(x, up, biases[0], down, biases[1], backend=b) for b in ("cpp", "reference"))
    torch.testing.assert_close(ours, expected, rtol=0.02, atol=0.02)
    with pytest.raises(BackendError, match="silu with a gate only"):
        ops.mlp(x, up[:16], None, down, None, activation="silu", backend="cpp")
    with pytest.warns(BackendFallbackWarning, match="silu with a gate only"):
        ops.mlp(x, up[:16], None, down, None, activation="silu")
    assert torch.equal(ops.mlp(x, up[:0], None, down[:, :0], biases[1]), biases[1].bfloat16().expand(5, 6))
