"""The ladder: n-gram models are proper distributions equal to a plain reference, compressors are what they say."""

import bz2
import gzip
import itertools
import lzma
import math
import sys
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.errors import InputError
from llmfast.evals import ladder, witten_bell

EOT = 0


def reference(train, val, order, vocab_size):
    """Witten-Bell by dictionaries, one token at a time."""
    followers = defaultdict(Counter)
    padded = [EOT] * (order - 1) + list(train)
    for position in range(order - 1, len(padded)):
        for n in range(order):
            followers[tuple(padded[position - n : position])][padded[position]] += 1

    def probability(history, token):
        lower = probability(history[1:], token) if history else 1 / vocab_size
        seen = followers[history]
        types, total = len(seen), sum(seen.values())
        return (seen[token] + types * lower) / (total + types) if total else lower

    stream = [EOT] * (order - 1) + list(val)
    return [probability(tuple(stream[i - order + 1 : i]), stream[i]) for i in range(order - 1, len(stream))]


tokens = st.lists(st.integers(0, 4), min_size=1, max_size=30)


@given(train=tokens, val=tokens, order=st.integers(1, 4))
def test_equals_the_reference(train, val, order):
    fast = witten_bell(np.array(train), np.array(val), order, 5, EOT)
    np.testing.assert_allclose(fast, reference(train, val, order, 5), rtol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_sums_to_one_after_every_history(order):
    train = np.array([1, 2, 1, 3, 1, 2, 0, 1, 2, 0])  # 4 never occurs
    for history in itertools.product(range(5), repeat=order - 1):
        p = [witten_bell(train, np.array([*history, token]), order, 5, EOT)[-1] for token in range(5)]
        assert math.isclose(sum(p), 1, rel_tol=1e-12) and min(p) > 0


def test_unseen_token_by_hand():
    # Unigram over "1 1 2": (0 + 2 types * 1/4) / (3 tokens + 2 types).
    assert witten_bell(np.array([1, 1, 2]), np.array([3]), 1, 4, EOT)[0] == pytest.approx(0.1)


def test_uint16_tokens_do_not_overflow():
    train, val = np.array([65000, 65001] * 5), np.array([65000, 65001])
    wide = witten_bell(train, val, 3, 65536, EOT)
    assert (witten_bell(train.astype(np.uint16), val.astype(np.uint16), 3, 65536, EOT) == wide).all()


@pytest.mark.parametrize("order", [0, 5])
def test_order_that_does_not_fit_is_refused(order):
    with pytest.raises(InputError, match=f"order {order} does not fit .* vocab_size 50257"):
        witten_bell(np.array([1]), np.array([1]), order, 50257, EOT)


@pytest.mark.parametrize(("train", "val", "bad"), [([5], [1], 5), ([1], [7], 7), ([-1], [1], -1)])
def test_id_outside_the_vocabulary_is_named(train, val, bad):
    with pytest.raises(InputError, match=f"token id {bad} is outside the vocabulary of 5"):
        witten_bell(np.array(train), np.array(val), 2, 5, EOT)


def text_of(seed, n_words, words):
    return " ".join(np.random.default_rng(seed).choice(words, n_words)).encode()


def ladder_of(train, val):
    def as_tokens(text):
        return np.array([*text, EOT])

    return ladder(as_tokens(train), as_tokens(val), train, val, 256, EOT)


def test_rungs():
    words = [f"{i * 7919:x}" for i in range(500)]
    train, val = text_of(1, 5000, words), text_of(2, 500, words)
    rungs = {rung.name: rung for rung in ladder_of(train, val)}
    names = ["gzip -9", "bz2 -9", "xz -9e", "unigram", "bigram", "trigram", "xz with the training set"]
    assert list(rungs) == names
    bpb = {name: rung.bits_per_byte for name, rung in rungs.items()}
    assert bpb["gzip -9"] == 8 * len(gzip.compress(val, 9)) / len(val)
    assert bpb["bz2 -9"] == 8 * len(bz2.compress(val, 9)) / len(val)
    p = witten_bell(np.array([*train, EOT]), np.array([*val, EOT]), 2, 256, EOT)
    assert bpb["bigram"] == pytest.approx(-np.log2(p).sum() / len(val))
    assert bpb["trigram"] < bpb["bigram"] < bpb["unigram"] < 8
    sizes = [len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in (val, train, train + val)]
    assert bpb["xz -9e"] == 8 * sizes[0] / len(val)
    assert bpb["xz with the training set"] == 8 * (sizes[2] - sizes[1]) / len(val) < bpb["xz -9e"]
    assert all(rung.seconds >= 0 for rung in rungs.values())


def test_xz_reaches_back_to_the_first_byte():
    rng = np.random.default_rng(0)
    val = rng.bytes(20_000)
    train = val + bytes(200_000)
    rungs = {rung.name: rung.bits_per_byte for rung in ladder_of(train, val)}
    assert rungs["xz with the training set"] < 0.2 < 8 <= rungs["xz -9e"]


@pytest.mark.parametrize(("train", "val", "name"), [(b"", b"x", "training"), (b"x", b"", "validation")])
def test_empty_text_is_refused(train, val, name):
    with pytest.raises(InputError, match=f"{name} text of 0 bytes"):
        ladder_of(train, val)


def test_text_beyond_the_window_is_refused(monkeypatch):
    # The function of the same name hides the module from a dotted path.
    monkeypatch.setattr(sys.modules["llmfast.evals.ladder"], "_LARGEST_XZ_WINDOW", 10)
    with pytest.raises(InputError, match="12 bytes of text exceed xz's window of 10"):
        ladder_of(b"123456", b"123456")
