"""The arithmetic of Hopper's attention kernels on tiles, run in Python, against the mask that defines attention."""

import functools
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from llmfast.ops import reference
from llmfast.testing.gluon import interpreted
from llmfast.testing.gluon.values import Int, Pointer

LENGTHS = (1, 5, 64, 100, 128, 257, 300)
WINDOWS = (1, 2, 63, 64, 65, 128, 129, 200, 290)


def function(name: str) -> Callable[..., Any]:
    """Of kernels/_hopper_tiles.py, with a kernel's integers, which refuse what C and Python round differently."""
    pytest.importorskip("triton")
    plain = interpreted(getattr(importlib.import_module("llmfast.kernels._hopper_tiles"), name))
    return lambda *args: plain(*(Int(a) if type(a) is int else a for a in args))


def visible(n_queries: int, n_keys: int, causal: bool, window: int | None) -> np.ndarray:
    """(n_queries, n_keys): who sees whom, of the definition, which weights what is seen alone."""
    q, k, v = torch.zeros(1, n_queries, 1, 1), torch.zeros(1, n_keys, 1, 1), torch.eye(n_keys)[None, :, None]
    out = reference.attention(q, k, v, causal, 1.0, window)
    assert isinstance(out, torch.Tensor)
    return (out[0, :, 0] > 0).numpy()


@functools.cache
def masks() -> list[tuple[int, int, bool, int | None, np.ndarray]]:
    cases: list[tuple[int, int, bool, int | None]] = []
    for n_queries, n_keys in itertools.product(LENGTHS, LENGTHS):
        windows = (None, *(w for w in WINDOWS if w < n_keys))
        cases += [(n_queries, n_keys, False, None), *((n_queries, n_keys, True, window) for window in windows)]
    return [(*case, visible(*case)) for case in cases]


def in_blocks(seen: np.ndarray, size: int, axis: int) -> list[bool]:
    """Whether anything is seen in each block of rows or columns."""
    return [bool(block.any()) for block in np.split(seen, range(size, seen.shape[axis], size), axis)]


@pytest.mark.parametrize(("rows", "keys"), [(64, 128), (128, 128), (192, 128), (64, 64), (128, 64)])
def test_key_blocks(rows: int, keys: int) -> None:
    """Blocks outside [begin, end) are seen by none of the rows; those in [inner, full), which get no mask, by all."""
    key_blocks = function("key_blocks")
    for n_queries, n_keys, causal, window, seen in masks():
        for row in range(0, n_queries, rows):
            begin, inner, full, end = key_blocks(row, rows, n_queries, n_keys, window, keys, causal)
            mine = seen[row : row + rows]
            some = in_blocks(mine, keys, 1)
            assert [begin <= i < end for i in range(len(some))] == some, (n_queries, n_keys, window, row)
            for i in range(max(begin, inner), min(end, full)):
                assert (i + 1) * keys <= n_keys and bool(mine[:, keys * i : keys * i + keys].all())
            assert 0 <= begin <= end <= len(some)


@pytest.mark.parametrize("queries", [64, 128])
def test_query_tiles_and_turns(queries: int) -> None:
    """A key tile walks the query tiles that see it; those that a query tile sees take the turns 0, 1, 2, ... in an
    order in which the grid has them: causal ones from the last on."""
    query_tiles, turn, some_key = function("query_tiles"), function("turn"), function("some_key")
    for n_queries, n_keys, causal, window, seen in masks():
        tiles, key_tiles = -(-n_queries // queries), -(-n_keys // 128)
        turns: list[list[int]] = [[] for _ in range(tiles)]
        for key_tile in reversed(range(key_tiles)) if causal else range(key_tiles):
            keys = seen[:, 128 * key_tile : 128 * key_tile + 128]
            first, end = query_tiles(128 * key_tile, tiles, n_queries, n_keys, window, queries, causal, False)
            some = in_blocks(keys, queries, 0)
            assert [first <= i < end for i in range(tiles)] == some, (n_queries, n_keys, window, key_tile)
            assert first < end or window is not None
            for tile in range(first, end):
                turns[tile].append(turn(tile, key_tile, n_queries, n_keys, queries, causal))
        for tile, taken in enumerate(turns):
            assert taken == list(range(len(taken))), (n_queries, n_keys, window, tile)
            for packed in (False, True):
                assert bool(some_key(tile * queries, n_queries, n_keys, queries, causal, packed)) == bool(taken)


def test_packed_sequences_without_queries_or_keys() -> None:
    query_tiles, some_key = function("query_tiles"), function("some_key")
    for causal, window in ((False, None), (True, None), (True, 3)):
        for n_queries, n_keys, n0 in ((0, 300, 0), (0, 300, 256), (7, 0, 0), (200, 100, 128), (200, 100, 2**29)):
            first, end = query_tiles(n0, -(-n_queries // 64), n_queries, n_keys, window, 64, causal, True)
            assert first >= end
        for m0, n_queries, n_keys in ((0, 0, 300), (0, 7, 0), (64, 64, 64), (2**29, 64, 64)):
            assert not some_key(m0, n_queries, n_keys, 64, causal, True)


@pytest.mark.parametrize("size", [64, 128, 192])
def test_places_of_packed_tiles(size: int) -> None:
    """Every tile of every sequence has a place of its own, and what else is found there is beyond a sequence's end."""
    first_tile, tile_at, rows_of = function("first_tile"), function("tile_at"), function("rows_of")
    packed_tiles = importlib.import_module("llmfast.kernels._hopper_tiles").packed_tiles
    generator = torch.Generator().manual_seed(size)
    for sequences in (1, 2, 3, 7, 40):
        for most in (1, size, 3 * size):
            lengths = torch.randint(0, most + 1, (sequences,), generator=generator).tolist()
            for at in range(0, sequences, 3):
                lengths[at] = (lengths[at] // size) * size
            starts = Pointer(torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32))
            found = []
            for place in range(packed_tiles(sum(lengths), sequences, size)):
                b, tile = tile_at(starts, place, sequences, size)
                first, length = rows_of(starts, b)
                assert (first, length) == (sum(lengths[:b]), lengths[b])
                assert place == first_tile(starts, b, size) + tile
                if tile * size < length:
                    found.append((b, tile))
            assert found == [(b, i) for b, length in enumerate(lengths) for i in range(-(-length // size))]


def test_what_lies_before_the_first_sequence_is_no_tile() -> None:
    starts = Pointer(torch.tensor([300, 400], dtype=torch.int32))
    assert [function("tile_at")(starts, place, 1, 128)[1] for place in range(4)] == [2**22, 2**22, 0, 1]
