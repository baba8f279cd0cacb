"""`fp8_mlp` beside the layers and the activation that it is made of, and where numbers are extreme or not finite."""

import pytest
import torch
from torch import Tensor

from llmfast import ops

BACKENDS = ["triton", "reference"]


def wide(device: str) -> torch.dtype:
    """16 bits: of the two, the type that Triton's CPU interpreter computes rightly."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def leaves(gated: bool, device: str, size: float = 1.0) -> list[Tensor]:
    """x, up, its bias, down, its bias."""
    width = 160 if gated else 80
    shapes = [((130, 48), 1.0), ((width, 48), 0.2 * size), ((width,), 0.1), ((64, 80), 0.1), ((64,), 0.1)]
    generator = torch.Generator(device).manual_seed(0)
    return [
        (scale * torch.randn(shape, device=device, generator=generator)).to(wide(device)).requires_grad_()
        for shape, scale in shapes
    ]


def composed(activation: str, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    h = ops.fp8_linear(x, up, up_bias, backend="triton")
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    if up.shape[0] == down.shape[1]:
        y = ops.bias_gelu(h, approximate=approximate, backend="triton")
    else:
        first, second = h.chunk(2, dim=-1)
        gated = ops.swiglu if activation == "silu" else ops.geglu
        options = {} if activation == "silu" else {"approximate": approximate}
        y = gated(first, second, **options, backend="triton")
    return ops.fp8_linear(y, down, down_bias, backend="triton")


@pytest.mark.parametrize("size", [1.0, 4.0])
@pytest.mark.parametrize(
    ("activation", "gated"), [("gelu", False), ("gelu_tanh", False), ("silu", True), ("gelu_tanh", True)]
)
def test_is_its_parts_one_after_another(activation: str, gated: bool, size: float, device: str) -> None:
    """But for one rounding in place of two of what the activation and its gradient give: of some of their elements in a
    hundred the last bit."""
    pytest.importorskip("triton")
    tensors = leaves(gated, device, size)
    grad = torch.randn(130, 64, device=device).to(wide(device))
    results = []
    for function in (
        lambda *t: ops.fp8_mlp(*t, activation=activation, backend="triton"),
        lambda *t: composed(activation, *t),
    ):
        out = function(*tensors)
        results.append([out.detach(), *torch.autograd.grad(out, tensors, grad)])
    for name, ours, parts in zip(("out", "x", "up", "up_bias", "down", "down_bias"), *results, strict=True):
        assert ours.dtype is parts.dtype and ours.shape == parts.shape
        error = ((ours - parts).double().norm() / parts.double().norm()).item()
        assert error < (1e-6 if name in ("down", "down_bias") else 0.04), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bits", [16, 32])
def test_what_is_not_finite_stays_so(backend: str, gated: bool, bits: int, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    dtype = wide(device) if bits == 16 else torch.float32
    tensors = [t.detach().to(dtype) for t in leaves(gated, device)]
    tensors[0][7, 3] = float("nan")
    x = tensors[0].requires_grad_()
    out = ops.fp8_mlp(x, *tensors[1:], backend=backend)
    assert out[7].isnan().all() and out[[0, 6, 8, 129]].isfinite().all()
    grad = torch.randn_like(out)
    (dx,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    assert dx[7].isnan().all() and dx[[0, 6, 8, 129]].isfinite().all()
    grad[5, 5] = float("inf")
    (dx,) = torch.autograd.grad(out, x, grad)
    assert not dx[5].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_what_is_asked_for(backend: str, device: str) -> None:
    """A gradient is the same, whichever others are asked for."""
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = leaves(True, device)
    grad = torch.randn(130, 64, device=device).to(wide(device))
    whole = torch.autograd.grad(ops.fp8_mlp(*tensors, backend=backend), tensors, grad)
    for i, expected in enumerate(whole):
        alone = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]
        (found,) = torch.autograd.grad(ops.fp8_mlp(*alone, backend=backend), alone[i], grad)
        assert torch.equal(found, expected)


def gradients(tensors: list[Tensor], activation: str, grad: Tensor, backend: str) -> tuple[Tensor, ...]:
    out = ops.fp8_mlp(*tensors, activation=activation, backend=backend)
    return torch.autograd.grad(out, [t for t in tensors if t.requires_grad], grad)


def test_gradients_as_large_as_their_bound(device: str) -> None:
    """Each product of the gradient and `down` is the largest that their scales bear, and the activation is steepest:
    one power of two less and e5m2 would not hold them."""
    pytest.importorskip("triton")
    x, up = (torch.full((16, 16), value, dtype=wide(device), device=device) for value in (1.0, 1.4142 / 16))
    down, grad = torch.full((64, 16), 0.875, device=device).to(x), torch.full((16, 64), 0.875, device=device).to(x)
    tensors = [x.requires_grad_(), up.requires_grad_(), None, down, None]
    ours = torch.autograd.grad(ops.fp8_mlp(*tensors, backend="triton"), (x, up), grad)
    for found, leaf in zip(ours, (up, x), strict=True):
        # h is 16 times what e4m3 holds of up, 1.4; the slope there 1.129 and 0.875 of 64 such products are 55.3.
        expected = 49 * 1.129 * 16 * leaf.detach().double()[0, 0]
        torch.testing.assert_close(found.double(), expected.expand(16, 16), rtol=0.13, atol=0.0)


@pytest.mark.parametrize("exponents", [(9, -9), (-9, 9), (14, 14), (-14, -14)])
def test_halves_of_unequal_size(exponents: tuple[int, int], device: str) -> None:
    """Of a large half the other's gradient is large; neither may leave e5m2 nor vanish in it."""
    pytest.importorskip("triton")
    tensors = [t.detach() for t in leaves(True, device)]
    for i, exponent in enumerate(exponents):
        tensors[1][80 * i : 80 * (i + 1)] *= 2.0**exponent
        tensors[2][80 * i : 80 * (i + 1)] *= 2.0**exponent
    tensors = [(t.float() / 64 if i in (0, 2) else t.float()).requires_grad_() for i, t in enumerate(tensors)]
    grad = torch.randn(130, 64, device=device) / 64
    ours, expected = (gradients(tensors, "silu", grad, backend) for backend in BACKENDS)
    for found, reference in zip(ours, expected, strict=True):
        assert ((found - reference).norm() / reference.norm()).item() < 0.1


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_nothing_above_zero(activation: str, device: str) -> None:
    """What goes down is then at most 0.17, of the least of h alone."""
    pytest.importorskip("triton")
    x, up_bias = torch.zeros(8, 16, device=device), torch.full((32,), -1.0, device=device)
    tensors = x, torch.zeros(32, 16, device=device), up_bias, torch.eye(32, device=device), None
    out = ops.fp8_mlp(*tensors, activation=activation, backend="triton")
    torch.testing.assert_close(out, torch.full_like(out, -0.1587), rtol=0.07, atol=0.0)


