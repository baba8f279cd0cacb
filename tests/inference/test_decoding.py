"""Decoding by a recorded pass: the logits and tokens of passes launched one by one, whatever was read before.

Without a GPU, recording is played: a replay runs the pass again while the host's count of tokens is wrong.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import InputError
from llmfast.inference import Decoder, decoding, generate
from llmfast.models import GPT, Config, DeviceKVCache, KVCache, RopeScaling, preset

VOCAB, CONTEXT = 61, 32
SIZES = {"vocab_size": VOCAB, "context_length": CONTEXT, "n_layer": 2, "n_head": 4, "head_dim": 16}
SIZES |= {"d_model": 64, "d_mlp": 96}
PRENORM: dict[str, Any] = {"norm": "rms_norm", "position": "rope", "mlp": "swiglu", "bias": False}
SHAPES = {
    "gpt2": Config(**SIZES, n_kv_head=4),
    "llama": Config(**SIZES, **PRENORM, n_kv_head=2, rope_scaling=RopeScaling("llama3", 4.0, 16, high_freq_factor=4.0)),
    "qwen": Config(**SIZES, **PRENORM, n_kv_head=1, qk_norm=True, qkv_bias=True, tie_embeddings=False),
    "tiny": preset("tiny", vocab_size=VOCAB, context_length=CONTEXT),
    "windowed": Config(
        **SIZES, **PRENORM, n_kv_head=2, window=5, local_layers=(1,), local_rope_theta=100.0, attention_softcap=20.0
    ),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def make(shape: Config, device: str, seed: int = 0) -> GPT:
    """Large weights, so that the likeliest token depends on the whole context; matrices as a run's are kept."""
    torch.manual_seed(seed)
    model = GPT(shape, torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3 if parameter.dim() == 2 else 0.1)
    model.cast_matrices()
    return model.to(device).eval()


def prompt(length: int) -> list[int]:
    return [(7 * i + length) % VOCAB for i in range(length)]


class Played:
    """In the place of a CUDA graph of a decoder's pass."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def replay(self) -> None:
        cache = self.decoder.cache
        length, cache.length = cache.length, 0
        self.decoder._logits = self.decoder._read(self.decoder._token)
        cache.length = length


@pytest.fixture
def recorder(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Decoder]]:
    """The decoders that record from here on, once for each time they do."""
    recorded: list[Decoder] = []
    record = Decoder._record

    def counted(self: Decoder) -> Any:
        recorded.append(self)
        return record(self) if device == "cuda" else Played(self)

    monkeypatch.setattr(Decoder, "_record", counted)
    yield recorded


def decoder_of(model: GPT) -> Decoder:
    """One that records, on a CPU too."""
    decoder = Decoder(model)
    cache = decoder.cache
    decoder.cache = DeviceKVCache(model.config, 1, cache.capacity, cache.keys.device, cache.keys.dtype)
    for part in (decoder.cache.keys, decoder.cache.values):
        part.fill_(float("nan"))  # what is not yet written must never count
    return decoder


def one_by_one(model: GPT, ids: list[int], n_prompt: int) -> Tensor:
    """Logits (N, V) after the prompt and after each further id, from passes over a usual cache."""
    where = model.token_embedding.weight.device
    cache = KVCache(model.config, 1, CONTEXT, where, model.compute_dtype)
    pieces = torch.tensor([ids], device=where).split([n_prompt, *[1] * (len(ids) - n_prompt)], dim=1)
    with torch.no_grad():
        return torch.cat([model(piece, cache, last_only=True)[:, -1] for piece in pieces])


def decoded(decoder: Decoder, ids: list[int], n_prompt: int) -> Tensor:
    decoder.begin()
    rows = [decoder(ids[:n_prompt]).clone()]
    return torch.cat([*rows, *(decoder([token]).clone() for token in ids[n_prompt:])])


def assert_same(got: Tensor, expected: Tensor) -> None:
    if got.is_cuda:
        assert torch.equal(got, expected)
    else:  # where attention and decode attention are two functions
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


@each_shape
def test_logits_are_those_of_passes_one_by_one(shape: Config, device: str, recorder: list[Decoder]) -> None:
    """After prompts of several lengths, all but the first by the graph of the first; up to the end of the context."""
    model = make(shape, device)
    decoder = decoder_of(model)
    for n_prompt in (1, 3, CONTEXT - 2, 17):
        ids = prompt(CONTEXT)
        got, expected = decoded(decoder, ids, n_prompt), one_by_one(model, ids, n_prompt)
        assert got.dtype is model.compute_dtype and got.shape == (CONTEXT - n_prompt + 1, VOCAB)
        assert_same(got, expected)
        assert decoder.cache.length == CONTEXT
    assert len(recorder) == 1
    with pytest.raises(InputError, match=f"holds {CONTEXT} tokens, and {CONTEXT + 1} are needed"):
        decoder([1])


def test_a_cache_grows_with_what_it_holds(
    device: str, recorder: list[Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By single tokens, whose graph is recorded anew, and by a prompt."""
    monkeypatch.setattr(decoding, "FIRST_CAPACITY", 12)
    model = make(SHAPES["llama"], device)
    decoder = decoder_of(model)
    ids = prompt(CONTEXT)
    for n_prompt, capacity in ((2, CONTEXT), (30, CONTEXT)):
        got, expected = decoded(decoder, ids, n_prompt), one_by_one(model, ids, n_prompt)
        assert_same(got, expected)
        assert decoder.cache.capacity == capacity
    assert len(recorder) == 3
    decoder = Decoder(model)
    assert decoder.cache.capacity == 12
    decoder(ids[:13])
    assert decoder.cache.capacity == 24
    tokens = list(generate(Decoder(model), prompt(3), 60, temperature=0.0))
    monkeypatch.undo()
    assert tokens == list(generate(Decoder(model), prompt(3), 60, temperature=0.0))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"temperature": 2.0, "top_k": 20, "seed": 3}], ids=str)
