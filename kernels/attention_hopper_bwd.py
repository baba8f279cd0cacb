"""Attention's backward pass for Hopper (sm_90), in Gluon, after FlashAttention-3 (https://arxiv.org/abs/2407.08608).

A program owns 128 keys and walks the queries that see them. One warp loads tiles of Q and dO ahead; two warpgroups own
64 keys each and keep their dK and dV in registers; two more warps add the tiles' dQ to global memory in float32, from
which a last kernel makes dQ in the tensors' dtype. Scores are computed transposed, keys by queries, so that P^T and
dS^T multiply dO and Q straight from registers; only dS passes through shared memory, for dQ = dS K over all 128 keys.
A query tile's key tiles are added in a fixed order, so that all gradients are bitwise repeatable. This costs waiting,
but the first tile is stored, not added, and no zeros need be written: in all it is no slower than adding at will.
Not supported, but by kernels/attention.py: types other than bfloat16 and float16, head dimensions above 128 or not
multiples of 8, tensors that TMA cannot address.
"""

import torch
import triton
import triton.language as tl
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._common import LOG2E, cdiv, gradients_like, multiprocessors
from ._launch import launch
from .hopper import (
    head_tiles,
    named_barrier_arrive,
    named_barrier_sync,
    tma_load,
    tma_readable,
    tma_reduce_add,
    tma_store,
)

KEYS = gl.constexpr(128)  # of a program
HALF = gl.constexpr(64)  # a warpgroup's share of them, and both sides of its part of a tile of dQ
TILE_QUERIES = {64: 128, 128: 64}  # in a tile, by head dimension rounded up: as many as registers hold
# Hardware barriers. Both warpgroups have stored dS:
DS_STORED = gl.constexpr(8)
# Warpgroup w has stored its part of dQ in step i, for adding warp i % 2: this one + 2 (i % 2) + w.
DQ_STORED = gl.constexpr(9)
SIZES = ("heads", "kv_heads", "group", "n_queries", "n_keys", "width")


