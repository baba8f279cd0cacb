"""Attention forward for Hopper (sm_90), in Gluon: FlashAttention-3's division of labour (https://arxiv.org/abs/2407.08608).

One warp copies tiles into shared memory (TMA) while two or three warpgroups of 64 queries each multiply them (wgmma).
A warpgroup issues the scores of one block of keys and the output of the block before it together, then takes the
softmax while the tensor cores work for the others: they take turns, in a fixed order, at issuing products. Thread
blocks stay on their multiprocessor and take one tile of queries after the other, loading ahead. Keys are walked from
the last block to the first, so that masks are needed at the start alone.

Supported: bfloat16 and float16, grouped heads, any lengths, strides that TMA takes, head dimensions
up to 128 that are multiples of 8; others than 64 and 128 are padded with zeros.
"""

from typing import NamedTuple

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
from ._launch import launch
from .hopper import head_tiles, named_barrier_arrive, named_barrier_sync, tma_load, tma_store

SIZES = ("heads", "group", "n_queries", "n_keys", "n_heads", "section")
# Keys and values that a section of heads may hold: less than half the L2 cache, so that its tiles find them there.
SECTION_BYTES = 20 * 2**20
FIRST_TURN: gl.constexpr = gl.constexpr(8)  # hardware barrier of the first warpgroup; those below are Triton's


class Work(NamedTuple):
    """What is shared out: n_heads * n_tiles tiles of queries, n_heads counting all batches; see `_tile`."""

    heads: gl.tensor
    group: gl.tensor
    n_queries: gl.tensor
    n_keys: gl.tensor
    n_heads: gl.tensor
    n_tiles: gl.tensor
    section: gl.tensor


class Buffers(NamedTuple):
    """Shared memory. q: (2 * warpgroups, 1, 1, 64, D), two tiles of queries, in whose place their output is put to be
    stored; k, v: (stages, 1, 1, block, D), a ring. Each slot has a barrier for "loaded" and one for "free again"."""

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
def _item(step):
    """Number of the tile that this thread block takes in a step: forwards over the thread blocks in one step, backwards
    in the next, so that the one that gets the longest tile of a step gets the shortest after it."""
    n = gl.num_programs(0)
    p = gl.program_id(0)
    return step * n + gl.where(step % 2 == 1, n - 1 - p, p)


@gluon.jit
def _steps(work):
    """How many tiles this thread block takes: the last step may not reach it."""
    whole = work.n_heads * work.n_tiles // gl.num_programs(0)
    return whole + (_item(whole) < work.n_heads * work.n_tiles).to(gl.int32)


@gluon.jit
def _tile(step, work, CAUSAL: gl.constexpr):
    """(batch, head, tile) of a step. Causal: sections of heads whose keys fit the L2 cache together, in each the
    longest tiles of all its heads first; else head by head."""
    item = _item(step)
    if CAUSAL:
        first = item // (work.section * work.n_tiles) * work.section
        size = gl.minimum(work.section, work.n_heads - first)
        item -= first * work.n_tiles
        bh = first + item % size
        tile = work.n_tiles - 1 - item // size
    else:
        bh = item // work.n_tiles
        tile = item % work.n_tiles
    return bh // work.heads, bh % work.heads, tile


@gluon.jit
def _key_blocks(row, rows, work, BLOCK_N: gl.constexpr, CAUSAL: gl.constexpr):
    """(full, end): `rows` queries from `row` on all see the key blocks in [0, full), some those in [full, end)."""
    full = work.n_keys
    end = work.n_keys
    if CAUSAL:
        offset = work.n_keys - work.n_queries
        full = gl.minimum(work.n_keys, gl.maximum(row + 1 + offset, 0))
        end = gl.minimum(work.n_keys, gl.maximum(row + rows + offset, 0))
    return full // BLOCK_N, gl.cdiv(end, BLOCK_N)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    wrap = stage == STAGES - 1
    return gl.where(wrap, 0, stage + 1), gl.where(wrap, phase ^ 1, phase)


