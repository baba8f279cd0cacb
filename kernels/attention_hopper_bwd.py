"""Attention's backward pass for Hopper (sm_90), in Gluon, after FlashAttention-3 (https://arxiv.org/abs/2407.08608).

A program owns 128 keys and walks the queries that see them. One warp loads tiles of Q and dO ahead; two warpgroups own
64 keys each and keep their dK and dV in registers; two more warps add the tiles' dQ to global memory in float32, from
which a last kernel makes dQ in the tensors' dtype. Scores are computed transposed, keys by queries, so that P^T and
dS^T multiply dO and Q straight from registers; only dS passes through shared memory, for dQ = dS K over all 128 keys.
A query tile's key tiles are added in a fixed order, so that all gradients are bitwise repeatable. This costs waiting,
but the first tile is stored, not added, and no zeros need be written: in all it is no slower than adding at will.
With a window a program walks the queries that see one of its keys; of packed sequences, those of its own.
Not supported, but by kernels/attention.py: types other than bfloat16 and float16, head dimensions above 128 or not
multiples of 8, tensors that TMA cannot address.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._common import LOG2E, cdiv, gradients_like, multiprocessors
from ._hopper_schedule import (
    SIZES,
    Sizes,
    end_turn,
    keys_at,
    next_tile,
    part,
    queries_at,
    side_by_side,
    stored,
    wait_turn,
)
from ._hopper_scores import HIDDEN, masked, of_capped
from ._hopper_tiles import KEYS, first_tile, packed_tiles, rows_of, tile_at, turn
from ._launch import launch
from .attention_hopper_dq import _attention_hopper_dq_kernel, _attention_hopper_rows_kernel
from .hopper import (
    head_tiles,
    named_barrier_arrive,
    named_barrier_sync,
    plain_tiles,
    reciprocal,
    tma_load,
    tma_readable,
    tma_reduce_add,
    tma_store,
)

HALF = gl.constexpr(64)  # a warpgroup's share of the KEYS of a program, and both sides of its part of a tile of dQ
TILE_QUERIES = {64: 128, 128: 64}  # in a tile, by head dimension rounded up: as many as registers hold
# Hardware barriers. Both warpgroups have stored dS:
DS_STORED = gl.constexpr(8)
# Warpgroup w has stored its part of dQ in step i, for adding warp i % 2: this one + 2 (i % 2) + w.
DQ_STORED = gl.constexpr(9)


@gluon.jit
def _load_warp(inputs, smem, bars, sizes, CAUSAL: gl.constexpr, BLOCK_D: gl.constexpr, QUERIES: gl.constexpr):
    """Load the program's K and V, and tile by tile Q with its rows' Base and Delta, and dO."""
    q_desc, k_desc, v_desc, dout_desc, rows_desc = inputs
    q_smem, k_smem, v_smem, dout_smem, rows_smem, _, _ = smem
    k_full, v_full, q_full, dout_full, empty, _ = bars
    bh, key_tile, first, end, steps, _ = part(sizes, CAUSAL, QUERIES)
    kv_heads, group = sizes.kv_heads, sizes.group
    b, kv_head = bh // kv_heads, bh % kv_heads
    mbarrier.expect(k_full, 2 * KEYS * BLOCK_D)
    for w in gl.static_range(2):
        tma_load(k_desc, keys_at(b, kv_head, key_tile * KEYS + w * HALF, sizes), k_full, k_smem.index(w))
    tile, head = first, kv_head * group
    for i in range(steps):
        stage = i % 2
        mbarrier.wait(empty.index(stage), (i // 2 + 1) & 1)
        full = q_full.index(stage)
        mbarrier.expect(full, 2 * QUERIES * BLOCK_D + 8 * QUERIES)
        tma_load(q_desc, queries_at(b, head, tile * QUERIES, sizes), full, q_smem.index(stage))
        row = stored(b * kv_heads * group + head, tile, sizes, QUERIES) * (2 * QUERIES)
        tma_load(rows_desc, [row], full, rows_smem.index(stage))
        if i == 0:
            mbarrier.expect(v_full, 2 * KEYS * BLOCK_D)
            for w in gl.static_range(2):
                tma_load(v_desc, keys_at(b, kv_head, key_tile * KEYS + w * HALF, sizes), v_full, v_smem.index(w))
        full = dout_full.index(stage)
        mbarrier.expect(full, 2 * QUERIES * BLOCK_D)
        tma_load(dout_desc, queries_at(b, head, tile * QUERIES, sizes), full, dout_smem.index(stage))
        tile, head = next_tile(tile, head, first, end)


@gluon.jit
def _add_warp(sums_desc, turns, smem, bars, sizes, PARITY: gl.constexpr, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """Add dQ of every second step to global memory when it is this key tile's turn. One warp for all steps would hold
    up the others: to wait for a turn and to pass it on takes about as long as a step."""
    dq_smem, dq_empty = smem[6], bars[5]
    bh, key_tile, first, end, steps, seen = part(sizes, CAUSAL, QUERIES)
    MAYBE_SEEN: gl.constexpr = sizes.key_tile is not None or sizes.window is not None
    tile, head = first, bh * sizes.group
    if PARITY == 1:
        tile, head = next_tile(tile, head, first, end)
    for _ in range(PARITY, steps, 2):
        block = stored(head, tile, sizes, QUERIES)
        number = key_tile
        if not MAYBE_SEEN or seen:
            number = turn(tile, key_tile, sizes.n_queries, sizes.n_keys, QUERIES, CAUSAL)
        else:
            number = -1
        if not MAYBE_SEEN or number >= 0:
            wait_turn(turns + block, number)
        for w in gl.static_range(2):
            named_barrier_sync(DQ_STORED + 2 * PARITY + w, 160)
            if number == 0:
                tma_store(sums_desc, [(2 * block + w) * HALF, 0], dq_smem.index(w))
            elif not MAYBE_SEEN or number > 0:
                tma_reduce_add(sums_desc, [(2 * block + w) * HALF, 0], dq_smem.index(w))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty, count=1)
        if not MAYBE_SEEN or number >= 0:
            end_turn(turns + block)
        tile, head = next_tile(tile, head, first, end)
        tile, head = next_tile(tile, head, first, end)


@gluon.jit
def _dq_product(ds0, ds1, k0, k1, W: gl.constexpr, BLOCK_D: gl.constexpr):
    """Start warpgroup W's (64, 64) of dS K over both warpgroups' keys: half of 128 queries, or of 128 columns."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    if BLOCK_D == 64:
        ds0, ds1 = ds0.slice(HALF * W, HALF, 1), ds1.slice(HALF * W, HALF, 1)
    else:
        k0, k1 = k0.slice(HALF * W, HALF, 1), k1.slice(HALF * W, HALF, 1)
    zero = gl.zeros([HALF, HALF], gl.float32, layout=layout)
    dq = warpgroup_mma(ds0.permute([1, 0]), k0, zero, use_acc=False, is_async=True)
    return warpgroup_mma(ds1.permute([1, 0]), k1, dq, is_async=True)


