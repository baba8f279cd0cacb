"""The decoder: its size, its numerics against an independent one, causality, the cache, and its gradients."""

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from llmfast import ops
from llmfast.errors import InputError
from llmfast.models import GPT, Config, DeviceKVCache, KVCache, RopeScaling, preset

VOCAB, CONTEXT = 61, 12


def config(**changes: Any) -> Config:
    """GPT-2 in small, unless changed."""
    sizes = {"n_layer": 2, "n_head": 4, "n_kv_head": 4, "head_dim": 8, "d_model": 32, "d_mlp": 48}
    return Config(vocab_size=VOCAB, context_length=CONTEXT, **(sizes | changes))


GPT2 = config(norm_eps=1e-3)  # no default anywhere, so that it must be handed on
LLAMA = config(
    norm="rms_norm",
    norm_eps=1e-2,
    position="rope",
    mlp="swiglu",
    bias=False,
    tie_embeddings=False,
    n_kv_head=2,
    head_dim=6,
)
GEMMA = config(
    norm="rms_norm",
    norm_offset=1.0,
    post_norms=True,
    qk_norm=True,
    position="rope",
    rope_scaling=RopeScaling("yarn", 4.0, original_context=8),
    mlp="geglu_tanh",
    bias=False,
    qkv_bias=True,
    n_kv_head=1,
    window=5,
    local_layers=(0,),
    local_rope_theta=100.0,
    attention_scale=0.3,
    attention_softcap=4.0,
    logit_softcap=3.0,
    embedding_scale=5.5,
)
each_family = pytest.mark.parametrize("shape", [GPT2, LLAMA, GEMMA], ids=["gpt2", "llama", "gemma"])


def model(shape: Config, dtype: torch.dtype = torch.float64, noise: float = 0.3) -> GPT:
    """A model in evaluation whose biases and norms are not their trivial initial values."""
    torch.manual_seed(0)
    gpt = GPT(shape, dtype).eval()
    with torch.no_grad():
        for p in gpt.parameters():
            p.add_(noise * torch.randn_like(p))
    return gpt


def ids(batch: int = 2, length: int = CONTEXT, seed: int = 1) -> Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("mlp", ["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"])
@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_n_params_is_what_the_model_holds(norm: str, position: str, mlp: str) -> None:
    for n_kv_head, head_dim, bias, tied in itertools.product((4, 2, 1), (8, 6), (True, False), (True, False)):
        shape = config(
            norm=norm,
            position=position,
            mlp=mlp,
            n_kv_head=n_kv_head,
            head_dim=head_dim,
            bias=bias,
            tie_embeddings=tied,
        )
        gpt = GPT(shape)
        assert shape.n_params == sum(p.numel() for p in gpt.parameters()), shape
        assert gpt(ids(1, 3)).shape == (1, 3, VOCAB)


@pytest.mark.parametrize("changes", [{"qkv_bias": False, "mlp_bias": True}, {"qk_norm": True}, {"post_norms": True}])
@pytest.mark.parametrize("bias", [True, False])
def test_n_params_of_the_parts_that_some_families_have(changes: dict[str, Any], bias: bool) -> None:
    shape = config(norm="rms_norm", mlp="swiglu", bias=bias, n_kv_head=2, head_dim=6, **changes)
    assert shape.n_params == sum(p.numel() for p in GPT(shape).parameters())


