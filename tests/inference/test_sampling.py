"""Sampling: greedy, limits, frequencies and refused values."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfast.errors import InputError, LLMFastError
from llmfast.inference import sample

LOGITS = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).log_softmax(-1)  # likeliest first: 1, 3, 2, 0


def draw(n: int = 4000, **options) -> torch.Tensor:
    """Share of each of the 4 ids in `n` draws."""
    ids = sample(LOGITS.expand(n, -1), generator=torch.Generator().manual_seed(0), **options)
    return torch.bincount(ids, minlength=4) / n


def test_frequencies_are_the_softmax() -> None:
    for temperature in (0.5, 1.0, 2.0):
        expected = torch.softmax(LOGITS[0] / temperature, -1)
        # 4 standard deviations of a share of 4000 draws are at most 4 * sqrt(0.25 / 4000) = 0.032.
        torch.testing.assert_close(draw(temperature=temperature), expected, atol=0.032, rtol=0)


def test_greedy_takes_the_likeliest() -> None:
    assert sample(LOGITS, temperature=0.0).tolist() == [1]
    assert sample(torch.tensor([[1.0, 5.0, 5.0]]), temperature=0.0).tolist() == [1]


def test_tiny_temperature_is_greedy_and_finite() -> None:
    assert sample(LOGITS * 1e4, temperature=1e-30).tolist() == [1]


def test_top_k_keeps_k() -> None:
    assert (draw(top_k=2) > 0).tolist() == [False, True, False, True]
    assert (draw(top_k=1) > 0).tolist() == [False, True, False, False]
    assert (draw(top_k=99) > 0).all()
    equal = sample(torch.zeros(2000, 4), top_k=2, generator=torch.Generator().manual_seed(0))
    assert set(equal.tolist()) == {0, 1}


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    p = torch.softmax(LOGITS[0], -1)  # 0.644 0.237 0.087 0.032
    assert (draw(top_p=0.6) > 0).tolist() == [False, True, False, False]
    assert (draw(top_p=float(p[1]) + 0.01) > 0).tolist() == [False, True, False, True]
    assert (draw(top_p=0.9) > 0).tolist() == [False, True, True, True]
    assert (draw(top_p=1.0) > 0).all()
    assert (draw(top_p=1e-9) > 0).tolist() == [False, True, False, False]


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.floats(0.0, 5.0),
    st.none() | st.integers(1, 50),
    st.none() | st.floats(1e-6, 1.0),
    st.integers(0, 2**31),
)
def test_ids_are_among_the_allowed(rows: int, n: int, temperature: float, top_k, top_p, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 10 * torch.randn(rows, n, generator=generator)
    ids = sample(logits, temperature, top_k, top_p, generator)
    assert ids.shape == (rows,) and ids.dtype == torch.int64
    rank = (logits > logits.gather(1, ids[:, None])).sum(1)
    assert (rank < min(n, top_k or n)).all()


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}],
)
def test_refused(options: dict) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        sample(LOGITS, **options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(temperature: float, bad: float) -> None:
    with pytest.raises(LLMFastError, match="logits are not finite"):
        sample(torch.tensor([[0.0, bad, 1.0]]), temperature)
    assert sample(torch.tensor([[float("-inf"), 1.0]]), temperature, top_k=10**20).tolist() == [1]
