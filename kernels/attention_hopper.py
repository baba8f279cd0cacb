"""Attention forward for Hopper (sm_90), in Gluon: FlashAttention-3's division of labour (https://arxiv.org/abs/2407.08608).

One warp copies tiles into shared memory (TMA) while two or three warpgroups of 64 queries each multiply them (wgmma).
A warpgroup issues the scores of one block of keys and the output of the block before it together, then takes the
softmax while the tensor cores work for the others: they take turns, in a fixed order, at issuing products. Thread
blocks stay on their multiprocessor and take one tile of queries after the other, loading ahead. Keys are walked from
the last block to the first, so that masks are needed at the start alone, and with a window at the end.

Supported: bfloat16 and float16, grouped heads, sliding windows, capped scores, packed sequences, any lengths, strides
that TMA takes, head dimensions up to 256 that are multiples of 8; others than 64, 128 and 256 are padded with zeros.
Above 128, `attention_hopper_bwd` has no backward pass for it: that is kernels/attention.py's, which reads the same
statistics.
"""

from typing import Any, NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._common import LOG2E, cdiv, multiprocessors
from ._hopper_loads import Buffers, key_blocks_of, load, next_stage
from ._hopper_schedule import FIELDS, SIZES, Packed, Work, heard, item, place, queries_at, steps
from ._hopper_scores import capped, exponentials, mask
from ._hopper_tiles import packed_tiles
from ._launch import launch
from .hopper import barriers, head_tiles, named_barrier_arrive, named_barrier_sync, tma_store

# Keys and values that a section of heads may hold: less than half the L2 cache, so that its tiles find them there.
SECTION_BYTES = 20 * 2**20


class Tiles(NamedTuple):
    """Keys of a block, blocks in the ring, and tiles of queries in shared memory: two, of which one is loaded ahead, or
    one."""

    keys: int
    stages: int
    queries: int


# By head dimension, rounded up. Of 256, an output takes 128 of the 240 registers that a thread may have.
TILES = {64: Tiles(128, 3, 2), 128: Tiles(128, 2, 2), 256: Tiles(64, 2, 1)}
FIRST_TURN: gl.constexpr = gl.constexpr(8)  # hardware barrier of the first warpgroup; those below are Triton's


