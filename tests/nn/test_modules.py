"""Each module against torch.nn's of the same name: results, gradients, parameters, and what it refuses."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import nn as fast
from llmfast import ops
from llmfast.errors import InputError

TARGETS = torch.tensor([0, 5, -100, 2])

# (name, constructor's arguments, inputs' shapes)
CASES: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("LayerNorm", {"normalized_shape": 6}, (4, 6)),
    ("LayerNorm", {"normalized_shape": (3, 6), "eps": 1e-2}, (2, 4, 3, 6)),
    ("LayerNorm", {"normalized_shape": 6, "bias": False}, (4, 6)),
    ("LayerNorm", {"normalized_shape": [6], "elementwise_affine": False}, (4, 6)),
    ("RMSNorm", {"normalized_shape": 6}, (4, 6)),
    ("RMSNorm", {"normalized_shape": (3, 6), "eps": 1e-2}, (2, 3, 6)),
    ("RMSNorm", {"normalized_shape": 6, "elementwise_affine": False}, (4, 6)),
    ("GELU", {}, (4, 6)),
    ("GELU", {"approximate": "tanh"}, (4, 6)),
    ("Linear", {"in_features": 6, "out_features": 6}, (2, 4, 6)),
    ("Linear", {"in_features": 6, "out_features": 6, "bias": False}, (4, 6)),
    ("Softmax", {"dim": -1}, (4, 6)),
    ("Softmax", {"dim": 0}, (4, 6)),
    ("Softmax", {"dim": 1}, (2, 3, 4)),
]


@pytest.mark.parametrize(("name", "arguments", "shape"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES])
def test_equals_torch(name: str, arguments: dict[str, Any], shape: tuple[int, ...], device: str) -> None:
    ours, theirs = (getattr(m, name)(**arguments).to(device) for m in (fast, torch.nn))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    assert ours.load_state_dict(theirs.state_dict()) and repr(ours) == repr(theirs)
    x = torch.randn(shape, device=device, requires_grad=True)
    grad = torch.randn(shape, device=device)
    results = []
    for module in (ours, theirs):
        y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], grad)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bias", [True, False])
def test_autocast_casts_a_linear_as_pytorch_does(rows: int, bias: bool, device: str) -> None:
    """By a kernel for one row, and in a backward pass outside."""
    pytest.importorskip("triton")
    ours, theirs = (m.Linear(6, 5, bias=bias).to(device) for m in (fast, torch.nn))
    ours.load_state_dict(theirs.state_dict())
    x, grad = torch.randn(rows, 6, device=device, requires_grad=True), torch.randn(rows, 5, device=device).half()
    results = []
    for module in (ours, theirs):
        with ops.use_backend("triton"), torch.autocast(device, torch.float16):
            y = module(x)
        results.append([y, *torch.autograd.grad(y, [x, *module.parameters()], grad)])
    torch.testing.assert_close(*results, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}, {"padding_idx": -1}], ids=str)
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_embedding_equals_torch(options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
    ours, theirs = (m.Embedding(9, 6, **options).to(device) for m in (fast, torch.nn))
    assert ours.load_state_dict(theirs.state_dict()) and repr(ours) == repr(theirs)
    ids = torch.tensor([[2, 8, 2], [0, 3, 8]], dtype=dtype, device=device)
    grad = torch.randn(2, 3, 6, device=device)
    results = [[y := m(ids), *torch.autograd.grad(y, m.weight, grad)] for m in (ours, theirs)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}], ids=str)
def test_embeddings_that_only_torch_has_are_refused(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(InputError, match=f"Embedding: {name} is "):
        fast.Embedding(9, 6, **option)(torch.tensor([3]))


@pytest.mark.parametrize(
    ("shape", "target"),
    [
        ((4, 6), TARGETS),
        ((6,), torch.tensor(3)),
        ((2, 6, 2), TARGETS.view(2, 2)),
        ((1, 6, 2, 2), TARGETS.view(1, 2, 2)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"label_smoothing": 0.1}])
def test_cross_entropy_equals_torch(
    shape: tuple[int, ...], target: Tensor, options: dict[str, Any], device: str
) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    results = []
    for module in (fast.CrossEntropyLoss(**options), torch.nn.CrossEntropyLoss(**options)):
        loss = module(x, target.to(device))
        results.append([loss, *torch.autograd.grad(loss.sum(), x)])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("options", [{}, {"ignore_index": 2}, {"label_smoothing": 0.1}], ids=str)
def test_cross_entropy_of_uint8_targets_equals_torch(options: dict[str, Any], device: str) -> None:
    x, target = torch.randn(4, 6, device=device), torch.tensor([0, 5, 2, 2], dtype=torch.uint8, device=device)
    losses = [m.CrossEntropyLoss(**options)(x[:n], target[:n]) for m in (fast, torch.nn) for n in (4, 1)]
    torch.testing.assert_close(losses[:2], losses[2:])
    one = [m.CrossEntropyLoss(**options)(x[0], target[0]) for m in (fast, torch.nn)]
    torch.testing.assert_close(*one)


@pytest.mark.parametrize(("shape", "dims"), [((2, 3), range(-4, 6)), ((), range(-3, 3))], ids=["matrix", "number"])
def test_softmax_takes_the_dimensions_that_torch_takes(shape: tuple[int, ...], dims: range, device: str) -> None:
    x = torch.randn(shape, device=device, requires_grad=True)
    for dim in dims:
        said = []
        for module in (fast.Softmax(dim), torch.nn.Softmax(dim)):
            try:
                y = module(x)
                said.append([y, *torch.autograd.grad(y.sum(), x)])
            except IndexError as error:
                said.append(str(error))
        if isinstance(said[1], str):
            assert said[0] == said[1]
        else:
            torch.testing.assert_close(*said)


def test_float32_parameters_beside_a_16_bit_input(device: str) -> None:
    x = torch.randn(4, 6, device=device).bfloat16()
    for module in (fast.LayerNorm(6), fast.RMSNorm(6)):
        assert module.to(device)(x).dtype is torch.bfloat16


WRONG: list[tuple[Callable[[], object], str]] = [
    (lambda: fast.LayerNorm(6)(torch.ones(2, 5)), r"LayerNorm: x .*\(6,\)"),
    (lambda: fast.RMSNorm((2, 6))(torch.ones(6)), r"RMSNorm: x .*\(2, 6\)"),
    (lambda: fast.Softmax()(torch.ones(2)), "Softmax: dim is None"),
    (lambda: fast.CrossEntropyLoss(torch.ones(6)), "CrossEntropyLoss: weight "),
    (lambda: fast.CrossEntropyLoss()(torch.ones(4, 6), torch.ones(4, 6)), "CrossEntropyLoss: target .*float32"),
    (lambda: fast.CrossEntropyLoss()(torch.ones(4, 6), TARGETS[:3]), r"CrossEntropyLoss: input .*\(3,\)"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_refuses(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