@gluon.jit
def _work(sizes, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """This program's part: batch and key head, key tile, the first query tile that sees a key of it, the number of
    query tiles that there are, and its number of steps over the tiles of all heads of the group.

    A key tile's dQ is added after that of programs earlier in the grid, and those start earlier: what a program waits
    for is always running. `width` heads run side by side, because tiles of one head follow each other at a distance.
    Causal key tiles start with the last: if they start together, each comes to a query tile when the next has left it.
    """
    kv_heads, group, n_queries, n_keys, width = sizes
    key_tiles = gl.cdiv(n_keys, KEYS)
    tiles = gl.cdiv(n_queries, QUERIES)
    first_head = gl.program_id(0) // (width * key_tiles) * width
    width = gl.minimum(width, gl.num_programs(0) // key_tiles - first_head)
    place = gl.program_id(0) - first_head * key_tiles
    key_tile = place // width
    first = 0
    if CAUSAL:
        key_tile = key_tiles - 1 - key_tile
        first = gl.maximum(key_tile * KEYS + n_queries - n_keys, 0) // QUERIES
    # The last query sees every key: there is always a step. Told so, the compiler needs fewer registers.
    steps = gl.maximum(group * (tiles - first), 1)
    return first_head + place % width, key_tile, first, tiles, steps


@gluon.jit
def _next(tile, head, first, tiles):
    """The query tile after this one, in the same head or the group's next."""
    last = tile + 1 == tiles
    return gl.where(last, first, tile + 1), gl.where(last, head + 1, head)


@gluon.jit
def _load_warp(inputs, smem, bars, sizes, CAUSAL: gl.constexpr, BLOCK_D: gl.constexpr, QUERIES: gl.constexpr):
    """Load the program's K and V, and tile by tile Q with its rows' Base and Delta, and dO."""
    q_desc, k_desc, v_desc, dout_desc, rows_desc = inputs
    q_smem, k_smem, v_smem, dout_smem, rows_smem, _, _ = smem
    k_full, v_full, q_full, dout_full, empty, _ = bars
    bh, key_tile, first, tiles, steps = _work(sizes, CAUSAL, QUERIES)
    kv_heads, group, _, _, _ = sizes
    b, kv_head = bh // kv_heads, bh % kv_heads
    mbarrier.expect(k_full, 2 * KEYS * BLOCK_D)
    for w in gl.static_range(2):
        tma_load(k_desc, [b, kv_head, key_tile * KEYS + w * HALF, 0], k_full, k_smem.index(w))
    tile, head = first, kv_head * group
    for i in range(steps):
        stage = i % 2
        mbarrier.wait(empty.index(stage), (i // 2 + 1) & 1)
        full = q_full.index(stage)
        mbarrier.expect(full, 2 * QUERIES * BLOCK_D + 8 * QUERIES)
        tma_load(q_desc, [b, head, tile * QUERIES, 0], full, q_smem.index(stage))
        row = ((b * kv_heads * group + head) * tiles + tile) * (2 * QUERIES)
        tma_load(rows_desc, [row], full, rows_smem.index(stage))
        if i == 0:
            mbarrier.expect(v_full, 2 * KEYS * BLOCK_D)
            for w in gl.static_range(2):
                tma_load(v_desc, [b, kv_head, key_tile * KEYS + w * HALF, 0], v_full, v_smem.index(w))
        full = dout_full.index(stage)
        mbarrier.expect(full, 2 * QUERIES * BLOCK_D)
        tma_load(dout_desc, [b, head, tile * QUERIES, 0], full, dout_smem.index(stage))
        tile, head = _next(tile, head, first, tiles)


@gluon.jit
def _wait_turn(turn, number):
    """Wait until the int32 at address `turn` in global memory is `number`."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred other; .reg .b32 now; again: ld.acquire.gpu.global.b32 now, [$1]; setp.ne.s32 other, now, $2;"
        " @other bra.uni again; fence.proxy.async; mov.b32 $0, now; }",
        "=r,l,r",
        [gl.zeros([32], gl.int64, layout=layout) + turn.to(gl.int64), gl.zeros([32], gl.int32, layout=layout) + number],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _pass_turn(turn):
    """Add 1 to the int32 at address `turn` once what this warp's TMA has written is in global memory."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    gl.inline_asm_elementwise(
        "{ .reg .pred first; cp.async.bulk.wait_group 0; fence.proxy.async; bar.warp.sync -1; setp.eq.s32 first, $2, 0;"
        " @first red.release.gpu.global.add.s32 [$1], 1; mov.b32 $0, $2; }",
        "=r,l,r",
        [gl.zeros([32], gl.int64, layout=layout) + turn.to(gl.int64), gl.arange(0, 32, layout=layout)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def _add_warp(packed_desc, turns, smem, bars, sizes, PARITY: gl.constexpr, CAUSAL: gl.constexpr, QUERIES: gl.constexpr):
    """Add dQ of every second step to global memory when it is this key tile's turn. One warp for all steps would hold
    up the others: to wait for a turn and to pass it on takes about as long as a step."""
    dq_smem, dq_empty = smem[6], bars[5]
    bh, key_tile, first, tiles, steps = _work(sizes, CAUSAL, QUERIES)
    _, group, n_queries, n_keys, _ = sizes
    tile, head = first, bh * group
    if PARITY == 1:
        tile, head = _next(tile, head, first, tiles)
    for _ in range(PARITY, steps, 2):
        block = head * tiles + tile
        number = key_tile
        if CAUSAL:  # counted from the last key tile that these queries see
            end = gl.minimum((tile + 1) * QUERIES + n_keys - n_queries, n_keys)
            number = (end - 1) // KEYS - key_tile
        _wait_turn(turns + block, number)
        for w in gl.static_range(2):
            named_barrier_sync(DQ_STORED + 2 * PARITY + w, 160)
            if number == 0:
                tma_store(packed_desc, [(2 * block + w) * HALF, 0], dq_smem.index(w))
            else:
                tma_reduce_add(packed_desc, [(2 * block + w) * HALF, 0], dq_smem.index(w))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty, count=1)
        _pass_turn(turns + block)
        tile, head = _next(tile, head, first, tiles)
        tile, head = _next(tile, head, first, tiles)


@gluon.jit
def _masked(p, n0, m0, n_queries, n_keys, CAUSAL: gl.constexpr):
    """p (keys n0.., queries m0..) with 0 for keys that there are not or that the query does not see."""
    rows: gl.constexpr = gl.SliceLayout(0, p.type.layout)
    key = n0 + gl.arange(0, p.shape[0], layout=gl.SliceLayout(1, p.type.layout))
    last = n_keys - 1 + gl.zeros([p.shape[1]], gl.int32, layout=rows)
    if CAUSAL:
        last = gl.minimum(last, m0 + n_keys - n_queries + gl.arange(0, p.shape[1], layout=rows))
    return gl.where(key[:, None] <= last[None, :], p, 0.0)


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
def _packed(dq):
    """A warpgroup's (64, 64) of dQ in the order in which it is added up: four elements that a thread holds lie
    together, and eight threads' fill all banks of shared memory. `_unpacked` is the inverse."""
    # Row: warp, half, 4 and 2 of lane / 4. Column: 2 and 4 groups of 8, lane % 4, pair.
    return dq.reshape([4, 2, 4, 2, 2, 4, 4, 2]).permute([5, 0, 2, 4, 3, 6, 1, 7]).reshape([HALF, HALF])


@triton.jit
def _unpacked(dq):
    return tl.reshape(tl.permute(tl.reshape(dq, [4, 4, 4, 2, 2, 4, 2, 2]), [1, 6, 2, 4, 3, 0, 5, 7]), [64, 64])


@gluon.jit
def _mma_warpgroup(
    dk_desc, dv_desc, smem, bars, sizes, scale,
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
    bh, key_tile, tile, tiles, steps = _work(sizes, CAUSAL, QUERIES)
    kv_heads, _, n_queries, n_keys, _ = sizes
    n0, first = key_tile * KEYS, tile
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
        dp = warpgroup_mma(v, dout.permute([1, 0]), zero, use_acc=False, is_async=True)
        base = rows.slice(0, QUERIES).load(gl.SliceLayout(0, s_layout))
        p = gl.exp2(s * log2_scale - base[None, :])
        m0 = tile * QUERIES
        if n0 + KEYS > n_keys or (CAUSAL and n0 + KEYS - 1 > m0 + n_keys - n_queries):
            p = _masked(p, n0 + W * HALF, m0, n_queries, n_keys, CAUSAL)
        p16 = gl.convert_layout(p.to(dtype), p_layout)
        dv = warpgroup_mma(p16, dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = rows.slice(QUERIES, QUERIES).load(gl.SliceLayout(0, s_layout))
        ds = (p * (dp - delta[None, :])).to(dtype)
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
        dq_smem.index(W).store(_packed(dq))
        fence_async_shared()
        if stage == 0:
            named_barrier_arrive(DQ_STORED + W, 160)
        else:
            named_barrier_arrive(DQ_STORED + 2 + W, 160)
        s = warpgroup_mma_wait(0, deps=[s])
        tile = gl.where(tile + 1 == tiles, first, tile + 1)
    place = [bh // kv_heads, bh % kv_heads, n0 + W * HALF, 0]
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
    q_desc, k_desc, v_desc, dout_desc, rows_desc, packed_desc, dk_desc, dv_desc, turns,
    kv_heads, group, n_queries, n_keys, width, scale,
    CAUSAL: gl.constexpr, BLOCK_D: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """Descriptors of q, dout (B, n_queries, heads, D) and k, v, dk, dv (B, n_keys, kv_heads, D); of what
    `_attention_hopper_rows_kernel` writes; of the sum of dQ, two (64, 64) as `_packed` for each tile."""
    dtype: gl.constexpr = q_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [2, QUERIES, BLOCK_D], layout)
    k_smem = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], layout)
    v_smem = gl.allocate_shared_memory(dtype, [2, HALF, BLOCK_D], layout)
    dout_smem = gl.allocate_shared_memory(dtype, [2, QUERIES, BLOCK_D], layout)
    rows_smem = gl.allocate_shared_memory(gl.float32, [2, 2 * QUERIES], rows_desc.layout)
    ds_smem = gl.allocate_shared_memory(dtype, [4, HALF, QUERIES], layout)
    dq_smem = gl.allocate_shared_memory(gl.float32, [2, HALF, HALF], packed_desc.layout)
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
    sizes = (kv_heads, group, n_queries, n_keys, width)
    inputs = (q_desc, k_desc, v_desc, dout_desc, rows_desc)
    gl.warp_specialize(
        [
            (_mma_warpgroup, (dk_desc, dv_desc, smem, bars, sizes, scale, 0, CAUSAL, BLOCK_D, QUERIES)),
            (_mma_warpgroup, (dk_desc, dv_desc, smem, bars, sizes, scale, 1, CAUSAL, BLOCK_D, QUERIES)),
            (_load_warp, (inputs, smem, bars, sizes, CAUSAL, BLOCK_D, QUERIES)),
            (_add_warp, (packed_desc, turns, smem, bars, sizes, 0, CAUSAL, QUERIES)),
            (_add_warp, (packed_desc, turns, smem, bars, sizes, 1, CAUSAL, QUERIES)),
        ],
        [4, 1, 1, 1],
        [240, 24, 24, 24],
    )


@triton.jit(do_not_specialize=SIZES)
def _attention_hopper_rows_kernel(
    DOut, Out, Max, Sum, Rows, Turns, do_sb, do_st, do_sh, o_sb, o_st, o_sh, heads, n_queries, scale,
    D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """Rows: for each tile Base, then Delta, as `_attention_rows_kernel` in kernels/attention.py, also of rows beyond
    n_queries, which see nothing. Turns: 0 for each tile."""
    tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(n_queries, QUERIES)
    bh, m0 = tile // tiles, tile % tiles * QUERIES
    b, h = bh // heads, bh % heads
    row = tl.arange(0, QUERIES)
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = m0 + row < n_queries
    held = inside[:, None] & (col < D)
    DOut += b * do_sb + h * do_sh + m0 * do_st
    Out += b * o_sb + h * o_sh + m0 * o_st
    # In int64, like m0: a stride may be large, and TMA takes it.
    far = row[:, None].to(tl.int64)
    dout = tl.load(DOut + far * do_st + col, mask=held, other=0.0).to(tl.float32)
    out = tl.load(Out + far * o_st + col, mask=held, other=0.0).to(tl.float32)
    m = tl.load(Max + bh * n_queries + m0 + row, mask=inside, other=0.0)
    total = tl.load(Sum + bh * n_queries + m0 + row, mask=inside, other=0.0)
    base = tl.where(total == 0.0, float("inf"), m * (scale * LOG2E) + tl.log2(total))
    Rows += tile * (2 * QUERIES)
    tl.store(Rows + row, base)
    tl.store(Rows + QUERIES + row, tl.sum(dout * out, 1))
    tl.store(Turns + tile, 0)


@triton.jit(do_not_specialize=SIZES)
def _attention_hopper_dq_kernel(
    Packed, DQ, dq_sb, dq_st, heads, n_queries, n_keys, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    """DQ from one (64, 64) of its packed sum, which was not written if its queries see no key."""
    tile, part = (tl.program_id(0) // 2).to(tl.int64), tl.program_id(0) % 2
    tiles = tl.cdiv(n_queries, QUERIES)
    bh, m0 = tile // tiles, tile % tiles * QUERIES
    row = tl.arange(0, 64)[:, None]
    col = tl.arange(0, 64)[None, :]
    seen = (row >= 0) & (not CAUSAL or m0 + QUERIES + n_keys > n_queries)
    dq = _unpacked(tl.load(Packed + (2 * tile + part) * 4096 + row * 64 + col, mask=seen, other=0.0)) * scale
    if BLOCK_D == 64:
        row += part * 64
    else:
        col += part * 64
    DQ += bh // heads * dq_sb + bh % heads * D + m0 * dq_st
    tl.store(DQ + row.to(tl.int64) * dq_st + col, dq.to(DQ.dtype.element_ty), mask=(m0 + row < n_queries) & (col < D))


def attention_hopper_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`attention_bwd` of kernels/attention.py, for any scale. It needs memory for dq in float32, in whole tiles."""
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1], k.shape[2]
    block_d = 64 if head_dim <= 64 else 128
    queries = TILE_QUERIES[block_d]
    dout = dout if tma_readable(dout) else dout.contiguous()
    dq, dk, dv = gradients_like(q, k, v)
    tiles = batch * heads * cdiv(n_queries, queries)
    rows = torch.empty(tiles * 2 * queries, dtype=torch.float32, device=q.device)
    turns = torch.empty(tiles, dtype=torch.int32, device=q.device)
    packed = torch.empty((tiles * 128, 64), dtype=torch.float32, device=q.device)
    launch(
        _attention_hopper_rows_kernel, (tiles,),
        dout, out, *statistics, rows, turns, *dout.stride()[:3], *out.stride()[:3], heads, n_queries, abs(scale),
        D=head_dim, BLOCK_D=block_d, QUERIES=queries, num_warps=8,
    )  # fmt: skip
    key_tiles = cdiv(n_keys, KEYS.value)
    launch(
        _attention_hopper_bwd_kernel, (key_tiles * batch * kv_heads,),
        head_tiles(q, queries, block_d), head_tiles(k, 64, block_d), head_tiles(v, 64, block_d),
        head_tiles(dout, queries, block_d),
        TensorDescriptor(rows, [rows.numel()], [1], [2 * queries], gl.NVMMASharedLayout(0, 32, 1)),
        TensorDescriptor(packed, list(packed.shape), [64, 1], [64, 64], gl.NVMMASharedLayout(128, 32, 2)),
        head_tiles(dk, 64, block_d), head_tiles(dv, 64, block_d), turns,
        kv_heads, heads // kv_heads, n_queries, n_keys, max(1, multiprocessors(q.device) // key_tiles), scale,
        CAUSAL=causal, BLOCK_D=block_d, QUERIES=queries, num_warps=4,
    )  # fmt: skip
    launch(
        _attention_hopper_dq_kernel, (tiles * 2,),
        packed, dq, *dq.stride()[:2], heads, n_queries, n_keys, scale,
        CAUSAL=causal, D=head_dim, BLOCK_D=block_d, QUERIES=queries, num_warps=8,
    )  # fmt: skip
    return dq, dk, dv
