"""Which tiles of queries and keys see each other, and where tiles of packed sequences lie, for Hopper's attention.

Arithmetic on integers alone, shared by Gluon's kernels and Triton's; tests/ops/test_hopper_tiles.py runs it in Python.
Query i of a causal sequence sees the keys j with j <= i + n_keys - n_queries, and with a window the last `window` of
these. `window` is None without. Packed sequences lie one after another, and each may be empty.
"""

import triton
import triton.language as tl

# Keys of a tile in the backward pass.
KEYS: tl.constexpr = tl.constexpr(128)


@triton.jit
def key_blocks(row, rows, n_queries, n_keys, window, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr):
    """(begin, inner, full, end): `rows` queries from `row` < n_queries on all see the key blocks in [inner, full), some
    of them those in [begin, end), none any other."""
    begin = 0
    inner = 0
    full = n_keys
    end = n_keys
    if CAUSAL:
        offset = n_keys - n_queries
        full = tl.minimum(n_keys, tl.maximum(row + 1 + offset, 0))
        end = tl.minimum(n_keys, tl.maximum(row + rows + offset, 0))
        if window is not None:
            begin = tl.maximum(row + 1 + offset - window, 0) // BLOCK_N
            inner = tl.cdiv(tl.maximum(row + rows + offset - window, 0), BLOCK_N)
    return begin, inner, full // BLOCK_N, tl.cdiv(end, BLOCK_N)


@triton.jit
def query_tiles(
    n0, tiles, n_queries, n_keys, window, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr
):  # fmt: skip
    """(first, end): of all `tiles` of QUERIES queries those that see a key of the tile from `n0` on. There is one,
    because the last query sees all keys, but with a window, or PACKED, there may be none: first >= end."""
    first = 0
    end = tiles
    if CAUSAL:
        first = tl.maximum(n0 + n_queries - n_keys, 0) // QUERIES
        if window is not None:  # up to the last query that the tile's last key is not too far from
            unseen = tl.minimum(n0 + KEYS, n_keys) + window - 1 + n_queries - n_keys
            end = tl.minimum(end, tl.cdiv(tl.maximum(unseen, 0), QUERIES))
    if PACKED:
        end = tl.where(n0 < n_keys, end, 0)
    return first, end


@triton.jit
def turn(tile, key_tile, n_queries, n_keys, QUERIES: tl.constexpr, CAUSAL: tl.constexpr):
    """How many key tiles add to a query tile's dq before `key_tile`, one of those that it sees: causal ones from the
    last on, others from the first. With a window, too, these follow each other without a gap."""
    number = key_tile
    if CAUSAL:
        end = tl.minimum((tile + 1) * QUERIES + n_keys - n_queries, n_keys)
        number = (end - 1) // KEYS - key_tile
    return number


@triton.jit
def some_key(m0, n_queries, n_keys, QUERIES: tl.constexpr, CAUSAL: tl.constexpr, PACKED: tl.constexpr):
    """Whether some query of the tile from `m0` on sees a key: in a causal sequence, with a window or without, its own
    if there is one. Into other tiles' dq nothing is ever added."""
    seen = True
    if CAUSAL:
        seen = m0 + QUERIES + n_keys > n_queries
    if PACKED:
        seen = seen & (n_keys > 0) & (m0 < n_queries)
    return seen


def packed_tiles(rows: int, sequences: int, size: int) -> int:
    """How many tiles of `size` rows there are places for in `rows` rows of packed sequences: known without their
    lengths, enough for any, and at most `sequences` more than needed. See `first_tile`."""
    return rows // size + sequences


@triton.jit
def first_tile(Starts, b, SIZE: tl.constexpr):
    """The place of sequence b's first tile. The next sequence's is at least as many further as it has tiles: its rows
    from the first on, r after a multiple of SIZE, reach (r + length) // SIZE multiples further, and 1 is added."""
    return tl.load(Starts + b).to(tl.int32) // SIZE + b


@triton.jit
def tile_at(Starts, place, sequences, SIZE: tl.constexpr):
    """(sequence, tile in it) of a place among packed tiles: the tile may be one beyond the sequence's end. So is one
    from before the first sequence, which should begin at 0."""
    low = 0
    high = sequences
    while high - low > 1:  # first_tile(low) <= place, and place < first_tile(high) if there is such a sequence
        middle = (low + high) // 2
        reached = first_tile(Starts, middle, SIZE) <= place
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle)
    tile = place - first_tile(Starts, low, SIZE)
    return low, tl.where(tile < 0, 2**22, tile)


@triton.jit
def rows_of(Starts, b):
    """(first row, length) of sequence b."""
    first = tl.load(Starts + b).to(tl.int32)
    return first, tl.load(Starts + b + 1).to(tl.int32) - first
