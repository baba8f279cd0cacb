"""What Hopper's attention forward has in shared memory, and the warp that loads it."""

from typing import NamedTuple

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from ._hopper_schedule import Work, draw, drawn, item, keys_at, place, queries_at, steps, tell
from ._hopper_tiles import key_blocks, rows_of, tile_at
from .hopper import tma_load


class Buffers(NamedTuple):
    """Shared memory. q: (tiles * groups, 64, D), one tile of queries or two, in whose place their output is put to be
    stored; k, v: (stages, block, D), a ring. Each slot has a barrier for "loaded" and one for "free again". The groups
    are warpgroups, of 64 queries each."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    q_empty: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@gluon.jit
def next_stage(stage, phase, STAGES: gl.constexpr):
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def key_blocks_of(row, rows, work, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """See `key_blocks`. Of packed sequences, no tile is taken that begins beyond its sequence's end."""
    return key_blocks(row, rows, work.n_queries, work.n_keys, work.window, BLOCK_N, CAUSAL)


@gluon.jit
def _load_queries(q_desc, buffers, work, b, h, row, step, GROUPS: gl.constexpr):
    TILES: gl.constexpr = buffers.q.shape[0] // GROUPS
    D: gl.constexpr = buffers.q.shape[2]
    for w in gl.static_range(GROUPS):
        slot = step % TILES * GROUPS + w
        mbarrier.wait(buffers.q_empty.index(slot), step // TILES % 2 ^ 1)
        mbarrier.expect(buffers.q_full.index(slot), 64 * D * 2)
        tma_load(q_desc, queries_at(b, h, row + w * 64, work), buffers.q_full.index(slot), buffers.q.index(slot))


@gluon.jit
def _load_tile(
    inputs, buffers, work, b, h, tile, step, stage, phase, GROUPS: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """A tile's queries, and its blocks of keys and values from last to first; -> the ring's next stage. With one tile
    of queries, whose place the tile before leaves late, the first keys come before them."""
    AHEAD: gl.constexpr = buffers.q.shape[0] > GROUPS
    STAGES: gl.constexpr = buffers.k.shape[0]
    BLOCK_N: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    q_desc, k_desc, v_desc = inputs
    row = tile * (64 * GROUPS)
    if AHEAD:
        _load_queries(q_desc, buffers, work, b, h, row, step, GROUPS)
    begin, inner, full, end = key_blocks_of(row, 64 * GROUPS, work, BLOCK_N, CAUSAL)
    for i in range(0, end - begin):
        at = keys_at(b, h // work.group, (end - 1 - i) * BLOCK_N, work)
        mbarrier.wait(buffers.k_empty.index(stage), phase)
        mbarrier.expect(buffers.k_full.index(stage), BLOCK_N * D * 2)
        tma_load(k_desc, at, buffers.k_full.index(stage), buffers.k.index(stage))
        if not AHEAD:
            if i == 0:
                _load_queries(q_desc, buffers, work, b, h, row, step, GROUPS)
        mbarrier.wait(buffers.v_empty.index(stage), phase)
        mbarrier.expect(buffers.v_full.index(stage), BLOCK_N * D * 2)
        tma_load(v_desc, at, buffers.v_full.index(stage), buffers.v.index(stage))
        stage, phase = next_stage(stage, phase, STAGES)
    if not AHEAD:
        if end <= begin:
            _load_queries(q_desc, buffers, work, b, h, row, step, GROUPS)
    return stage, phase


@gluon.jit
def load(inputs, buffers, work, packed, GROUPS: gl.constexpr, CAUSAL: gl.constexpr):
    """The loading warp. Of packed sequences it decides which tiles this thread block takes: places without rows it
    passes over, and the next number is drawn before a tile is loaded, so that it is there after it."""
    ROWS: gl.constexpr = 64 * GROUPS
    stage = 0
    phase = 1
    if packed.counter is None:
        for step in range(0, steps(work)):
            b, h, tile = place(item(step), work, CAUSAL)
            stage, phase = _load_tile(inputs, buffers, work, b, h, tile, step, stage, phase, GROUPS, CAUSAL)
    else:
        taken = 0
        number = gl.program_id(0)
        while number < work.n_heads * work.n_tiles:
            ticket = draw(packed.counter)
            _, h, among = place(number, work, CAUSAL)
            sequence, tile = tile_at(packed.query_starts, among, packed.sequences, ROWS)
            first_query, n_queries = rows_of(packed.query_starts, sequence)
            first_key, n_keys = rows_of(packed.key_starts, sequence)
            if tile * ROWS < n_queries:
                tell(packed, taken, (h, tile, first_query, n_queries, first_key, n_keys))
                own = Work(
                    work.heads, work.group, n_queries, n_keys, work.n_heads, work.n_tiles, work.section, work.window,
                    work.cap, first_query, first_key,
                )  # fmt: skip
                stage, phase = _load_tile(inputs, buffers, own, 0, h, tile, taken, stage, phase, GROUPS, CAUSAL)
                taken += 1
            number = gl.num_programs(0) + drawn(ticket)
        tell(packed, taken, (-1, 0, 0, 0, 0, 0))
