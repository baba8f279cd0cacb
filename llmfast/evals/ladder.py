"""The ladder of baselines that a trained model has to climb: compressors and n-gram models, in bits per byte."""

import bz2
import gzip
import lzma
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from ..errors import InputError

# The encoder's limit; https://github.com/tukaani-project/xz/blob/master/src/liblzma/api/lzma/lzma12.h
_LARGEST_XZ_WINDOW = 1536 * 2**20


@dataclass(frozen=True)
class Rung:
    """One baseline."""

    name: str
    bits_per_byte: float
    seconds: float
    """Wall time of the measurement."""


def ladder(
    train_tokens: np.ndarray,
    val_tokens: np.ndarray,
    train_text: bytes,
    val_text: bytes,
    vocab_size: int,
    eot_id: int,
) -> list[Rung]:
    """Baselines for the validation text, all in bits per byte of `val_text`.

    Tokens are 1-D integer arrays in which every document ends with `eot_id`; the texts are the same documents joined.
    gzip, bz2 and xz see the validation text alone. The n-gram models are `witten_bell` over the tokens; they pay for
    the end of each document, like a language model over the same tokens does. "xz with the training set" is
    size(xz(train + val)) - size(xz(train)), with a window that reaches back to the first byte; these two runs take
    most of the time and some 11 times the texts' size in memory each.
    """
    if not val_text or not len(val_tokens):
        raise InputError(f"validation text of {len(val_text)} bytes and {len(val_tokens)} tokens; give some of both")
    if not train_text or not len(train_tokens):
        raise InputError(f"training text of {len(train_text)} bytes and {len(train_tokens)} tokens; give some of both")
    window = len(train_text) + len(val_text)
    if window > _LARGEST_XZ_WINDOW:
        raise InputError(f"{window} bytes of text exceed xz's window of {_LARGEST_XZ_WINDOW}; give less training text")

    def rung(name: str, n_bits: Callable[[], float]) -> Rung:
        start = time.perf_counter()
        bits = n_bits()
        return Rung(name, bits / len(val_text), time.perf_counter() - start)

    def ngram(order: int) -> Callable[[], float]:
        return lambda: -np.log2(witten_bell(train_tokens, val_tokens, order, vocab_size, eot_id)).sum().item()

    start = time.perf_counter()
    with ThreadPoolExecutor(2) as pool:  # lzma releases the GIL
        both = pool.submit(_xz_size, train_text + val_text, window)
        train = pool.submit(_xz_size, train_text, window)
        rungs = [
            rung("gzip -9", lambda: 8 * len(gzip.compress(val_text, 9, mtime=0))),
            rung("bz2 -9", lambda: 8 * len(bz2.compress(val_text, 9))),
            rung("xz -9e", lambda: 8 * _xz_size(val_text, window)),
            rung("unigram", ngram(1)),
            rung("bigram", ngram(2)),
            rung("trigram", ngram(3)),
        ]
        bits = 8 * (both.result() - train.result())
    return [*rungs, Rung("xz with the training set", bits / len(val_text), time.perf_counter() - start)]


def witten_bell(
    train_tokens: np.ndarray, val_tokens: np.ndarray, order: int, vocab_size: int, eot_id: int
) -> np.ndarray:
    """Probability of every validation token after the `order - 1` tokens before it, fp64 of shape (len(val_tokens),).

    Interpolated Witten-Bell smoothing, equations 16-17 of Chen and Goodman (https://aclanthology.org/P96-1041.pdf, and
    in full in https://dash.harvard.edu/bitstream/handle/1/25104739/tr-10-98.pdf): with c(h) the occurrences of history
    h in training and t(h) the number of different tokens that followed it,

        p(w | h) = (c(h, w) + t(h) p(w | shorter h)) / (c(h) + t(h)),

    down to the uniform distribution over the vocabulary, so that no token has probability zero. Both streams start
    after `eot_id`.
    """
    if order < 1 or vocab_size**order >= 2**63:
        raise InputError(f"order {order} does not fit a 64-bit code for vocab_size {vocab_size}; use a smaller order")
    train, val = (_after_end_of_text(tokens, order, vocab_size, eot_id) for tokens in (train_tokens, val_tokens))
    p = np.full(len(val_tokens), 1 / vocab_size)
    for n in range(1, order + 1):
        p = _interpolate(_codes(train, n, order, vocab_size), _codes(val, n, order, vocab_size), p, vocab_size)
    return p


def _interpolate(train: np.ndarray, val: np.ndarray, lower: np.ndarray, vocab_size: int) -> np.ndarray:
    """One level: the codes of the n-grams in training and validation, and p(w | shorter h) of the latter."""
    grams, gram_counts = np.unique(train, return_counts=True)
    histories, first, types = np.unique(grams // vocab_size, return_index=True, return_counts=True)
    count = _lookup(grams, gram_counts, val)
    total = _lookup(histories, np.add.reduceat(gram_counts, first), val // vocab_size)
    distinct = _lookup(histories, types, val // vocab_size)
    seen = total > 0
    return np.where(seen, (count + distinct * lower) / np.where(seen, total + distinct, 1), lower)


def _after_end_of_text(tokens: np.ndarray, order: int, vocab_size: int, eot_id: int) -> np.ndarray:
    """`tokens` as int64 behind `order - 1` end-of-text tokens."""
    padded = np.concatenate([np.full(order - 1, eot_id, dtype=np.int64), tokens])
    if padded.min() < 0 or padded.max() >= vocab_size:
        bad = padded.min() if padded.min() < 0 else padded.max()
        raise InputError(f"token id {bad} is outside the vocabulary of {vocab_size}; give the tokenizer's vocab_size")
    return padded


def _codes(padded: np.ndarray, n: int, order: int, vocab_size: int) -> np.ndarray:
    """One number for the last `n` tokens up to each position: digits in base `vocab_size`, the newest last."""
    length = len(padded) - order + 1
    codes = np.zeros(length, dtype=np.int64)
    for offset in range(order - n, order):
        codes = codes * vocab_size + padded[offset : offset + length]
    return codes


def _lookup(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """values[i] where keys[i] == query, else 0; `keys` is sorted and not empty."""
    index = np.minimum(np.searchsorted(keys, queries), len(keys) - 1)
    return np.where(keys[index] == queries, values[index], 0)


def _xz_size(data: bytes, window: int) -> int:
    """Bytes of `data` in xz at its strongest preset, with matches reaching back `window` bytes."""
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": max(window, 2**16)}]
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, filters=filters))