@gluon.jit
def _arranged(dq):
    """A warpgroup's (64, 64) of dQ in the order in which it is added up: four elements that a thread holds lie
    together, and eight threads' fill all banks of shared memory. `_restored` is the inverse."""
    # Row: warp, half, 4 and 2 of lane / 4. Column: 2 and 4 groups of 8, lane % 4, pair.
    return dq.reshape([4, 2, 4, 2, 2, 4, 4, 2]).permute([5, 0, 2, 4, 3, 6, 1, 7]).reshape([HALF, HALF])


@gluon.jit
def _mma_warpgroup(
    dk_desc, dv_desc, smem, bars, sizes, cap, scale,
    W: gl.constexpr, CAUSAL: gl.constexpr, BLOCK_D: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 64 keys, and this warpgroup's part of each tile of dQ.

    Products are started as soon as their operands are there, and waited for as late as registers allow: the tensor
    cores have S, dP and dV to do during the exponentials, dV and dK during dS, the next S while dQ is stored.
    """
    q_smem, k_smem, v_smem, dout_smem, rows_smem, ds_smem, dq_smem = smem
    k_full, v_full, q_full, dout_full, empty, dq_empty = bars
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, QUERIES, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, dk_layout, 2)
    dtype: gl.constexpr = q_smem.dtype
    LATE: gl.constexpr = cap is not None and BLOCK_D == 64  # the cap's exponentials leave no registers for dP
    bh, key_tile, first, end, steps, _ = part(sizes, CAUSAL, QUERIES)
    kv_heads, n_queries, n_keys, window = sizes.kv_heads, sizes.n_queries, sizes.n_keys, sizes.window
    n0, tile = key_tile * KEYS, first
    k, v = k_smem.index(W), v_smem.index(W)
    dk = gl.zeros([HALF, BLOCK_D], gl.float32, layout=dk_layout)
    dv = gl.zeros([HALF, BLOCK_D], gl.float32, layout=dk_layout)
    zero = gl.zeros([HALF, QUERIES], gl.float32, layout=s_layout)
    log2_scale = scale * LOG2E
    mbarrier.wait(k_full, 0)
    mbarrier.wait(q_full.index(0), 0)
    s = warpgroup_mma(k, q_smem.index(0).permute([1, 0]), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_full, 0)
    s = warpgroup_mma_wait(0, deps=[s])
    for i in range(steps):
        stage, following = i % 2, (i + 1) % 2
        q, dout, rows = q_smem.index(stage), dout_smem.index(stage), rows_smem.index(stage)
        mbarrier.wait(dout_full.index(stage), (i // 2) & 1)
        dp = zero
        if not LATE:
            dp = warpgroup_mma(v, dout.permute([1, 0]), zero, use_acc=False, is_async=True)
        if cap is None:
            base = rows.slice(0, QUERIES).load(gl.SliceLayout(0, s_layout))
            p = gl.exp2(s * log2_scale - base[None, :])
        else:
            p = reciprocal(1.0 + gl.exp2(s * (2.0 * log2_scale / cap)))
        m0 = tile * QUERIES
        edge = n0 + KEYS > n_keys
        if CAUSAL:
            edge = edge or n0 + KEYS - 1 > m0 + n_keys - n_queries
            if window is not None:
                edge = edge or n0 + window < m0 + QUERIES + n_keys - n_queries
        if edge:
            p = masked(p, 0.0 if cap is None else HIDDEN, n0 + W * HALF, m0, n_queries, n_keys, window, CAUSAL)
        slope = p
        if cap is not None:
            base = rows.slice(0, QUERIES).load(gl.SliceLayout(0, s_layout))
            slope, p = of_capped(p, base, cap)
        if LATE:
            dp = warpgroup_mma(v, dout.permute([1, 0]), zero, use_acc=False, is_async=True)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        dv = warpgroup_mma(p16, dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = rows.slice(QUERIES, QUERIES).load(gl.SliceLayout(0, s_layout))
        ds = (slope * (dp - delta[None, :])).to(dtype)
        ds16 = gl.convert_layout(ds, p_layout)
        dk = warpgroup_mma(ds16, q, dk, is_async=True)
        # What is overwritten here, of the step before last, the other warpgroup has read before the last barrier.
        ds_smem.index(2 * stage + W).store(ds)
        fence_async_shared()
        named_barrier_sync(DS_STORED, 256)
        dq = _dq_product(
            ds_smem.index(2 * stage), ds_smem.index(2 * stage + 1), k_smem.index(0), k_smem.index(1), W, BLOCK_D
        )
        dv, dk, p16, ds16 = warpgroup_mma_wait(2, deps=[dv, dk, p16, ds16])
        mbarrier.arrive(empty.index(stage), count=1)
        # After the last tile these scores are of no use: left out under a condition, all products would be serialized.
        mbarrier.wait(q_full.index(following), ((i + 1) // 2) & 1, pred=i + 1 < steps)
        s = warpgroup_mma(k, q_smem.index(following).permute([1, 0]), zero, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        mbarrier.wait(dq_empty, (i & 1) ^ 1)
        dq_smem.index(W).store(_arranged(dq))
        fence_async_shared()
        if stage == 0:
            named_barrier_arrive(DQ_STORED + W, 160)
        else:
            named_barrier_arrive(DQ_STORED + 2 + W, 160)
        s = warpgroup_mma_wait(0, deps=[s])
        tile = gl.where(tile + 1 == end, first, tile + 1)
    place = keys_at(bh // kv_heads, bh % kv_heads, n0 + W * HALF, sizes)
    v.store(dv.to(dtype))
    fence_async_shared()
    tma_store(dv_desc, place, v)
    named_barrier_sync(DS_STORED, 256)  # the other warpgroup has read these keys for its last dQ
    k.store((dk * scale).to(dtype))
    fence_async_shared()
    tma_store(dk_desc, place, k)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=SIZES)
def _attention_hopper_bwd_kernel(
    q_desc, k_desc, v_desc, dout_desc, rows_desc, sums_desc, dk_desc, dv_desc, turns,
    QueryStarts, KeyStarts, sequences, query_places, key_places, kv_heads, group, n_queries, n_keys, width, window,
    cap, scale, CAUSAL: gl.constexpr, BLOCK_D: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Descriptors of q, dout (B, n_queries, heads, D) and k, v, dk, dv (B, n_keys, kv_heads, D); of what
    `_attention_hopper_rows_kernel` writes; of the sums of dQ, two (64, 64) as `_arranged` for each tile. QueryStarts,
    KeyStarts: (sequences + 1,) of packed ones, and how many tiles these have places for, else None; window: None
    without."""
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, QUERIES, BLOCK_D], layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], layout)
    dout_smem = gl.allocate_shared_memory(dtype, [2, QUERIES, BLOCK_D], layout)
    rows_smem = gl.allocate_shared_memory(gl.float32, [2, 2 * QUERIES], rows_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [4, HALF, QUERIES], layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], sums_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    dout_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    dq_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    for one in gl.static_range(2):
        mbarrier.init(q_full.index(one), count=1)
        mbarrier.init(dout_full.index(one), count=1)
        mbarrier.init(empty.index(one), count=2)
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(dq_empty, count=1)
    fence_async_shared()
    smem = (q_smem, k_smem, v_smem, dout_smem, rows_smem, ds_smem, dq_smem)
    bars = (k_full, v_full, q_full, dout_full, empty, dq_empty)
    if QueryStarts is None:
        sizes = Sizes(kv_heads, group, n_queries, n_keys, width, window, None, None, None, None, None, None)
    else:
        first_head, place, beside, number = side_by_side(key_places, width, CAUSAL)
        sequence, key_tile = tile_at(KeyStarts, number, sequences, KEYS)
        first_query, length = rows_of(QueryStarts, sequence)
        first_key, keys = rows_of(KeyStarts, sequence)
        sizes = Sizes(
            kv_heads, group, length, keys, width, window, first_query, first_key, query_places,
            first_tile(QueryStarts, sequence, QUERIES), first_head + place % beside, key_tile,
        )  # fmt: skip
    inputs = (q_desc, k_desc, v_desc, dout_desc, rows_desc)
    gl.warp_specialize(
        [
            (_mma_warpgroup, (dk_desc, dv_desc, smem, bars, sizes, cap, scale, 0, CAUSAL, BLOCK_D, QUERIES)),
            (_mma_warpgroup, (dk_desc, dv_desc, smem, bars, sizes, cap, scale, 1, CAUSAL, BLOCK_D, QUERIES)),
            (_load_warp, (inputs, smem, bars, sizes, CAUSAL, BLOCK_D, QUERIES)),
            (_add_warp, (sums_desc, turns, smem, bars, sizes, 0, CAUSAL, QUERIES)),
            (_add_warp, (sums_desc, turns, smem, bars, sizes, 1, CAUSAL, QUERIES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )


def attention_hopper_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, causal: bool, scale: float,
    window: int | None = None, softcap: float = 0.0, packed: tuple[Tensor, Tensor, int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`attention_bwd` of kernels/attention.py, for any scale. packed: its `Packed`. It needs memory for dq in float32,
    in whole tiles."""
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1], k.shape[2]
    block_d = 64 if head_dim <= 64 else 128
    queries = TILE_QUERIES[block_d]
    dout = dout if tma_readable(dout) else dout.contiguous()
    dq, dk, dv = gradients_like(q, k, v)
    if packed is None:
        starts, places = (None, None, None), (None, None)
        tiles, key_tiles = cdiv(n_queries, queries), cdiv(n_keys, KEYS.value)
    else:
        starts = *packed[:2], packed[0].shape[0] - 1
        tiles, key_tiles = packed_tiles(n_queries, starts[2], queries), packed_tiles(n_keys, starts[2], KEYS.value)
        places = tiles, key_tiles
    tiles *= batch * heads
    rows = torch.empty(tiles * 2 * queries, dtype=torch.float32, device=q.device)
    turns = torch.empty(tiles, dtype=torch.int32, device=q.device)
    sums = torch.empty((tiles * 128, 64), dtype=torch.float32, device=q.device)
    launch(
        _attention_hopper_rows_kernel, (tiles,),
        dout, out, *statistics, rows, turns, starts[0], starts[2], places[0], *dout.stride()[:3], *out.stride()[:3],
        heads, n_queries, abs(scale), D=head_dim, BLOCK_D=block_d, QUERIES=queries, num_warps=8,
    )  # fmt: skip
    tile, key_tile = (queries, block_d, packed is not None), (64, block_d, packed is not None)
    descriptors = (
        head_tiles(q, *tile), head_tiles(k, *key_tile), head_tiles(v, *key_tile), head_tiles(dout, *tile),
        plain_tiles(rows, (2 * queries,), 0), plain_tiles(sums, (64, 64), 128),
        head_tiles(dk, *key_tile), head_tiles(dv, *key_tile),
    )  # fmt: skip
    launch(
        _attention_hopper_bwd_kernel, (key_tiles * batch * kv_heads,),
        turns, *starts, *places, kv_heads, heads // kv_heads, n_queries, n_keys,
        max(1, multiprocessors(q.device) // key_tiles), window, softcap or None, scale,
        descriptors=descriptors, CAUSAL=causal, BLOCK_D=block_d, QUERIES=queries, num_warps=4,
    )  # fmt: skip
    launch(
        _attention_hopper_dq_kernel, (tiles * 2,),
        sums, dq, *starts, places[0], *dq.stride()[:2], heads, n_queries, n_keys, scale,
        CAUSAL=causal, D=head_dim, BLOCK_D=block_d, QUERIES=queries, num_warps=8,
    )  # fmt: skip
    return dq, dk, dv
