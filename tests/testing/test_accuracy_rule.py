"""The accuracy rule itself: an error beyond PyTorch's own fails, in the output or any gradient, and so does NaN."""

import itertools
import sys
from types import ModuleType

import pytest
import torch
from torch import Tensor

from llmfast.ops import reference, registry
from llmfast.ops.registry import BACKENDS, Backend
from llmfast.testing.accuracy import Comparison, compare
from llmfast.testing.cases import AttentionCase, Case, RowCase, make_inputs

SOFTMAX = RowCase("softmax", 16, 100)
NAME = "planted"
PLANTED = itertools.count()


def plant(monkeypatch: pytest.MonkeyPatch, fwd: Tensor | float = 0.0, bwd: Tensor | float = 0.0) -> None:
    """A softmax backend that is exact but for `fwd` and `bwd` added to its float32 results."""

    def softmax_fwd(x: Tensor, mask: None, causal: bool) -> Tensor:
        return (reference.softmax(x.double()) + fwd).to(x.dtype)

    def softmax_bwd(dy: Tensor, y: Tensor) -> Tensor:
        dy, exact = dy.double(), y.double()
        return (exact * (dy - (dy * exact).sum(-1, keepdim=True)) + bwd).to(y.dtype)

    module = ModuleType(f"planted_softmax_{next(PLANTED)}")  # a new name: the registry keeps what it has imported
    module.softmax_fwd, module.softmax_bwd = softmax_fwd, softmax_bwd  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    row = Backend(NAME, module.__name__, frozenset({"cpu"}), frozenset({torch.float32, torch.float16}))
    monkeypatch.setitem(BACKENDS, "softmax", (row,))
    monkeypatch.setattr(registry, "NAMES", (*registry.NAMES, NAME))


def verdicts(dtype: torch.dtype = torch.float32) -> dict[str, bool]:
    inputs = make_inputs(SOFTMAX, "cpu", dtype)
    grad = torch.randn(16, 100, generator=torch.Generator().manual_seed(1)).to(dtype)
    return {c.name: c.ok for c in compare(SOFTMAX, inputs, grad, NAME)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_exact_passes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert verdicts(dtype) == {"softmax": True, "dx": True}


def at_one_place(value: float) -> Tensor:
    error = torch.zeros(16, 100, dtype=torch.float64)
    error[7, 42] = value
    return error


# The largest probability of these rows is about 0.15, and float32's eps times that is 1.8e-8.
@pytest.mark.parametrize("error", [2e-7, -2e-7, 1e-2, float("nan"), float("inf")])
def test_one_wrong_element_fails(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, bwd=at_one_place(error))
    assert verdicts() == {"softmax": True, "dx": False}
    plant(monkeypatch, fwd=at_one_place(error))
    assert verdicts()["softmax"] is False


def test_a_float32_error_hides_in_float16s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule calibrates itself: 2e-7 is nothing at float16, 1e-3 is not."""
    plant(monkeypatch, fwd=2e-7)
    assert verdicts(torch.float16)["softmax"] and not verdicts(torch.float32)["softmax"]
    plant(monkeypatch, fwd=1e-3)
    assert not verdicts(torch.float16)["softmax"]


def test_wrong_dtype_and_shape_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    module = sys.modules[BACKENDS["softmax"][0].module]
    monkeypatch.setattr(module, "softmax_fwd", lambda x, mask, causal: torch.softmax(x, -1).double())
    with pytest.raises(AssertionError, match="float64"):
        verdicts()


@pytest.mark.parametrize(
    ("error", "ok"), [(0.0, True), (1.0, True), (1.0001, False), (float("nan"), False), (float("inf"), False)]
)
def test_comparison(error: float, ok: bool) -> None:
    assert Comparison("x", error, 0.5, 1.0).ok is ok


@pytest.mark.parametrize(
    ("case", "names"),
    [
        (RowCase("layer_norm", 5, 30), ["layer_norm", "dx", "dweight", "dbias"]),
        (AttentionCase(2, 10, 12, 4, 2, 16, True), ["attention", "dq", "dk", "dv"]),
    ],
)
def test_every_output_and_gradient_is_compared(case: Case, names: list[str]) -> None:
    inputs = make_inputs(case, "cpu", torch.float16)
    grad = torch.randn(next(iter(case.inputs.values()))).half()
    comparisons = compare(case, inputs, grad, "reference")
    assert [c.name for c in comparisons] == names
    assert all(c.ok and 0 < c.error and c.torch_error > 0 for c in comparisons), comparisons
