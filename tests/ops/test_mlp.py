"""Hopper's own kernel of an MLP: its numbers, and that it is taken where it can be and pays. Without a GPU it runs in
Python."""

import importlib
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.testing.accuracy import compare
from llmfast.testing.cases import MLPCase, make_inputs
from llmfast.testing.gluon import interpreted

LAUNCHERS = ("mlp_hopper_fwd", "mlp_hopper_bwd")


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[str]]]:
    """The MLP by Hopper's kernel, whether it pays or not; -> a list of what was launched. In Python, it runs on so many
    multiprocessors, and memory that nobody has written holds NaN."""
    pytest.importorskip("triton")
    if torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is Hopper's")
    mlp, hopper = (importlib.import_module(f"llmfast.kernels.{name}") for name in ("mlp", "mlp_hopper"))
    launched: list[str] = []

    def install(processors: int) -> list[str]:
        def launcher(name: str) -> Callable[..., Any]:
            original = getattr(hopper, name)
            run = original if torch.cuda.is_available() else interpreted(original, processors)

            def launch(*args: Any) -> Any:
                launched.append(name)
                return run(*args)

            return launch

        module = SimpleNamespace(**{name: launcher(name) for name in LAUNCHERS})
        monkeypatch.setattr(mlp, "_on_hopper", lambda x, *_: (module, mlp.as_rows(x)))
        return launched

    if torch.cuda.is_available():
        yield install
        return
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 6)
    torch.use_deterministic_algorithms(True)
    yield install
    torch.use_deterministic_algorithms(False)


DTYPES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        MLPCase(300, 72, 520),
        MLPCase(1, 8, 8, "gelu"),
        MLPCase(129, 200, 256, "silu"),
        MLPCase(700, 136, 264, bias=False),
        MLPCase(513, 64, 1024, "gelu"),
    ],
    ids=lambda case: case.label.replace(" ", "-"),
)
def test_against_truth(case: MLPCase, dtype: torch.dtype, device: str, on_hopper: Callable[[int], list[str]]) -> None:
    launched = on_hopper(2)
    inputs = make_inputs(case, device, dtype)
    comparisons = compare(case, inputs, torch.randn(case.output, device=device).to(dtype), "triton")
    assert all(c.ok for c in comparisons), "; ".join(map(str, comparisons))
    assert launched == list(LAUNCHERS)


def test_strides_and_dimensions(device: str, on_hopper: Callable[[int], list[str]]) -> None:
    """x of three dimensions with gaps in its rows, biases with gaps: as contiguous ones, but for the order of sums of
    PyTorch's products."""
    launched = on_hopper(2)
    x, up, down, up_bias, down_bias = (t.detach() for t in make_inputs(MLPCase(300, 64, 264), device, torch.float16))
    apart = [torch.stack((t, t + 1), -1)[..., 0] for t in (x.view(3, 100, 64), up_bias, down_bias)]
    results = []
    for x_, up_bias_, down_bias_ in (apart, (x, up_bias, down_bias)):
        leaves = [t.detach().requires_grad_() for t in (x_, up, up_bias_, down, down_bias_)]
        out = ops.mlp(*leaves, activation="gelu_tanh", backend="triton")
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for strided, contiguous in zip(*results, strict=True):
        difference = (strided.reshape(contiguous.shape) - contiguous).double().norm()
        assert difference < 2e-3 * contiguous.double().norm()
    assert results[0][0].shape == (3, 100, 64) and launched == [*LAUNCHERS] * 2


def test_gates_are_not_its_own(device: str, on_hopper: Callable[[int], list[str]]) -> None:
    launched = on_hopper(2)
    case = MLPCase(300, 64, 264, "silu", gated=True)
    inputs = make_inputs(case, device, torch.float16)
    torch.autograd.grad(case.ours(*inputs, backend="triton").sum(), inputs)
    assert not launched