@gluon.jit
def _issue_scores(q, buffers, stage, phase, W: gl.constexpr):
    """Start q k^T of a stage when it is this warpgroup's turn."""
    BLOCK_N: gl.constexpr = buffers.k.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=layout)
    mbarrier.wait(buffers.k_full.index(stage), phase)
    named_barrier_sync(FIRST_TURN + W, 256)
    return warpgroup_mma(q, buffers.k.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_output(p, acc, buffers, stage, phase):
    """Start acc + p v of a stage."""
    mbarrier.wait(buffers.v_full.index(stage), phase)
    return warpgroup_mma(p, buffers.v.index(stage), acc, is_async=True)


@gluon.jit
def _pass_turn(W: gl.constexpr, GROUPS: gl.constexpr):
    named_barrier_arrive(FIRST_TURN + (W + 1) % GROUPS, 256)


@gluon.jit
def _give_back(begin, end, buffers, stage, phase, W: gl.constexpr, GROUPS: gl.constexpr):
    """Let blocks pass that other warpgroups alone see, in turn; -> the ring's next stage."""
    for _ in range(begin, end):
        mbarrier.wait(buffers.k_full.index(stage), phase)
        mbarrier.arrive(buffers.k_empty.index(stage), count=1)
        mbarrier.wait(buffers.v_full.index(stage), phase)
        mbarrier.arrive(buffers.v_empty.index(stage), count=1)
        named_barrier_sync(FIRST_TURN + W, 256)
        _pass_turn(W, GROUPS)
        stage, phase = next_stage(stage, phase, buffers.k.shape[0])
    return stage, phase


@gluon.jit
def _attend(
    q, freed, step, buffers, stage, phase, blocks, last, window, cap, scale,
    W: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """64 queries over the key blocks end - 1, ..., begin < end -> output (not normalised), row maxima, row sums, and
    the ring's next stage. blocks: (begin, inner, full, end), of which those in [inner, full) need no mask. `last`: each
    row's last visible key. `freed`: barrier of the slot that the tile before leaves, if it is another one."""
    STAGES: gl.constexpr = buffers.k.shape[0]
    BLOCK_N: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    begin, inner, full, end = blocks
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s = _issue_scores(q, buffers, stage, phase, W)
    _pass_turn(W, GROUPS)
    if buffers.q.shape[0] > GROUPS:
        tma.store_wait(0)
        mbarrier.arrive(freed, count=1, pred=step > 0)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(buffers.k_empty.index(stage), count=1)
    if cap is not None:
        s = capped(s, cap)
    if window is not None or full < end:
        s = mask(s, last - (end - 1) * BLOCK_N, window)
    m = gl.full([64], -float("inf"), gl.float32, layout=last.type.layout)
    e, m, _ = exponentials(s, m, scale, True)
    total = gl.sum(e, 1)
    p = gl.convert_layout(e.to(q.dtype), p_layout)
    acc = gl.zeros([64, D], gl.float32, layout=o_layout)
    for i in range(1, end - begin):
        block = end - 1 - i
        before, before_phase = stage, phase
        stage, phase = next_stage(stage, phase, STAGES)
        s = _issue_scores(q, buffers, stage, phase, W)
        acc = _issue_output(p, acc, buffers, before, before_phase)
        _pass_turn(W, GROUPS)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(buffers.k_empty.index(stage), count=1)
        if cap is not None:
            s = capped(s, cap)
        if CAUSAL and (block >= full or (window is not None and block < inner)):
            s = mask(s, last - block * BLOCK_N, window)
        e, m, alpha = exponentials(s, m, scale, CAUSAL)
        total = total * alpha + gl.sum(e, 1)
        # ptxas moves this wait to before the exponentials. FlashAttention-3 has it after them; kept there by a branch,
        # it cost 1 to 10 % on an H200.
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(buffers.v_empty.index(before), count=1)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, o_layout))[:, None]
        # Only now: the product above reads p's registers until it is done.
        p = gl.convert_layout(e.to(q.dtype), p_layout)
    acc = _issue_output(p, acc, buffers, stage, phase)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(buffers.v_empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    return acc, m, total, stage, phase


@gluon.jit
def _compute_tile(
    outputs, buffers, work, b, h, tile, step, stage, phase, scale,
    W: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr,
):  # fmt: skip
    """Warpgroup W's 64 queries of a tile; -> the ring's next stage."""
    TILES: gl.constexpr = buffers.q.shape[0] // GROUPS
    BLOCK_N: gl.constexpr = buffers.k.shape[1]
    D: gl.constexpr = buffers.k.shape[2]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_desc, Max, Sum, all_queries = outputs
    row = tile * (64 * GROUPS)
    tile_begin, _, _, tile_end = key_blocks_of(row, 64 * GROUPS, work, BLOCK_N, CAUSAL)
    row += W * 64
    begin, inner, full, end = key_blocks_of(row, 64, work, BLOCK_N, CAUSAL)
    end = gl.where(row < work.n_queries, end, tile_begin)
    if work.window is not None:
        begin = gl.minimum(begin, end)
    rows = row + gl.arange(0, 64, layout=row_layout)
    last = gl.zeros_like(rows) + (work.n_keys - 1)
    if CAUSAL:
        last = gl.minimum(last, rows + (work.n_keys - work.n_queries))
    stage, phase = _give_back(end, tile_end, buffers, stage, phase, W, GROUPS)
    slot = step % TILES * GROUPS + W
    freed = buffers.q_empty.index((step + 1) % TILES * GROUPS + W)
    mbarrier.wait(buffers.q_full.index(slot), step // TILES % 2)
    acc = gl.zeros([64, D], gl.float32, layout=o_layout)
    m = gl.full([64], -float("inf"), gl.float32, layout=row_layout)
    total = gl.zeros([64], gl.float32, layout=row_layout)
    if end > begin:
        acc, m, total, stage, phase = _attend(
            buffers.q.index(slot), freed, step, buffers, stage, phase, (begin, inner, full, end), last,
            work.window, work.cap, scale, W, GROUPS, CAUSAL,
        )  # fmt: skip
    elif TILES == 2:
        tma.store_wait(0)  # the tile before has left its slot
        mbarrier.arrive(freed, count=1, pred=step > 0)
    if work.window is not None:
        stage, phase = _give_back(tile_begin, begin, buffers, stage, phase, W, GROUPS)
    at = (b * work.heads + h).to(gl.int64) * all_queries + rows
    if work.first_query is not None:
        at += work.first_query
    gl.store(Max + at, m, mask=rows < work.n_queries)
    gl.store(Sum + at, total, mask=rows < work.n_queries)
    norm = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, o_layout))
    buffers.q.index(slot).store((acc * norm[:, None]).to(o_desc.dtype))
    fence_async_shared()
    tma_store(o_desc, queries_at(b, h, row, work), buffers.q.index(slot))
    if TILES == 1:
        tma.store_wait(0)
        mbarrier.arrive(freed, count=1)
    return stage, phase