def gpt2_logits(w: dict[str, Tensor], x: Tensor, shape: Config) -> Tensor:
    """GPT-2 from PyTorch's own functions, after https://github.com/openai/gpt-2/blob/master/src/model.py."""
    d, heads = shape.d_model, shape.n_head
    h = w["token_embedding.weight"][x] + w["position_embedding.weight"][: x.shape[1]]
    for i in range(shape.n_layer):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        n = F.layer_norm(h, (d,), b["attention_norm.weight"], b["attention_norm.bias"], shape.norm_eps)
        qkv = F.linear(n, b["attention.qkv.weight"], b["attention.qkv.bias"])
        q, k, v = (t.view(*x.shape, heads, d // heads).transpose(1, 2) for t in qkv.split(d, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(*x.shape, d)
        h = h + F.linear(mixed, b["attention.proj.weight"], b["attention.proj.bias"])
        n = F.layer_norm(h, (d,), b["mlp_norm.weight"], b["mlp_norm.bias"], shape.norm_eps)
        up = F.gelu(F.linear(n, b["mlp.up.weight"], b["mlp.up.bias"]), approximate="tanh")
        h = h + F.linear(up, b["mlp.down.weight"], b["mlp.down.bias"])
    return F.layer_norm(h, (d,), w["norm.weight"], w["norm.bias"], shape.norm_eps) @ w["token_embedding.weight"].T


def llama_logits(w: dict[str, Tensor], x: Tensor, shape: Config) -> Tensor:
    """Llama from PyTorch's own functions, rotations as complex products (https://arxiv.org/abs/2302.13971)."""
    sizes = [shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim, shape.n_kv_head * shape.head_dim]
    half = shape.head_dim // 2
    frequency = 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(x.shape[1], half).double(), torch.arange(x.shape[1])[:, None] * frequency)

    def rotate(t: Tensor) -> Tensor:
        turned = torch.complex(t[..., :half], t[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), -1)

    h = w["token_embedding.weight"][x]
    for i in range(shape.n_layer):
        b = {k.removeprefix(f"blocks.{i}."): v for k, v in w.items() if k.startswith(f"blocks.{i}.")}
        n = F.rms_norm(h, (shape.d_model,), b["attention_norm.weight"], shape.norm_eps)
        qkv = (n @ b["attention.qkv.weight"].T).split(sizes, -1)
        q, k, v = (t.unflatten(-1, (-1, shape.head_dim)).transpose(1, 2) for t in qkv)
        group = shape.n_head // shape.n_kv_head
        k, v = rotate(k).repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + mixed @ b["attention.proj.weight"].T
        n = F.rms_norm(h, (shape.d_model,), b["mlp_norm.weight"], shape.norm_eps)
        gate, up = (n @ b["mlp.up.weight"].T).split(shape.d_mlp, -1)
        h = h + (F.silu(gate) * up) @ b["mlp.down.weight"].T
    return F.rms_norm(h, (shape.d_model,), w["norm.weight"], shape.norm_eps) @ w["head.weight"].T


@pytest.mark.parametrize(
    ("shape", "independent", "tolerance"),
    # The rotary table is kept in float32, good to 6e-8 an angle.
    [pytest.param(GPT2, gpt2_logits, 1e-11, id="gpt2"), pytest.param(LLAMA, llama_logits, 1e-5, id="llama")],
)
def test_equals_an_independent_forward(shape: Config, independent: Any, tolerance: float) -> None:
    gpt, x = model(shape).double(), ids()
    torch.testing.assert_close(gpt(x), independent(gpt.state_dict(), x, shape), rtol=tolerance, atol=tolerance)


@each_family
def test_causality(shape: Config) -> None:
    """Changing token t changes no logit before t, bit for bit, and does change those at t and later."""
    gpt, x = model(shape), ids()
    before = gpt(x)
    for t in range(CONTEXT):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % VOCAB
        after = gpt(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert ((after[:, t:] - before[:, t:]).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_order_matters(position: str) -> None:
    """One layer without positions would give the last token the same logits for any order of the others."""
    gpt = model(config(position=position, n_layer=1))
    x = ids(1, 6)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert x[0, 0] != x[0, 1]
    assert (gpt(x)[:, -1] - gpt(swapped)[:, -1]).abs().max() > 1e-4


@each_family
@pytest.mark.parametrize("chunks", [[1] * CONTEXT, [5, 1, 1, 5], [3, 9], [CONTEXT]], ids=str)
def test_decoding_with_a_cache_equals_one_pass(shape: Config, chunks: list[int]) -> None:
    gpt, x = model(shape), ids()
    full, pieces, last = gpt(x), [], []
    for last_only, logits in ((False, pieces), (True, last)):
        cache = KVCache(shape, 2, CONTEXT, torch.device("cpu"), torch.float64)
        cache.keys.fill_(float("nan"))  # slots not yet written must never be read
        cache.values.fill_(float("nan"))
        for piece in x.split(chunks, dim=1):
            logits.append(gpt(piece, cache, last_only=last_only))
        assert cache.length == CONTEXT
    torch.testing.assert_close(torch.cat(pieces, 1), full, rtol=1e-12, atol=1e-12)
    ends = torch.tensor(chunks).cumsum(0) - 1
    torch.testing.assert_close(torch.cat(last, 1), full[:, ends], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_positions_on_the_device_are_those_on_the_host(shape: Config) -> None:
    """With another count on the host than on the device, a pass of one token still goes by the device's."""
    gpt, x = model(shape), ids()
    full, cache = gpt(x), DeviceKVCache(shape, 2, CONTEXT, torch.device("cpu"), torch.float64)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    cache._device_lengths(5)  # as a short prompt has it on a GPU
    with torch.no_grad():
        torch.testing.assert_close(gpt(x[:, :5], cache), full[:, :5], rtol=1e-12, atol=1e-12)
        for t in range(5, CONTEXT):
            cache.place()
            cache.length = 2
            torch.testing.assert_close(gpt(x[:, t : t + 1], cache), full[:, t : t + 1], rtol=1e-12, atol=1e-12)
            assert cache.length == 3
            cache.length = t + 1
        assert cache._device_lengths(5).tolist() == [5, 5]
        cache.length = 3  # back to an earlier token, and a few at once over what was there
        torch.testing.assert_close(gpt(x[:, 3:6], cache), full[:, 3:6], rtol=1e-12, atol=1e-12)
        cache.length = CONTEXT
        with pytest.raises(InputError, match=f"KV cache holds {CONTEXT} tokens, and {CONTEXT + 1} are needed"):
            cache.place()


def test_last_only_without_a_cache() -> None:
    gpt, x = model(GPT2), ids()
    torch.testing.assert_close(gpt(x, last_only=True), gpt(x)[:, -1:], rtol=1e-12, atol=1e-12)


@each_family
def test_too_long_an_input_is_refused(shape: Config) -> None:
    gpt = model(shape)
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens do not fit the context of {CONTEXT}"):
        gpt(ids(1, CONTEXT + 1))
    cache = KVCache(shape, 1, 2 * CONTEXT, torch.device("cpu"), torch.float64)
    gpt(ids(1, CONTEXT - 2), cache)
    with pytest.raises(InputError, match=f"{CONTEXT + 1} tokens do not fit"):
        gpt(ids(1, 3), cache)
    assert gpt(ids(1, 2), cache).shape == (1, 2, VOCAB)


def test_a_full_cache_refuses_and_stays_as_it_was() -> None:
    gpt, x = model(GPT2), ids(1, 6)
    cache = KVCache(GPT2, 1, 5, torch.device("cpu"), torch.float64)
    gpt(x[:, :4], cache)
    with pytest.raises(InputError, match="KV cache holds 5 tokens, and 6 are needed"):
        gpt(x[:, 4:6], cache)
    assert cache.length == 4
    torch.testing.assert_close(gpt(x[:, 4:5], cache), gpt(x)[:, 4:5], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [CONTEXT, 5])
@pytest.mark.parametrize("shape", [GPT2, LLAMA, config(mlp="swiglu", n_kv_head=1)], ids=["gpt2", "llama", "grouped"])
def test_flops_per_token(shape: Config, length: int) -> None:
    """Against PyTorch's count of every matrix product run, forward and backward.

    The reference multiplies the masked half of the attention matrix too: 6 * n_layer * n_head * head_dim * length.
    """
    x, gpt = ids(3, length), GPT(shape)
    with FlopCounterMode(display=False) as counter, ops.use_backend("reference"):  # which it sees into
        gpt.loss(x, x).backward()
    masked = 6 * shape.n_layer * shape.n_head * shape.head_dim * length
    assert counter.get_total_flops() / x.numel() == shape.flops_per_token(length) + masked
    assert shape.flops_per_token() == shape.flops_per_token(CONTEXT)


@pytest.mark.parametrize("n_layer", [1, 8])
def test_initialisation(n_layer: int) -> None:
    """GPT-2's standard deviations; 5 % is seven standard errors of one taken over 10 000 weights."""
    torch.manual_seed(0)
    gpt = GPT(config(n_layer=n_layer, d_model=128, d_mlp=128, head_dim=32, tie_embeddings=False))
    residual = 0
    for name, p in gpt.named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            into_residual = "proj" in name or "down" in name
            residual += into_residual
            expected = 0.02 / math.sqrt(2 * n_layer) if into_residual else 0.02
            tolerance = 0.05 * math.sqrt(max(1.0, 10_000 / p.numel()))
            assert float(p.detach().std()) == pytest.approx(expected, rel=tolerance), name
            assert abs(float(p.detach().mean())) < 5 * expected / math.sqrt(p.numel()), name
    assert residual == 2 * n_layer


def test_dropout_only_in_training() -> None:
    gpt, x = model(dataclasses.replace(GPT2, dropout=0.5)), ids()
    without = GPT(GPT2, torch.float64).eval()
    without.load_state_dict(gpt.state_dict())
    assert torch.equal(gpt(x), without(x))
    gpt.train()
    assert not torch.equal(gpt(x), gpt(x))
    without.train()
    assert torch.equal(without(x), without(x))


@each_family
def test_bfloat16_activations(shape: Config) -> None:
    """Weights stay float32 and so does the loss; logits are bfloat16, off by some of its roundings (2^-8 each)."""
    gpt, wide, x = model(shape, torch.bfloat16, 0.1), model(shape, torch.float32, 0.1), ids()
    logits, expected = gpt(x), wide(x)
    assert logits.dtype is torch.bfloat16 and expected.dtype is torch.float32
    assert {p.dtype for p in gpt.parameters()} == {torch.float32}
    error = (logits.float() - expected).abs().max() / expected.abs().max()
    assert 0 < error.item() < 8 * 2**-8
    loss = gpt.loss(x, x)
    assert loss.dtype is torch.float32
    assert loss.item() == pytest.approx(wide.loss(x, x).item(), rel=0.02)
    loss.backward()
    assert {p.grad.dtype for p in gpt.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_every_parameter(norm: str, position: str, mlp: str, tied: bool) -> None:
    gpt = model(config(norm=norm, position=position, mlp=mlp, tie_embeddings=tied, n_kv_head=2))
    gpt.loss(ids(), ids(seed=2)).backward()
    assert [n for n, p in gpt.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


@pytest.mark.parametrize("shape", [LLAMA, GEMMA], ids=["llama", "gemma"])
def test_gradient_is_the_slope_of_the_loss(shape: Config) -> None:
    """Along a random direction, by a central difference in float64."""
    gpt, x, y = model(shape).double(), ids(), ids(seed=2)
    directions = [torch.randn_like(p) for p in gpt.parameters()]
    gpt.loss(x, y).backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(gpt.parameters(), directions, strict=True))
    losses = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(gpt.parameters(), directions, strict=True):
                p.add_(step * d)
            losses.append(gpt.loss(x, y).item())
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_loss_is_the_mean_over_the_targets_kept() -> None:
    gpt, x, y = model(GPT2), ids(), ids(seed=2)
    y[0, 3:] = -100
    expected = F.cross_entropy(gpt(x).flatten(0, 1), y.flatten(), ignore_index=-100)
    torch.testing.assert_close(gpt.loss(x, y), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_loss_and_gradients_are_the_same_without_the_logits(shape: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = ids(), ids(seed=2)
    y[0, 3:] = -100
    whole, chunked = model(shape), model(shape)
    expected = whole.loss(x, y)
    expected.backward()
    monkeypatch.setattr("llmfast.models.gpt.MAX_LOGITS", 0)
    monkeypatch.setattr(GPT, "forward", None)  # which makes logits
    loss = chunked.loss(x, y)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    for (name, p), q in zip(whole.named_parameters(), chunked.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@each_family
def test_loss_before_training_is_that_of_guessing(shape: Config) -> None:
    torch.manual_seed(0)
    assert GPT(shape).loss(ids(8), ids(8, seed=2)).item() == pytest.approx(math.log(VOCAB), rel=0.02)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_made_on_the_meta_device_and_loaded(position: str) -> None:
    config = preset("tiny", position=position)
    source = GPT(config).eval()
    with torch.device("meta"):
        model = GPT(config).eval()
    model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    ids = torch.randint(0, config.vocab_size, (1, 9))
    assert torch.equal(model(ids), source(ids))


@each_family
def test_matrices_in_the_compute_dtype_change_no_bit(shape: Config) -> None:
    gpt, x, cached = model(shape, torch.bfloat16), ids(), []
    logits, loss = gpt(x), gpt.loss(x, x)
    for cast in (False, True):
        if cast:
            gpt.cast_matrices()
        cache = KVCache(shape, 2, CONTEXT, torch.device("cpu"), torch.bfloat16)
        cached.append(torch.cat([gpt(piece, cache) for piece in x.split([7, 1, 4], dim=1)], 1))
    assert torch.equal(gpt(x), logits) and torch.equal(gpt.loss(x, x), loss) and torch.equal(*cached)
    kept = {p.dim(): p.dtype for p in gpt.parameters()}
    assert kept == {1: torch.float32, 2: torch.bfloat16}
    assert {p.dtype for p in gpt.parameters() if p.dim() == 1} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_in_another_dtype(dtype: torch.dtype) -> None:
    """A model cast as a whole still computes in its compute_dtype."""
    model = GPT(preset("tiny")).eval()
    ids = torch.randint(0, model.config.vocab_size, (1, 9))
    expected = model(ids)
    logits = model.to(dtype)(ids)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.02 if dtype is torch.bfloat16 else 1e-5)