@gluon.jit
def _load(q_desc, k_desc, v_desc, buffers, work, CAUSAL: gl.constexpr):
    """The loading warp: queries, and blocks of keys and values from last to first, of each tile."""
    GROUPS: gl.constexpr = buffers.q.shape[0] // 2
    STAGES: gl.constexpr = buffers.k.shape[0]
    BLOCK_N: gl.constexpr = buffers.k.shape[3]
    D: gl.constexpr = buffers.k.shape[4]
    stage = 0
    phase = 1
    for step in range(0, _steps(work)):
        b, h, tile = _tile(step, work, CAUSAL)
        row = tile * (64 * GROUPS)
        for w in gl.static_range(GROUPS):
            slot = step % 2 * GROUPS + w
            mbarrier.wait(buffers.q_empty.index(slot), step // 2 % 2 ^ 1)
            mbarrier.expect(buffers.q_full.index(slot), 64 * D * 2)
            tma_load(q_desc, [b, h, row + w * 64, 0], buffers.q_full.index(slot), buffers.q.index(slot))
        full, end = _key_blocks(row, 64 * GROUPS, work, BLOCK_N, CAUSAL)
        for i in range(0, end):
            at = [b, h // work.group, (end - 1 - i) * BLOCK_N, 0]
            mbarrier.wait(buffers.k_empty.index(stage), phase)
            mbarrier.expect(buffers.k_full.index(stage), BLOCK_N * D * 2)
            tma_load(k_desc, at, buffers.k_full.index(stage), buffers.k.index(stage))
            mbarrier.wait(buffers.v_empty.index(stage), phase)
            mbarrier.expect(buffers.v_full.index(stage), BLOCK_N * D * 2)
            tma_load(v_desc, at, buffers.v_full.index(stage), buffers.v.index(stage))
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _issue_scores(q, buffers, stage, phase, W: gl.constexpr):
    """Start q k^T of a stage when it is this warpgroup's turn."""
    BLOCK_N: gl.constexpr = buffers.k.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    zeros = gl.zeros([64, BLOCK_N], gl.float32, layout=layout)
    mbarrier.wait(buffers.k_full.index(stage), phase)
    named_barrier_sync(FIRST_TURN + W, 256)
    k = buffers.k.index(stage).reshape([BLOCK_N, q.shape[1]])
    return warpgroup_mma(q, k.permute([1, 0]), zeros, use_acc=False, is_async=True)


@gluon.jit
def _issue_output(p, acc, buffers, stage, phase):
    """Start acc + p v of a stage."""
    mbarrier.wait(buffers.v_full.index(stage), phase)
    return warpgroup_mma(p, buffers.v.index(stage).reshape([p.shape[1], acc.shape[1]]), acc, is_async=True)


@gluon.jit
def _pass_turn(buffers, W: gl.constexpr):
    named_barrier_arrive(FIRST_TURN + (W + 1) % (buffers.q.shape[0] // 2), 256)


@gluon.jit
def _mask(s, last):
    """Scores with -inf in the columns after `last` of each row."""
    col = gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, s.type.layout))
    return gl.where(col[None, :] <= last[:, None], s, -float("inf"))


@gluon.jit
def _exponentials(s, m, scale, CAUSAL: gl.constexpr):
    """e^(s - new maximum), the new maximum, and the factor for sums up to now; `scale` includes log2 e."""
    m_new = gl.maximum(m, gl.max(s, 1))
    # A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its exponentials 0, not NaN.
    base = (gl.where(m_new == -float("inf"), 0.0, m_new) if CAUSAL else m_new) * scale
    return gl.exp2(s * scale - base[:, None]), m_new, gl.exp2(m * scale - base)


@gluon.jit
def _attend(q, freed, step, buffers, stage, phase, full, end, last, scale, W: gl.constexpr, CAUSAL: gl.constexpr):
    """64 queries over the key blocks end - 1, ..., 0, end > 0 -> output (not normalised), row maxima, row sums, and the
    ring's next stage. `last`: each row's last visible key. `freed`: barrier of the slot that the tile before leaves."""
    STAGES: gl.constexpr = buffers.k.shape[0]
    BLOCK_N: gl.constexpr = buffers.k.shape[3]
    D: gl.constexpr = buffers.k.shape[4]
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s = _issue_scores(q, buffers, stage, phase, W)
    _pass_turn(buffers, W)
    tma.store_wait(0)
    mbarrier.arrive(freed, count=1, pred=step > 0)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(buffers.k_empty.index(stage), count=1)
    if full < end:
        s = _mask(s, last - (end - 1) * BLOCK_N)
    m = gl.full([64], -float("inf"), gl.float32, layout=last.type.layout)
    e, m, _ = _exponentials(s, m, scale, True)
    total = gl.sum(e, 1)
    p = gl.convert_layout(e.to(q.dtype), p_layout)
    acc = gl.zeros([64, D], gl.float32, layout=o_layout)
    for i in range(1, end):
        block = end - 1 - i
        before, before_phase = stage, phase
        stage, phase = _next(stage, phase, STAGES)
        s = _issue_scores(q, buffers, stage, phase, W)
        acc = _issue_output(p, acc, buffers, before, before_phase)
        _pass_turn(buffers, W)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(buffers.k_empty.index(stage), count=1)
        if CAUSAL and block >= full:
            s = _mask(s, last - block * BLOCK_N)
        e, m, alpha = _exponentials(s, m, scale, CAUSAL)
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
    stage, phase = _next(stage, phase, STAGES)
    return acc, m, total, stage, phase


@gluon.jit
def _compute(o_desc, Max, Sum, buffers, work, scale, W: gl.constexpr, CAUSAL: gl.constexpr):
    """Warpgroup W: queries W * 64 to W * 64 + 63 of each tile."""
    GROUPS: gl.constexpr = buffers.q.shape[0] // 2
    STAGES: gl.constexpr = buffers.k.shape[0]
    BLOCK_N: gl.constexpr = buffers.k.shape[3]
    D: gl.constexpr = buffers.k.shape[4]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    stage = 0
    phase = 0
    if W == GROUPS - 1:
        _pass_turn(buffers, W)
    for step in range(0, _steps(work)):
        b, h, tile = _tile(step, work, CAUSAL)
        row = tile * (64 * GROUPS)
        unused, tile_end = _key_blocks(row, 64 * GROUPS, work, BLOCK_N, CAUSAL)
        row += W * 64
        full, end = _key_blocks(row, 64, work, BLOCK_N, CAUSAL)
        end = gl.where(row < work.n_queries, end, 0)
        rows = row + gl.arange(0, 64, layout=row_layout)
        last = gl.zeros_like(rows) + (work.n_keys - 1)
        if CAUSAL:
            last = gl.minimum(last, rows + (work.n_keys - work.n_queries))
        for _ in range(end, tile_end):  # seen by other warpgroups alone: give them back, in turn
            mbarrier.wait(buffers.k_full.index(stage), phase)
            mbarrier.arrive(buffers.k_empty.index(stage), count=1)
            mbarrier.wait(buffers.v_full.index(stage), phase)
            mbarrier.arrive(buffers.v_empty.index(stage), count=1)
            named_barrier_sync(FIRST_TURN + W, 256)
            _pass_turn(buffers, W)
            stage, phase = _next(stage, phase, STAGES)
        slot = step % 2 * GROUPS + W
        freed = buffers.q_empty.index((step + 1) % 2 * GROUPS + W)
        mbarrier.wait(buffers.q_full.index(slot), step // 2 % 2)
        acc = gl.zeros([64, D], gl.float32, layout=o_layout)
        m = gl.full([64], -float("inf"), gl.float32, layout=row_layout)
        total = gl.zeros([64], gl.float32, layout=row_layout)
        if end > 0:
            q = buffers.q.index(slot).reshape([64, D])
            acc, m, total, stage, phase = _attend(
                q, freed, step, buffers, stage, phase, full, end, last, scale, W, CAUSAL
            )
        else:
            tma.store_wait(0)  # the tile before has left its slot
            mbarrier.arrive(freed, count=1, pred=step > 0)
        at = (b * work.heads + h).to(gl.int64) * work.n_queries + rows
        gl.store(Max + at, m, mask=rows < work.n_queries)
        gl.store(Sum + at, total, mask=rows < work.n_queries)
        norm = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, o_layout))
        buffers.q.index(slot).reshape([64, D]).store((acc * norm[:, None]).to(o_desc.dtype))
        fence_async_shared()
        tma_store(o_desc, [b, h, row, 0], buffers.q.index(slot))
    tma.store_wait(0)


@gluon.jit
def _barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit(do_not_specialize=SIZES)
def _attention_hopper_fwd_kernel(
    q_desc, k_desc, v_desc, o_desc, Max, Sum, heads, group, n_queries, n_keys, n_heads, section, scale,
    CAUSAL: gl.constexpr, GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Descriptors of (B, H, T, D) tensors, see `head_tiles`: tiles of Q and Out are (64, D), of K and V (BLOCK_N, D), D
    with its padding. Max, Sum: (B, heads, n_queries) fp32. Registers a thread are FlashAttention-3's."""
    dtype: gl.constexpr = q_desc.dtype
    D: gl.constexpr = q_desc.block_shape[3]
    BLOCK_N: gl.constexpr = k_desc.block_shape[2]
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, [2 * GROUPS, 1, 1, 64, D], q_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout),
        _barriers(2 * GROUPS, 1),
        _barriers(2 * GROUPS, 1),
        _barriers(STAGES, 1),
        _barriers(STAGES, GROUPS),
        _barriers(STAGES, 1),
        _barriers(STAGES, GROUPS),
    )
    fence_async_shared()
    work = Work(heads, group, n_queries, n_keys, n_heads, gl.cdiv(n_queries, 64 * GROUPS), section)
    scale *= LOG2E
    if GROUPS == 2:
        gl.warp_specialize(
            [
                (_compute, (o_desc, Max, Sum, buffers, work, scale, 0, CAUSAL)),
                (_compute, (o_desc, Max, Sum, buffers, work, scale, 1, CAUSAL)),
                (_load, (q_desc, k_desc, v_desc, buffers, work, CAUSAL)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_compute, (o_desc, Max, Sum, buffers, work, scale, 0, CAUSAL)),
                (_compute, (o_desc, Max, Sum, buffers, work, scale, 1, CAUSAL)),
                (_compute, (o_desc, Max, Sum, buffers, work, scale, 2, CAUSAL)),
                (_load, (q_desc, k_desc, v_desc, buffers, work, CAUSAL)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )


def attention_hopper_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, causal: bool, scale: float
) -> None:
    """`attention_fwd` into `out` and `statistics`, for scale > 0.

    The third warpgroup pays where its rows are not wasted on short sequences: on an H200 from 2048 queries on.
    """
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1], k.shape[2]
    block_d = 64 if head_dim <= 64 else 128
    groups, stages = (3 if block_d == 64 and n_queries > 1024 else 2), (3 if block_d == 64 else 2)
    processors = multiprocessors(q.device)
    grid = min(processors, cdiv(n_queries, 64 * groups) * batch * heads)
    # Sections are multiples of a quarter of the processors: four (or eight, ...) tiles of each head fill whole rounds.
    section = max(1, processors // 4)
    section *= max(1, SECTION_BYTES * heads // (section * kv_heads * n_keys * head_dim * 4))
    section = min(section, batch * heads)
    launch(
        _attention_hopper_fwd_kernel, (grid,),
        head_tiles(q, 64, block_d), head_tiles(k, 128, block_d), head_tiles(v, 128, block_d),
        head_tiles(out, 64, block_d), *statistics, heads, heads // kv_heads, n_queries, n_keys, batch * heads, section,
        scale, CAUSAL=causal, GROUPS=groups, STAGES=stages, num_warps=4,
    )  # fmt: skip