@pytest.mark.parametrize("gated", [False, True])
def test_the_largest_may_be_in_any_row(gated: bool, device: str) -> None:
    """Also where a program that looks for it walks several tiles."""
    pytest.importorskip("triton")
    n_rows = 20_000 if device == "cuda" else 600
    x = torch.zeros(n_rows, 16, device=device)
    x[-1], x[n_rows // 2 + 5] = 16.0, 64.0
    up, down = torch.eye(16, device=device), torch.eye(16, device=device)
    up = torch.cat([up, up]) if gated else up
    out = ops.fp8_mlp(x, up, None, down, None, activation="silu" if gated else "gelu", backend="triton")
    torch.testing.assert_close(out, x * x if gated else x)


def test_gradients_far_from_one(device: str) -> None:
    """Scales, and one whose inverse float32 would not hold, which is cut off."""
    pytest.importorskip("triton")
    tensors = [t.detach().float().requires_grad_() for t in leaves(False, device)]
    grad = torch.randn(130, 64, device=device)
    ordinary = gradients(tensors, "gelu", grad, "triton")
    for exponent in (-100, 90):
        scaled = gradients(tensors, "gelu", grad * 2.0**exponent, "triton")
        for found, expected in zip(scaled, ordinary, strict=True):
            torch.testing.assert_close(found * 2.0**-exponent, expected)
    nothing = gradients(tensors, "gelu", torch.zeros_like(grad), "triton")
    assert not any(g.any() for g in nothing)
    with torch.no_grad():
        tensors[3].mul_(2.0**-70)
    small = gradients(tensors, "gelu", grad * 2.0**-60, "triton")
    assert all(g.isfinite().all() for g in small)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gated", [False, True])
def test_what_leaves_its_format_is_no_finite_number(backend: str, gated: bool, device: str) -> None:
    """h, or the gradient of what goes down, larger than 16 bits hold: nothing that is made of them looks sound."""
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = leaves(gated, device)
    far = torch.finfo(wide(device)).max / 4
    with torch.no_grad():
        tensors[3].fill_(1.0)
    grad = torch.full((130, 64), far, device=device).to(wide(device))
    dx, dup, dup_bias, _, _ = gradients(tensors, "silu" if gated else "gelu", grad, backend)
    assert not (dx.isfinite().any() or dup.isfinite().any() or dup_bias.isfinite().any())
    with torch.no_grad():
        tensors[0][3], tensors[1][7] = 16.0, far / 64
    ddown = gradients(tensors, "silu" if gated else "gelu", torch.ones_like(grad), backend)[3]
    assert not ddown[:, 7].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_may_be_strided(backend: str, device: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    tensors = [t.detach() for t in leaves(False, device)]
    apart = [torch.stack([t, t + 1], 1)[:, 0] if t.dim() == 1 else t for t in tensors]
    assert torch.equal(ops.fp8_mlp(*apart, backend=backend), ops.fp8_mlp(*tensors, backend=backend))
    tensors[2] = tensors[2][:1].expand(80).contiguous()
    apart = [*tensors[:2], tensors[2][:1].expand(80), *tensors[3:]]
    assert torch.equal(ops.fp8_mlp(*apart, backend=backend), ops.fp8_mlp(*tensors, backend=backend))
