"""Hopper's attention kernels run in Python: their numbers, and that no schedule of their threads comes to a halt."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from llmfast import ops
from llmfast.testing.accuracy import compare
from llmfast.testing.cases import AttentionCase, Case, VarlenAttentionCase, make_inputs
from llmfast.testing.gluon import Deadlock, interpreted

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels themselves")

LAUNCHERS = ("attention_hopper_fwd", "attention_hopper_bwd")
# Sequences without queries, without keys, without either; cut in a tile's middle, at its end, and after one row.
LENGTHS = ((200, 200), (0, 7), (130, 0), (0, 0), (150, 257), (128, 128), (1, 300), (129, 5))


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """Of `processors` multiprocessors: attention on the CPU by these kernels, and a list of what was launched. Memory
    that nobody has written holds NaN."""
    pytest.importorskip("triton")
    portable = importlib.import_module("llmfast.kernels.attention")
    limits = importlib.import_module("llmfast.kernels.hopper").hopper_limits
    monkeypatch.setattr(portable, "_on_hopper", lambda *args: limits(*args) is None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    modules = [importlib.import_module(f"llmfast.kernels.attention_hopper{suffix}") for suffix in ("", "_bwd")]
    launchers = [(m, name, getattr(m, name)) for m, name in zip(modules, LAUNCHERS, strict=True)]

    def install(processors: int) -> list[str]:
        launched: list[str] = []
        for module, name, original in launchers:
            launcher = interpreted(original, processors)

            def launch(*args: Any, name: str = name, launcher: Callable[..., Any] = launcher) -> Any:
                launched.append(name)
                return launcher(*args)

            monkeypatch.setattr(module, name, launch)
        return launched

    torch.use_deterministic_algorithms(True)
    yield install
    torch.use_deterministic_algorithms(False)


# With the number of multiprocessors: on one, a thread block that waited for a later one would wait forever.
CASES: list[tuple[int, Case]] = [
    (3, AttentionCase(2, 300, 300, 2, 1, 64, True)),
    (3, AttentionCase(1, 130, 200, 2, 2, 128, False)),
    (1, AttentionCase(1, 300, 300, 2, 1, 64, True, window=64)),
    (3, AttentionCase(1, 300, 300, 2, 2, 128, True, window=1)),
    (3, AttentionCase(2, 130, 300, 2, 1, 128, True, window=100)),
    (1, AttentionCase(1, 5, 300, 2, 1, 64, True, window=3)),
    (1, AttentionCase(1, 300, 130, 2, 1, 40, True, window=129)),
    (2, AttentionCase(1, 1100, 1200, 1, 1, 64, True, window=150)),
    (1, AttentionCase(1, 70, 200, 2, 1, 64, False, softcap=2.0)),
    (2, AttentionCase(1, 200, 300, 1, 1, 128, True, window=70, softcap=20.0)),
    (3, VarlenAttentionCase(LENGTHS, 2, 1, 64, False)),
    (1, VarlenAttentionCase(LENGTHS, 2, 1, 64, True)),
    (3, VarlenAttentionCase(LENGTHS, 1, 1, 128, True, window=100)),
    (2, VarlenAttentionCase(LENGTHS, 1, 1, 40, True, window=128, softcap=5.0)),
    (3, VarlenAttentionCase(((1100, 1100), (1050, 900)), 1, 1, 64, True, window=200)),
    (2, AttentionCase(1, 300, 300, 2, 1, 256, True)),
    (1, AttentionCase(1, 130, 200, 4, 2, 192, False)),
    (2, AttentionCase(1, 300, 130, 1, 1, 256, True, window=65)),
    (1, AttentionCase(1, 200, 300, 2, 1, 160, True, window=70, softcap=20.0)),
    (3, AttentionCase(1, 5, 3, 2, 2, 256, False, softcap=2.0)),
    (3, VarlenAttentionCase(LENGTHS, 1, 1, 256, False)),
    (1, VarlenAttentionCase(LENGTHS, 1, 1, 192, True)),
    (2, VarlenAttentionCase(LENGTHS, 1, 1, 136, True, window=100, softcap=5.0)),
]


@pytest.mark.parametrize(("processors", "case"), [pytest.param(*c, id=c[1].label.replace(" ", "-")) for c in CASES])
def test_against_truth(case: Case, processors: int, on_hopper: Callable[[int], list[str]]) -> None:
    launched = on_hopper(processors)
    inputs = make_inputs(case, "cpu", torch.float16)
    comparisons = compare(case, inputs, torch.randn(case.output).half(), "triton")
    assert all(c.ok for c in comparisons), "; ".join(map(str, comparisons))
    assert launched == list(LAUNCHERS if case.inputs["q"][-1] <= 128 else LAUNCHERS[:1])


@pytest.mark.parametrize("options", [{}, {"window": 40}, {"softcap": 3.0}], ids=str)
def test_any_scale(options: dict[str, Any], on_hopper: Callable[[int], list[str]]) -> None:
    on_hopper(2)
    for scale in (-0.2, 0.0):
        tensors = make_inputs(AttentionCase(1, 130, 200, 2, 1, 64, True), "cpu", torch.float16)
        doubles = [t.detach().double().requires_grad_() for t in tensors]
        got = ops.attention(*tensors, causal=True, scale=scale, backend="triton", **options)
        exact = ops.attention(*doubles, causal=True, scale=scale, backend="reference", **options)
        grad = torch.randn(got.shape).half()
        got_all = (got, *torch.autograd.grad(got, tensors, grad))
        for a, b in zip(got_all, (exact, *torch.autograd.grad(exact, doubles, grad.double())), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("head_dim", "causal"), [(64, False), (64, True), (256, True)])
def test_other_sequences_do_not_matter(head_dim: int, causal: bool, on_hopper: Callable[[int], list[str]]) -> None:
    """NaN in one packed sequence spoils neither the one before nor the one after, of which it shares tiles."""
    on_hopper(3)
    case = VarlenAttentionCase(((70, 70), (90, 90), (70, 70)), 2, 1, head_dim, causal)
    tensors = make_inputs(case, "cpu", torch.float16)
    grad = torch.randn(case.output).half()

    def run(tensors: list[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
        out = case.ours(*tensors, backend="triton")
        return [out.detach(), *torch.autograd.grad(out, tensors, grad)]

    clean = run(tensors, grad)
    spoilt = [t.detach().clone() for t in (*tensors, grad)]
    for t in spoilt:
        t[70:160] = float("nan")
    for a, b in zip(clean, run([t.requires_grad_() for t in spoilt[:3]], spoilt[3]), strict=True):
        assert torch.equal(a[:70], b[:70]) and torch.equal(a[160:], b[160:]) and b[70:160].isnan().any()


def test_a_kernel_that_waits_forever_is_noticed(
    on_hopper: Callable[[int], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Turns counted from the first key tile, which in the grid comes last."""
    backward = importlib.import_module("llmfast.kernels.attention_hopper_bwd")
    monkeypatch.setattr(backward, "turn", lambda tile, key_tile, *_: key_tile)
    on_hopper(1)
    case = AttentionCase(1, 300, 300, 1, 1, 64, True)
    inputs = make_inputs(case, "cpu", torch.float16)
    with pytest.raises(Deadlock):
        torch.autograd.grad(case.ours(*inputs, backend="triton").sum(), inputs)
