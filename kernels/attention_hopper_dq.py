"""What goes before and after the kernel of attention_hopper_bwd.py: of each query what that needs, and dq of its sums.

Plain Triton. A program has one tile of QUERIES queries of a head, or half of it; of packed sequences a tile is of one.
"""

import triton
import triton.language as tl

from ._common import LOG2E
from ._hopper_tiles import rows_of, some_key, tile_at

SIZES = ("heads", "n_queries", "n_keys", "sequences", "query_places")


@triton.jit
def _tile_of(number, QueryStarts, sequences, query_places, n_queries, QUERIES: tl.constexpr):
    """Of tile `number`: (tiles of its head, which of them, the sequence, its first query, and their number)."""
    if QueryStarts is None:
        tiles = tl.cdiv(n_queries, QUERIES)
        sequence = 0
        first = 0
        length = n_queries
        tile = number % tiles
    else:
        tiles = query_places
        sequence, tile = tile_at(QueryStarts, (number % tiles).to(tl.int32), sequences, QUERIES)
        first, length = rows_of(QueryStarts, sequence)
    return tiles, tile, sequence, first, length


@triton.jit(do_not_specialize=SIZES)
def _attention_hopper_rows_kernel(
    DOut, Out, Max, Sum, Rows, Turns, QueryStarts, sequences, query_places, do_sb, do_st, do_sh, o_sb, o_st, o_sh,
    heads, n_queries, scale, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Rows: for each tile Base, then Delta, as `_attention_rows_kernel` in kernels/attention.py, also of rows beyond
    n_queries, which see nothing. Turns: 0 for each tile. QueryStarts: (sequences + 1,) of packed ones, with
    query_places tiles a head; else None."""
    number = tl.program_id(0).to(tl.int64)
    tiles, tile, _, first, length = _tile_of(number, QueryStarts, sequences, query_places, n_queries, QUERIES)
    bh, m0 = number // tiles, tile.to(tl.int64) * QUERIES
    b, h = bh // heads, bh % heads
    row = tl.arange(0, QUERIES)
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = m0 + row < length
    held = inside[:, None] & (col < D)
    m0 += first
    DOut += b * do_sb + h * do_sh + m0 * do_st
    Out += b * o_sb + h * o_sh + m0 * o_st
    # In int64, like m0: a stride may be large, and TMA takes it.
    far = row[:, None].to(tl.int64)
    dout = tl.load(DOut + far * do_st + col, mask=held, other=0.0).to(tl.float32)
    out = tl.load(Out + far * o_st + col, mask=held, other=0.0).to(tl.float32)
    m = tl.load(Max + bh * n_queries + m0 + row, mask=inside, other=0.0)
    total = tl.load(Sum + bh * n_queries + m0 + row, mask=inside, other=0.0)
    base = tl.where(total == 0.0, float("inf"), m * (scale * LOG2E) + tl.log2(total))
    Rows += number * (2 * QUERIES)
    tl.store(Rows + row, base)
    tl.store(Rows + QUERIES + row, tl.sum(dout * out, 1))
    tl.store(Turns + number, 0)


@triton.jit
def _restored(dq):
    """The inverse of `_arranged` in attention_hopper_bwd.py."""
    return tl.reshape(tl.permute(tl.reshape(dq, [4, 4, 4, 2, 2, 4, 2, 2]), [1, 6, 2, 4, 3, 0, 5, 7]), [64, 64])


@triton.jit(do_not_specialize=SIZES)
def _attention_hopper_dq_kernel(
    Sums, DQ, QueryStarts, KeyStarts, sequences, query_places, dq_sb, dq_st, heads, n_queries, n_keys, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """DQ from one (64, 64) of its sum, which was not written if its queries see no key."""
    number, part = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2
    tiles, tile, sequence, first, n_queries = _tile_of(
        number, QueryStarts, sequences, query_places, n_queries, QUERIES
    )  # fmt: skip
    if QueryStarts is not None:
        _, n_keys = rows_of(KeyStarts, sequence)
    bh, m0 = number // tiles, tile.to(tl.int64) * QUERIES
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 64)[None, :]
    seen = (row >= 0) & some_key(m0, n_queries, n_keys, QUERIES, CAUSAL, QueryStarts is not None)
    dq = _restored(tl.load(Sums + (2 * number + part) * 4096 + row * 64 + col, mask=seen, other=0.0)) * scale
    if BLOCK_D == 64:
        row += part * 64
    else:
        col += part * 64
    DQ += bh // heads * dq_sb + bh % heads * D + (first + m0) * dq_st
    tl.store(DQ + row.to(tl.int64) * dq_st + col, dq.to(DQ.dtype.element_ty), mask=(m0 + row < n_queries) & (col < D))