@gluon.jit
def _compute(
    outputs, buffers, work, packed, scale, W: gl.constexpr, GROUPS: gl.constexpr, CAUSAL: gl.constexpr
):  # fmt: skip
    """Warpgroup W: queries W * 64 to W * 64 + 63 of each tile."""
    stage = 0
    phase = 0
    if W == GROUPS - 1:
        _pass_turn(W, GROUPS)
    if packed.counter is None:
        for step in range(0, steps(work)):
            b, h, tile = place(item(step), work, CAUSAL)
            stage, phase = _compute_tile(
                outputs, buffers, work, b, h, tile, step, stage, phase, scale, W, GROUPS, CAUSAL
            )  # fmt: skip
    else:
        taken = 0
        mbarrier.wait(packed.told.index(0), 0)
        h = heard(packed, taken, 0)
        while h != -1:
            own = Work(
                work.heads, work.group, heard(packed, taken, 3), heard(packed, taken, 5), work.n_heads, work.n_tiles,
                work.section, work.window, work.cap, heard(packed, taken, 2), heard(packed, taken, 4),
            )  # fmt: skip
            tile = heard(packed, taken, 1)
            mbarrier.arrive(packed.read.index(taken % 2), count=1)
            stage, phase = _compute_tile(
                outputs, buffers, own, 0, h, tile, taken, stage, phase, scale, W, GROUPS, CAUSAL
            )  # fmt: skip
            taken += 1
            mbarrier.wait(packed.told.index(taken % 2), taken // 2 % 2)
            h = heard(packed, taken, 0)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def _attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, Max, Sum, QueryStarts, KeyStarts, Counter, sequences, query_places, heads, group,
    n_queries, n_keys, n_heads, section, window, cap, scale,
    CAUSAL: gl.constexpr, GROUPS: gl.constexpr, TILES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of (B, H, T, D) tensors, see `head_tiles`: tiles of Q and Out are (64, D), of K and V (BLOCK_N, D), D
    with its padding. Max, Sum: (B, heads, n_queries) fp32. QueryStarts, KeyStarts: (sequences + 1,) of packed ones, all
    in one batch; query_places: tiles of queries that these have places for; Counter: 0. Else None, as window and cap,
    that of scores before they are scaled, without. GROUPS, TILES, STAGES: see `Buffers`. Registers a thread are
    FlashAttention-3's."""
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_shape[-1]
    BLOCK_N: gl.constexpr = k_desc.block_shape[-2]
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, [TILES * GROUPS, 64, D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], layout),
        gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D], layout),
        barriers(TILES * GROUPS, 1),
        barriers(TILES * GROUPS, 1),
        barriers(STAGES, 1),
        barriers(STAGES, GROUPS),
        barriers(STAGES, 1),
        barriers(STAGES, GROUPS),
    )
    if QueryStarts is None:
        n_tiles = gl.cdiv(n_queries, 64 * GROUPS)
        packed = Packed(None, None, None, None, None, None, None)
    else:
        n_tiles = query_places
        numbers = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        packed = Packed(QueryStarts, KeyStarts, sequences, Counter, numbers, barriers(2, 1), barriers(2, GROUPS))
    fence_async_shared()
    work = Work(heads, group, n_queries, n_keys, n_heads, n_tiles, section, window, cap, None, None)
    scale *= LOG2E
    inputs = (q_desc, k_desc, v_desc)
    outputs = (o_desc, Max, Sum, n_queries)
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (outputs, buffers, work, packed, scale, 0, GROUPS, CAUSAL)),
                (_compute, (outputs, buffers, work, packed, scale, 1, GROUPS, CAUSAL)),
                (load, (inputs, buffers, work, packed, GROUPS, CAUSAL)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (outputs, buffers, work, packed, scale, 0, GROUPS, CAUSAL)),
                (_compute, (outputs, buffers, work, packed, scale, 1, GROUPS, CAUSAL)),
                (_compute, (outputs, buffers, work, packed, scale, 2, GROUPS, CAUSAL)),
                (load, (inputs, buffers, work, packed, GROUPS, CAUSAL)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def attention_hopper_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, causal: bool, scale: float,
    window: int | None = None, softcap: float = 0.0, packed: tuple[Tensor, Tensor, int, int] | None = None,
) -> None:  # fmt: skip
    """`attention_fwd` into `out` and `statistics`, for scale > 0. packed: `Packed` of kernels/attention.py.

    The third warpgroup pays where its rows are not wasted on short sequences: on an H200 from 2048 queries on. Capped
    scores leave it no registers.
    """
    batch, n_queries, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    block_d = 64 if head_dim <= 64 else 128 if head_dim <= 128 else 256
    tiles = TILES[block_d]
    starts: tuple[Any, ...] = (None, None, None, None)
    longest_q, longest_k = n_queries, k.shape[1]
    if packed is not None:
        starts = *packed[:2], torch.zeros(1, dtype=torch.int32, device=q.device), packed[0].shape[0] - 1
        longest_q, longest_k = n_queries // starts[3], packed[3]  # the queries on average
    groups = 3 if block_d == 64 and longest_q > 1024 and not softcap else 2
    places = None if packed is None else packed_tiles(n_queries, starts[3], 64 * groups)
    processors = multiprocessors(q.device)
    grid = min(processors, (places or cdiv(n_queries, 64 * groups)) * batch * heads)
    # Sections are multiples of a quarter of the processors: four (or eight, ...) tiles of each head fill whole rounds.
    section = max(1, processors // 4)
    section *= max(1, SECTION_BYTES * heads // (section * kv_heads * max(longest_k, 1) * head_dim * 4))
    section = min(section, batch * heads)
    tensors = ((q, 64), (k, tiles.keys), (v, tiles.keys), (out, 64))
    descriptors = tuple([head_tiles(x, rows, block_d, packed is not None) for x, rows in tensors])
    launch(
        _attention_hopper_fwd_kernel, (grid,),
        *statistics, *starts, places, heads, heads // kv_heads, n_queries, k.shape[1], batch * heads, section, window,
        softcap / scale if softcap else None, scale,
        descriptors=descriptors, CAUSAL=causal, GROUPS=groups, TILES=tiles.queries, STAGES=tiles.stages, num_warps=4,
    )  # fmt: skip
