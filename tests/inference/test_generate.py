"""Generation with the cache equals a naive forward pass over everything, token by token."""

import pytest
import torch

from llmfast.errors import InputError
from llmfast.inference import generate
from llmfast.models import GPT, preset


@pytest.fixture(params=["rope", "learned"])
def model(request: pytest.FixtureRequest, device: str) -> GPT:
    torch.manual_seed(0)
    model = GPT(
        preset("tiny", vocab_size=61, context_length=16, position=request.param, n_head=4, n_kv_head=2, dropout=0.2)
    )
    for parameter in model.parameters():  # large weights, so that the argmax depends on the whole context
        torch.nn.init.normal_(parameter, std=0.3)
    return model.to(device)


@torch.no_grad()
def naive(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Argmax of a full forward pass each step; a full context restarts from its last half."""
    model.eval()
    window, out = list(prompt), []
    for _ in range(n):
        if len(window) > model.config.context_length:
            window = window[-(model.config.context_length // 2) :]
        ids = torch.tensor([window], device=model.token_embedding.weight.device)
        out.append(int(model(ids)[0, -1].argmax()))
        window.append(out[-1])
    return out


@pytest.mark.parametrize("length", [1, 5, 15, 16])
def test_greedy_equals_naive_past_the_context(model: GPT, length: int) -> None:
    prompt = [(7 * i) % 61 for i in range(length)]
    model.train()
    tokens = list(generate(model, prompt, 40, temperature=0.0))
    assert tokens == naive(model, prompt, 40)
    assert len(set(tokens)) > 1  # not one token for ever


def test_seed_decides(model: GPT) -> None:
    runs = [list(generate(model, [1], 30, temperature=3.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_stops_before_a_stop_id(model: GPT) -> None:
    tokens = list(generate(model, [1, 2], 20, temperature=0.0))
    stop = tokens[8]
    assert list(generate(model, [1, 2], 20, temperature=0.0, stop_ids=[stop])) == tokens[: tokens.index(stop)]


def test_a_padded_vocabulary(model: GPT) -> None:
    """Ids that the tokenizer does not have are never chosen; among the others nothing changes."""
    size, prompt = 20, [1, 2]
    assert max(generate(model, prompt, 12, temperature=0.0)) >= size
    tokens = list(generate(model, prompt, 12, temperature=0.0, vocab_size=size))
    ids = list(prompt)
    for token in tokens:
        with torch.no_grad():
            logits = model(torch.tensor([ids], device=model.token_embedding.weight.device))[0, -1]
        assert token == int(logits[:size].argmax())
        ids.append(token)
    assert len(tokens) == 12
    for options in ({"temperature": 3.0}, {"top_k": 50}, {"top_p": 0.99}):
        assert max(generate(model, prompt, 12, **options, vocab_size=size)) < size
    sampled = (list(generate(model, prompt, 30, temperature=3.0, vocab_size=n)) for n in (None, 61, 99))
    assert next(sampled) == next(sampled) == next(sampled)
    with pytest.raises(InputError, match="vocab_size is 0"):
        generate(model, prompt, 1, vocab_size=0)


def test_context_of_one() -> None:
    model = GPT(preset("tiny", vocab_size=61, context_length=1))
    assert len(list(generate(model, [3], 5))) == 5


@pytest.mark.parametrize(
    "prompt, options, message",
    [
        ([], {}, "0 tokens; give 1 to 16"),
        ([0] * 17, {}, "17 tokens; give 1 to 16"),
        ([61], {}, "prompt id 61 is outside the vocabulary of 61"),
        ([-1], {}, "prompt id -1"),
        ([0], {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ([0], {"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_refused_at_the_call(model: GPT, prompt: list[int], options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(model, prompt, **({"max_new_tokens": 3} | options))


@pytest.mark.parametrize("seed", [-1, 10**20])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(InputError, match=f"seed is {seed}"):
        generate(GPT(preset("tiny")), [1], 1, seed=seed)