def test_slope_of_numbers_that_16_bits_hold() -> None:
    """tanh's GELU is x above, and 0 below, as far as bfloat16 goes."""
    pytest.importorskip("triton")
    function = interpreted(importlib.import_module("llmfast.kernels.activation").activation_and_slope)
    x = np.float32([1e3, 1e12, 1.7e33, 3e38])
    with np.errstate(over="ignore"):
        y, slope = function(x, "tanh", False)
        below, slope_below = function(-x, "tanh", False)
    assert (y == x).all() and (slope == 1).all() and not below.any() and not slope_below.any()


def test_what_is_not_finite_spoils_its_own_row_alone(device: str, on_hopper: Callable[[int], list[str]]) -> None:
    on_hopper(3)
    tensors = [t.detach() for t in make_inputs(MLPCase(300, 64, 512), device, torch.float16)]
    grad = torch.randn(300, 64, device=device).half()

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = ops.mlp(x, tensors[1], tensors[3], tensors[2], tensors[4], activation="gelu_tanh", backend="triton")
        return [out.detach(), *torch.autograd.grad(out, x, grad)]

    clean = run(tensors[0], grad)
    x, spoilt = tensors[0].clone(), grad.clone()
    x[130, 5], spoilt[7, 3] = float("nan"), float("inf")
    out, dx = run(x, spoilt)
    assert out[130].isnan().all() and dx[130].isnan().all() and not dx[7].isfinite().any()
    kept = torch.arange(300, device=device) != 130
    assert torch.equal(out[kept], clean[0][kept])
    kept[7] = False
    assert torch.equal(dx[kept], clean[1][kept])


def pays(rows: Tensor, weight: Tensor, n_cols: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    pytest.importorskip("triton")
    hopper: ModuleType = importlib.import_module("llmfast.kernels.mlp_hopper")
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 132)
    return hopper.mlp_hopper_pays(rows, weight, n_cols)


@pytest.mark.parametrize(
    ("n_rows", "n_cols", "expected"),
    [
        (65536, 3072, True),
        (16384, 4096, True),
        (16384, 6400, True),
        (11 * 128, 3072, True),
        (11 * 128 + 1, 3072, False),  # a second round for one row of tiles
        (1024, 3072, False),
        (65536, 256 * 133, False),
        (0, 3072, False),
        (65536, 3070, False),
    ],
)
def test_where_it_pays(n_rows: int, n_cols: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.empty(n_rows, 64, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(n_cols, 64, dtype=torch.bfloat16, device="meta")
    assert pays(rows, weight, n_cols, monkeypatch) is expected


@pytest.mark.parametrize(("capability", "expected"), [(80, False), (90, True), (100, False)])
def test_of_that_architecture_alone(capability: int, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    mlp, hopper = (importlib.import_module(f"llmfast.kernels.{name}") for name in ("mlp", "mlp_hopper"))
    monkeypatch.setattr(mlp, "architecture", lambda device: capability)
    monkeypatch.setattr(hopper, "multiprocessors", lambda device: 4)
    x, weight = torch.zeros(4, 128, 64).bfloat16(), torch.zeros(1024, 64).bfloat16()
    found, rows = mlp._on_hopper(x, weight, 1024)
    assert found is (hopper if expected else None) and rows.dim() == (2 if expected else 3)
    assert mlp._on_hopper(x, weight[:768], 768)[0] is None


def test_what_it_cannot_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, weight = torch.zeros(2**12 * 72, dtype=torch.bfloat16), torch.zeros(256 * 33, 64, dtype=torch.bfloat16)

    def readable(stride: tuple[int, int] = (64, 1), offset: int = 0) -> bool:
        strided = rows.as_strided((2**12, 64), stride, offset)
        found = pays(strided, weight, 256 * 33, monkeypatch)
        assert pays(weight[: 2**12], strided, 256 * 33, monkeypatch) is found
        return found

    assert readable() and readable((72, 1)) and readable(offset=8)
    assert not (readable((68, 1)) or readable(offset=4) or readable((0, 1)) or readable((1, 2**12)))
    assert not pays(rows.float().view(2**12, 72)[:, :64], weight.float(), 256 * 33, monkeypatch)