def test_tokens_are_those_of_passes_one_by_one(
    name: str, options: dict[str, Any], device: str, recorder: list[Decoder]
) -> None:
    """Calls one after another with one decoder, past the end of the context."""
    model, prompts, n = make(SHAPES[name], device), [prompt(4), prompt(1), prompt(CONTEXT), prompt(4)], 45
    decoder = decoder_of(model)
    got = [list(generate(decoder, ids, n, **options)) for ids in prompts]
    assert len(recorder) == 1
    eager = Decoder(model, cuda_graph=False)
    assert got[:3] == [list(generate(eager, ids, n, **options)) for ids in prompts[:3]]
    assert got[0] == got[3] != got[1] and len(set(got[0])) > 1
    assert len(recorder) == 1


def test_two_models_take_turns(device: str, recorder: list[Decoder]) -> None:
    models = [make(SHAPES["llama"], device), make(SHAPES["gpt2"], device, seed=1)]
    decoders = [decoder_of(model) for model in models]
    turns = [generate(decoder, prompt(5), 35, temperature=0.0) for decoder in decoders]
    got = list(zip(*turns, strict=True))
    assert recorder == decoders
    for i, model in enumerate(models):
        assert [pair[i] for pair in got] == list(
            generate(Decoder(model, cuda_graph=False), prompt(5), 35, temperature=0.0)
        )


def test_weights_changed_in_place_are_seen_and_others_recorded(device: str, recorder: list[Decoder]) -> None:
    model = make(SHAPES["llama"], device)
    decoder = decoder_of(model)
    before = list(generate(decoder, prompt(3), 14, temperature=0.0))
    with torch.no_grad():
        model.blocks[1].mlp.down.weight.mul_(-1.0)  # pyright: ignore
    after = list(generate(decoder, prompt(3), 14, temperature=0.0))
    assert len(recorder) == 1 and after != before
    assert after == list(generate(Decoder(model, cuda_graph=False), prompt(3), 14, temperature=0.0))
    weight = model.token_embedding.weight
    weight.data = weight.data.flip(0)
    moved = list(generate(decoder, prompt(3), 14, temperature=0.0))
    assert len(recorder) == 2 and moved != after
    assert model.rotary is not None
    model.rotary = model.rotary.flip(1)
    turned = list(generate(decoder, prompt(3), 14, temperature=0.0))
    assert len(recorder) == 3 and turned != moved
    assert turned == list(generate(Decoder(model, cuda_graph=False), prompt(3), 14, temperature=0.0))
    with ops.use_backend("reference"):
        list(generate(decoder, prompt(3), 14, temperature=0.0))
    assert len(recorder) == 4


def test_a_short_answer_is_not_recorded(device: str, recorder: list[Decoder]) -> None:
    decoder = decoder_of(make(SHAPES["gpt2"], device))
    list(generate(decoder, prompt(3), 1 + decoding.EAGER))
    assert recorder == []


def test_a_decoder_continues_one_prompt_at_a_time(device: str) -> None:
    decoder = Decoder(make(SHAPES["gpt2"], device))
    first, second = (generate(decoder, prompt(n), 5) for n in (3, 4))
    next(first)
    next(second)
    with pytest.raises(InputError, match="another prompt was begun with this Decoder"):
        next(first)
    assert len(list(second)) == 4


@pytest.mark.gpu
def test_who_asks_for_no_graph_gets_none(recorder: list[Decoder]) -> None:
    model = make(SHAPES["llama"], "cuda")
    assert len(list(generate(Decoder(model, cuda_graph=False), prompt(3), 40))) == 40 and recorder == []
    assert len(list(generate(model, prompt(3), 40))) == 40
    assert len(recorder) == 1 and isinstance(recorder[0].cache, DeviceKVCache)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_replays_wait_for_nothing_on_the_host(backend: str) -> None:
    """Between the id and the logits nothing is read back, recorded or launched one by one."""
    with ops.use_backend(backend):
        decoder = Decoder(make(SHAPES["llama"], "cuda"))
        decoded(decoder, prompt(CONTEXT), 3)
        decoder.begin()
        decoder(prompt(5))
        torch.cuda.set_sync_debug_mode("error")
        try:
            for token in prompt(10):
                decoder([token])
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_another_model_in_other_dtypes(recorder: list[Decoder]) -> None:
    """Weights in float32, which are cast inside the graph, give the same tokens."""
    model = make(SHAPES["qwen"], "cuda")
    expected = list(generate(Decoder(model), prompt(6), 60, temperature=0.0))
    model.float()
    assert list(generate(Decoder(model), prompt(6), 60, temperature=0.0)) == expected
    assert len(recorder) == 2
