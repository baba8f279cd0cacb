"""The reference, which every kernel is measured against: its formulas written out again, and its gradients."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops import reference


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def exactly(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_softmax() -> None:
    x = normal(3, 7) * 5
    exactly(reference.softmax(x), x.exp() / x.exp().sum(-1, keepdim=True))


def test_softmax_of_what_is_visible() -> None:
    """Each row over its own visible columns alone; zeros elsewhere, and in a row that sees nothing."""
    x, mask = normal(2, 4, 3), torch.rand(2, 1, 3, generator=torch.Generator().manual_seed(0)) > 0.4
    expected = torch.zeros_like(x)
    for b in range(2):
        for i in range(4):
            seen = [j for j in range(3) if mask[b, 0, j] and j <= i + 3 - 4]
            for j in seen:
                expected[b, i, j] = x[b, i, j].exp() / sum(x[b, i, k].exp() for k in seen)
    exactly(reference.softmax(x, mask, True), expected)
    assert torch.equal(reference.softmax(x, torch.zeros(3, dtype=torch.bool)), torch.zeros_like(x))


def test_layer_norm() -> None:
    x, w, b = normal(3, 7) * 2 + 1, normal(7), normal(7) + 1
    mean = x.sum(-1, keepdim=True) / 7
    variance = ((x - mean) ** 2).sum(-1, keepdim=True) / 7
    exactly(reference.layer_norm(x, w, b, 1e-2), (x - mean) / (variance + 1e-2).sqrt() * w + b)
    exactly(reference.layer_norm(x, None, None, 1e-2), (x - mean) / (variance + 1e-2).sqrt())


def test_rms_norm() -> None:
    x, w = normal(3, 7) * 2 + 1, normal(7)
    scaled = x / ((x**2).sum(-1, keepdim=True) / 7 + 1e-2).sqrt()
    exactly(reference.rms_norm(x, w, 1e-2), scaled * w)
    exactly(reference.rms_norm(x, None, 1e-2), scaled)
    exactly(reference.rms_norm(x, w, 1e-2, 1.0), scaled * (1 + w))


def test_norm_of_a_sum() -> None:
    x, residual, w, b = normal(3, 7), normal(3, 7) + 1, normal(7), normal(7)
    for got, norm in [
        (reference.add_layer_norm(x, residual, w, b, 1e-2), reference.layer_norm(x + residual, w, b, 1e-2)),
        (reference.add_rms_norm(x, residual, w, 1e-2, 1.0), reference.rms_norm(x + residual, w, 1e-2, 1.0)),
    ]:
        exactly(got[0], norm)
        exactly(got[1], x + residual)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("n_queries", "n_keys"), [(4, 4), (2, 5), (5, 2), (1, 3)])
def test_attention(n_queries: int, n_keys: int, causal: bool) -> None:
    """One query, one head, one key at a time; query i sees keys j <= i + Tk - Tq, none gives zeros."""
    batch, heads, kv_heads, d, scale = 2, 6, 2, 3, 0.7
    q = normal(batch, n_queries, heads, d)
    k, v = normal(batch, n_keys, kv_heads, d), normal(batch, n_keys, kv_heads, d) + 1
    expected = torch.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(n_queries):
                seen = [j for j in range(n_keys) if not causal or j <= i + n_keys - n_queries]
                weights = [math.exp(scale * float(q[b, i, h] @ k[b, j, h // 3])) for j in seen]
                for j, weight in zip(seen, weights, strict=True):
                    expected[b, i, h] += weight / sum(weights) * v[b, j, h // 3]
    exactly(reference.attention(q, k, v, causal, scale), expected)


def test_attention_default_scale() -> None:
    q, k, v = normal(1, 3, 1, 16), normal(1, 5, 1, 16), normal(1, 5, 1, 16) + 1
    exactly(ops.attention(q, k, v), reference.attention(q, k, v, False, 1 / 4))


def test_gelu() -> None:
    x = normal(50) * 3
    exactly(reference.gelu(x, "none"), x * (1 + torch.erf(x / math.sqrt(2))) / 2)
    exactly(reference.gelu(x, "tanh"), x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def test_swiglu() -> None:
    gate, up = normal(50) * 3, normal(50) + 1
    exactly(reference.swiglu(gate, up), gate / (1 + (-gate).exp()) * up)


def test_geglu() -> None:
    gate, up = normal(50) * 3, normal(50) + 1
    exactly(reference.geglu(gate, up, "none"), gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up)
    exactly(reference.geglu(gate, up, "tanh"), reference.gelu(gate, "tanh") * up)


def test_rope() -> None:
    """A rotation of the complex numbers x[i] + i x[i + D/2]."""
    x, angle = normal(2, 5, 3, 8), normal(5, 4)
    pairs = torch.complex(x[..., :4], x[..., 4:])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    exactly(reference.rope(x, angle.cos(), angle.sin()), torch.cat((turned.real, turned.imag), -1))
    neighbours = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angle), angle)[:, None]
    exactly(reference.rope(x, angle.cos(), angle.sin(), True), torch.view_as_real(neighbours).flatten(-2))


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_cross_entropy(ignore_index: int) -> None:
    logits, targets = normal(5, 7), torch.tensor([0, 6, ignore_index, 4, ignore_index])
    kept = [i for i in range(5) if targets[i] != ignore_index]
    losses = [logits[i].exp().sum().log() - logits[i, targets[i]] for i in kept]
    exactly(reference.cross_entropy(logits, targets, ignore_index), torch.stack(losses).mean())


def test_cross_entropy_options() -> None:
    """Label smoothing, z-loss and a padded vocabulary, written out row by row; and the three reductions."""
    logits, targets, smoothing, z = normal(5, 9), torch.tensor([0, 6, -100, 4, 2]), 0.3, 0.7
    losses = torch.zeros(5, dtype=torch.float64)
    for i in (0, 1, 3, 4):
        row = logits[i, :7]
        lse = row.exp().sum().log()
        losses[i] = lse - (1 - smoothing) * row[targets[i]] - smoothing * row.mean() + z * lse**2
    got = [reference.cross_entropy(logits, targets, -100, smoothing, z, how, 7) for how in ("none", "sum", "mean")]
    for g, expected in zip(got, (losses, losses.sum(), losses.sum() / 4), strict=True):
        exactly(g, expected)


def test_cross_entropy_of_no_target_is_zero() -> None:
    logits = normal(2, 3).requires_grad_()
    loss = reference.cross_entropy(logits, torch.tensor([-100, -100]), -100)
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


TARGETS = torch.tensor([1, -100, 0])
MASK = torch.tensor([True, False, True])


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        pytest.param(reference.softmax, [(2, 5)], id="softmax"),
        pytest.param(lambda x: reference.softmax(x, MASK, True), [(2, 4, 3)], id="softmax-masked"),
        pytest.param(lambda x, w, b: reference.layer_norm(x, w, b, 1e-5), [(2, 5), (5,), (5,)], id="layer_norm"),
        pytest.param(lambda x: reference.layer_norm(x, None, None, 1e-5), [(2, 5)], id="layer_norm-plain"),
        pytest.param(lambda x, w: reference.rms_norm(x, w, 1e-6), [(2, 5), (5,)], id="rms_norm"),
        pytest.param(
            lambda q, k, v: reference.attention(q, k, v, True, 0.5),
            [(1, 3, 4, 2), (1, 4, 2, 2), (1, 4, 2, 2)],
            id="attention-causal-grouped",
        ),
        pytest.param(
            lambda q, k, v: reference.attention(q, k, v, True, 0.5),
            [(1, 4, 1, 2), (1, 2, 1, 2), (1, 2, 1, 2)],
            id="attention-queries-that-see-nothing",
        ),
        pytest.param(lambda q, k, v: reference.attention(q, k, v, False, 0.5), [(1, 3, 2, 2)] * 3, id="attention-full"),
        pytest.param(lambda x: reference.gelu(x, "none"), [(7,)], id="gelu"),
        pytest.param(lambda x: reference.gelu(x, "tanh"), [(7,)], id="gelu-tanh"),
        pytest.param(lambda *t: reference.add_layer_norm(*t, 1e-5), [(2, 5), (2, 5), (5,), (5,)], id="add_layer_norm"),
        pytest.param(lambda *t: reference.add_rms_norm(*t, 1e-6, 1.0), [(2, 5), (2, 5), (5,)], id="add_rms_norm"),
        pytest.param(reference.swiglu, [(7,), (7,)], id="swiglu"),
        pytest.param(lambda *t: reference.geglu(*t, "none"), [(7,), (7,)], id="geglu"),
        pytest.param(lambda *t: reference.rope(*t, True), [(1, 3, 2, 4), (3, 2), (3, 2)], id="rope-interleaved"),
        pytest.param(
            lambda x: reference.cross_entropy(x, TARGETS, -100, 0.2, 0.1, "none", 3),
            [(3, 4)],
            id="cross_entropy-options",
        ),
        pytest.param(reference.rope, [(1, 3, 2, 4), (3, 2), (3, 2)], id="rope"),
        pytest.param(lambda x: reference.cross_entropy(x, TARGETS, -100), [(3, 4)], id="cross_entropy"),
    ],
)
def test_gradients(function: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> None:
    """Against finite differences in float64."""
    assert torch.autograd.gradcheck(function, [normal(*shape).requires_grad_() for shape in shapes])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_accumulates_in_float32(dtype: torch.dtype) -> None:
    """A 16-bit result is the float32 one rounded once: summing 4096 terms in 16 bits would show."""
    x, gate = (normal(2, 4096).to(dtype) for _ in range(2))
    w = normal(4096).to(dtype)
    for function, arguments in [
        (reference.softmax, (x,)),
        (lambda *a: reference.layer_norm(*a, 1e-5), (x, w, w)),
        (lambda *a: reference.rms_norm(*a, 1e-6), (x, w)),
        (reference.swiglu, (x, gate)),
        (lambda a: reference.gelu(a, "tanh"), (x,)),
    ]:
        assert torch.equal(function(*arguments), function(*(a.float() for a in arguments)).to(dtype))
