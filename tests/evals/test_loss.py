"""Bits per byte against a token-by-token computation."""

import math

import numpy as np
import pytest
import torch

from llmfast.errors import InputError
from llmfast.evals import bits_per_byte, loss_by_position
from llmfast.models import GPT, preset

CONTEXT = 16


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(preset("tiny", vocab_size=50, context_length=CONTEXT, dropout=0.3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def brute_force(model: GPT, tokens: np.ndarray, n_bytes: int, context: int, stride: int) -> float:
    """Each token from the window that the definition gives it, one forward pass for each."""
    model.eval()
    bits, end = 0.0, context
    for i in range(1, len(tokens)):
        if i > end:
            end = min(end + stride, len(tokens) - 1)
        start = max(0, min(end, len(tokens) - 1) - context)
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens[start:i].astype(np.int64))[None])[0, -1]
        bits -= logits.double().log_softmax(-1)[tokens[i]].item() / math.log(2)
    return bits / n_bytes


@pytest.mark.parametrize("n", [2, 3, 16, 17, 18, 24, 25, 47, 100])
@pytest.mark.parametrize("stride", [1, 5, 8, 16])
def test_equals_brute_force(model: GPT, n: int, stride: int) -> None:
    tokens = np.random.default_rng(n).integers(0, 50, n).astype(np.uint16)
    model.train()
    value = bits_per_byte(model, tokens, 3 * n, CONTEXT, stride, batch_size=3)
    assert model.training
    assert value == pytest.approx(brute_force(model, tokens, 3 * n, CONTEXT, stride), rel=1e-5)


def test_uniform_model_costs_log2_of_the_vocabulary(model: GPT) -> None:
    uniform = GPT(preset("tiny", vocab_size=64, context_length=CONTEXT))
    torch.nn.init.zeros_(uniform.token_embedding.weight)
    tokens = np.arange(41, dtype=np.uint16)
    assert bits_per_byte(uniform, tokens, 80, CONTEXT) == pytest.approx(40 * 6 / 80)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_batch(model: GPT, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    tokens = np.arange(200, dtype=np.uint16) % 50
    scores = (
        lambda: bits_per_byte(model, tokens, 100, CONTEXT, batch_size=8),
        lambda: loss_by_position(model, tokens, CONTEXT, batch_size=8),
    )
    expected = [score() for score in scores]
    sizes, real, most = [], GPT._hidden, 2

    def limited(self, ids, *args):
        sizes.append(len(ids))
        if len(ids) > most:
            raise error
        return real(self, ids, *args)

    monkeypatch.setattr(GPT, "_hidden", limited)
    for score, value in zip(scores, expected, strict=True):
        sizes.clear()
        with pytest.warns(UserWarning, match="now [24] windows at once"):
            np.testing.assert_allclose(score(), value, rtol=1e-5)
        assert sizes[:3] == [8, 4, 2]
        sizes.clear()
        most = 0
        with pytest.raises(type(error)), pytest.warns(UserWarning, match="now 1 windows"):
            score()
        assert sizes == [8, 4, 2, 1]
        most = 2
    monkeypatch.setattr(GPT, "_hidden", lambda *args: (_ for _ in ()).throw(RuntimeError("another fault")))
    for score in scores:
        with pytest.raises(RuntimeError, match="another fault"):
            score()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokens": np.zeros(1, np.uint16)}, "1 tokens of 10 bytes"),
        ({"n_bytes": 0}, "of 0 bytes"),
        ({"context": 17}, "context is 17; it must be 1 to 16"),
        ({"stride": 0}, "stride is 0"),
        ({"stride": 17}, "stride is 17"),
    ],
)
def test_refused(model: GPT, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        bits_per_byte(model, **({"tokens": np.zeros(9, np.uint16), "n_bytes": 10, "context": CONTEXT} | options))


@pytest.mark.parametrize("batch_size", [1, 3])
def test_loss_by_position_equals_token_by_token(model: GPT, batch_size: int) -> None:
    """Windows of 8 over 45 tokens: five whole ones, the rest left out; dropout stays off."""
    tokens = np.random.default_rng(0).integers(0, 50, 45)
    expected = np.zeros(8)
    with torch.no_grad():
        for start in range(0, 40, 8):
            for p in range(8):
                logits = model.eval()(torch.from_numpy(tokens[start : start + p + 1])[None])[0, -1]
                expected[p] -= logits.double().log_softmax(-1)[tokens[start + p + 1]].item() / 5
    model.train()
    np.testing.assert_allclose(loss_by_position(model, tokens, 8, batch_size), expected, rtol=1e-5)
    assert model.training


def test_loss_by_position_refuses() -> None:
    model = GPT(preset("tiny", vocab_size=50, context_length=CONTEXT))
    for tokens, context in ((9, CONTEXT + 1), (9, 0), (8, 8)):
        with pytest.raises(InputError, match="context|window"):
            loss_by_position(model, np.zeros(tokens, dtype=np.int64), context)
