"""Attention of a few new tokens over a key-value cache, bound by reading that cache once.

FlashAttention-2's running maximum and sum (https://arxiv.org/abs/2307.08691). All queries that share a key head, those
of its group of heads and of the new tokens, are rows of one tile. The keys of a sequence are split over programs, whose
results a second kernel combines in order (https://pytorch.org/blog/flash-decoding/). The number of splits depends on
the cache's capacity and the batch, never on the lengths, which only the device reads: a captured graph replays with
other lengths, nothing is compiled for one, and results are bitwise repeatable.
Not supported: head dimensions above 256, float64, gradients.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    LOG2E,
    architecture,
    await_previous,
    cache_limits,
    cdiv,
    exponential,
    launches_early,
    let_in,
    multiprocessors,
    new_like,
    next_power_of_2,
)
from ._launch import Variant
from ._tiles import _capped, _dot
from .attention import MAX_HEAD_DIM

# Sizes change from call to call: specialising on them would compile again for no speed.
SIZES = ("heads", "kv_heads", "group", "n_queries", "capacity", "splits", "window")
TILE_BYTES = 16384  # of keys, and as many of values
MAX_ROW_BYTES = 128  # of a column of queries: more rows than that would spill registers
MAX_SPLIT_KEYS = 4096  # lest one long sequence among short ones be left to few programs
COMBINED = 16  # splits at a time


class Plan(NamedTuple):
    """Rows and keys of a tile, row tiles of a key head, programs that share its keys, depth of the load pipeline."""

    rows: int
    keys: int
    row_tiles: int
    splits: int
    stages: int


def decode_attention_limits(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float,
) -> str | None:
    """Why these kernels cannot run this call; None if they can."""
    if q.shape[3] > MAX_HEAD_DIM:
        return f"supports head_dim up to {MAX_HEAD_DIM}, not {q.shape[3]}"
    return cache_limits(k_cache, v_cache)


def _splits(tasks: int, n_tiles: int, max_tiles: int, processors: int) -> int:
    """The fewest splits of `n_tiles`, for each of so many tasks, that take at most a tenth longer than the best number.

    Time is counted in tiles that a processor walks, whose programs come one or else two at a time: a single one that
    is left over takes as long as two. A split has at most `max_tiles`.
    """
    fewest, times = max(1, cdiv(n_tiles, max_tiles)), {}
    for splits in range(fewest, max(fewest, min(n_tiles, processors)) + 1):
        programs = tasks * splits
        pairs = cdiv(programs, 2 * processors)
        times[splits] = (1 if programs <= processors else 2 * pairs) * cdiv(n_tiles, splits)
    return next(splits for splits, time in times.items() if time <= 1.1 * min(times.values()))


@functools.lru_cache(maxsize=4096)
def _plan(
    batch: int, n_rows: int, kv_heads: int, head_dim: int, element_size: int, reach: int, paged: bool,
    arch: int, processors: int,
) -> Plan:  # fmt: skip
    """For `n_rows` queries of each sequence and key head, which see up to `reach` keys."""
    keys = max(16, min(128, TILE_BYTES // (_padded(head_dim) * element_size)))
    smallest = 1 if element_size == 4 else 16  # which is what a tensor core takes
    rows = min(keys, MAX_ROW_BYTES // element_size, max(smallest, next_power_of_2(n_rows)))
    row_tiles = cdiv(n_rows, rows)
    tasks, n_tiles = batch * kv_heads * row_tiles, cdiv(reach, keys)
    splits = _splits(tasks, n_tiles, MAX_SPLIT_KEYS // keys, processors)
    # Tiles on their way: three take 96 KiB, which not every multiprocessor has, and pay only where rows are few. Behind
    # a load of page numbers Triton spreads the same depth over twice as many stages.
    depth = 3 if rows <= 16 and arch in (80, 90, 100, 103) else 2
    return Plan(rows, keys, row_tiles, splits, 1 + depth * (2 if paged else 1))


@functools.lru_cache(maxsize=1024)
def _variants(
    plan: Plan, head_dim: int, page: int, whole: bool, windowed: bool, capped: bool, early: bool
) -> tuple[Variant, Variant]:
    """The kernel of the splits and that which combines them."""
    sizes = {
        "WHOLE": whole,
        "WINDOW": windowed,
        "EARLY": early,
        "D": head_dim,
        "BLOCK_N": plan.keys,
        "BLOCK_D": _padded(head_dim),
    }
    return (
        Variant(
            _decode_kernel, PAGE=page, CAP=capped, SPLIT=plan.splits > 1, BLOCK_M=plan.rows, num_warps=4,
            num_stages=plan.stages, **sizes,
        ),
        Variant(_combine_kernel, BLOCK_S=COMBINED, num_warps=2, **sizes),
    )  # fmt: skip


def _padded(head_dim: int) -> int:
    return max(16, next_power_of_2(head_dim))


@triton.jit
def _exp(x, EXACT: tl.constexpr):
    """e^x for x <= 0, of an x that is in base 2 unless EXACT."""
    return exponential(x, True) if EXACT else tl.exp2(x)


@triton.jit
def _length(Lengths, b, capacity, WHOLE: tl.constexpr):
    if not WHOLE:
        capacity = tl.minimum(tl.maximum(tl.load(Lengths + b), 0), capacity)
    return capacity


@triton.jit
def _first_key(length, n_queries, window, WINDOW: tl.constexpr, BLOCK_N: tl.constexpr):
    """That of the first tile of which a query sees a key."""
    first = 0
    if WINDOW:
        first = tl.maximum(length - (n_queries - 1) - window, 0) // BLOCK_N * BLOCK_N
    return first


@triton.jit
def _share(length, splits, BLOCK_N: tl.constexpr):
    """Keys of a split: whole tiles, at least one."""
    return tl.maximum(tl.cdiv(tl.cdiv(length, BLOCK_N), splits), 1) * BLOCK_N


@triton.jit(do_not_specialize=SIZES)
def _decode_kernel(
    Q, K, V, Lengths, Table, Out, Partial, Max, Sum, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, t_sb,
    heads, kv_heads, group, n_queries, capacity, splits, scale, window, cap,
    PAGE: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr,
    EARLY: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one sequence and key head, for one tile of the rows that read them.

    Q: (B, n_queries, heads, D); Out: likewise, contiguous. K, V: (B, capacity, kv_heads, D), or with PAGE keys a page
    (n_pages, PAGE, kv_heads, D) and Table (B, capacity / PAGE). With SPLIT results are left in Partial
    (B, n_queries, heads, splits, D), not yet divided by Sum, and Max and Sum (B, n_queries, heads, splits), all fp32.
    WHOLE: every sequence has `capacity` keys, and Lengths is not read. WINDOW: of the keys up to its own a query sees
    the last `window`; CAP: scores are capped at `cap`.
    """
    await_previous(EARLY, False)
    n_row_tiles = tl.cdiv(group * n_queries, BLOCK_M)
    row = tl.program_id(0) % n_row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    task = tl.program_id(0) // n_row_tiles  # tiles that read the same keys follow each other, then heads, in memory too
    h, split = task % kv_heads, task // kv_heads % splits
    b = (task // (kv_heads * splits)).to(tl.int64)
    length = _length(Lengths, b, capacity, WHOLE)
    first = _first_key(length, n_queries, window, WINDOW, BLOCK_N)
    share = _share(length - first, splits, BLOCK_N)
    begin = first + split * share
    end = tl.minimum(begin + share, length)
    col = tl.arange(0, BLOCK_D)
    query, head = row // group, h * group + row % group
    inside = (query < n_queries)[:, None] & (col < D)[None, :]
    at = b * q_sb + query.to(tl.int64) * q_st + head.to(tl.int64) * q_sh
    q = tl.load(Q + at[:, None] + col[None, :], mask=inside, other=0.0)
    seen = length - (n_queries - 1 - query)
    EXACT: tl.constexpr = q.dtype == tl.float32
    factor = scale if EXACT else scale * LOG2E
    K += h.to(tl.int64) * k_sh
    V += h.to(tl.int64) * v_sh
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for n0 in range(begin, end, BLOCK_N):
        key = n0 + tl.arange(0, BLOCK_N)
        written = (key < length)[:, None] if D == BLOCK_D else (key < length)[:, None] & (col < D)[None, :]
        if PAGE == 0:
            page, slot = b, key.to(tl.int64)
        else:
            page = tl.load(Table + b * t_sb + key // PAGE, mask=key < length, other=0).to(tl.int64)
            slot = (key % PAGE).to(tl.int64)
        k = tl.load(K + (page * k_sb + slot * k_st)[:, None] + col[None, :], mask=written, other=0.0)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAP:
            s = _capped(s * scale, cap)
            s *= 1.0 if EXACT else LOG2E
        else:
            s *= factor
        visible = key[None, :] < seen[:, None]
        if WINDOW:
            visible = visible & (key[None, :] >= seen[:, None] - window)
        s = tl.where(visible, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its exponentials 0, not NaN.
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = _exp(s - base[:, None], EXACT)
        alpha = _exp(m - base, EXACT)
        total = total * alpha + tl.sum(p, 1)
        v = tl.load(V + (page * v_sb + slot * v_st)[:, None] + col[None, :], mask=written, other=0.0)
        acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    let_in(EARLY)  # not before: the next kernel would take room from programs that still read
    out_row = (b * n_queries + query) * heads + head
    if SPLIT:
        if begin < end:  # the others are not read
            part = out_row * splits + split
            tl.store(Partial + part[:, None] * D + col[None, :], acc, mask=inside)
            tl.store(Max + part, m, mask=query < n_queries)
            tl.store(Sum + part, total, mask=query < n_queries)
    else:
        out = acc * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))[:, None]
        tl.store(Out + out_row[:, None] * D + col[None, :], out.to(Out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _combine_kernel(
    Partial, Max, Sum, Lengths, Out, heads, n_queries, capacity, splits, window,
    WHOLE: tl.constexpr, WINDOW: tl.constexpr, EARLY: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Out (B, n_queries, heads, D) from the splits of `_decode_kernel`, a row a program."""
    await_previous(EARLY)
    EXACT: tl.constexpr = Out.dtype.element_ty == tl.float32
    row = tl.program_id(0).to(tl.int64)
    length = _length(Lengths, row // (n_queries * heads), capacity, WHOLE)
    length -= _first_key(length, n_queries, window, WINDOW, BLOCK_N)
    used = tl.cdiv(length, _share(length, splits, BLOCK_N))
    col = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    m = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    for s0 in range(0, used, BLOCK_S):
        split = s0 + tl.arange(0, BLOCK_S)
        part = row * splits + split
        mask = (split < used)[:, None] & (col < D)[None, :]
        partial = tl.load(Partial + part[:, None] * D + col[None, :], mask=mask, other=0.0)
        maxima = tl.load(Max + part, mask=split < used, other=-float("inf"))
        sums = tl.load(Sum + part, mask=split < used, other=0.0)
        m_new = tl.maximum(m, tl.max(maxima, 0))
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        weight = _exp(maxima - base, EXACT)
        alpha = _exp(m - base, EXACT)
        total = total * alpha + tl.sum(weight * sums, 0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
        m = m_new
    out = acc * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))
    tl.store(Out + row * D + col, out.to(Out.dtype.element_ty), mask=col < D)


def decode_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, block_table: Tensor | None, scale: float,
    window: int | None, softcap: float,
) -> Tensor:  # fmt: skip
    """q: (B, Tq, H, D); caches: (B, capacity, Hkv, D), or pages with a block_table -> out as q, contiguous."""
    out = new_like(q)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    batch, n_queries, heads, head_dim = q.shape
    page, kv_heads = k_cache.shape[1:3]
    paged = block_table is not None
    table = block_table if paged else q  # any tensor will do where there is none
    if paged and table.stride(1) != 1:
        table = table.contiguous()
    capacity = page * table.shape[1] if paged else page
    device, group = q.device, heads // kv_heads
    arch = architecture(device)
    reach = capacity if window is None else min(capacity, window + n_queries - 1)
    plan = _plan(
        batch, group * n_queries, kv_heads, head_dim, q.element_size(), reach, paged, arch, multiprocessors(device)
    )
    decode, combine = _variants(
        plan, head_dim, page if paged else 0, lengths is None, window is not None, softcap > 0.0, launches_early(device)
    )
    window = min(window or 0, capacity)  # of which more hides nothing, and might leave the 32 bits of differences
    partial = maxima = sums = out  # which nobody writes to through these
    if plan.splits > 1:
        n_parts = batch * n_queries * heads * plan.splits
        partial, maxima, sums = (q.new_empty(n, dtype=torch.float32) for n in (n_parts * head_dim, n_parts, n_parts))
    counts = q if lengths is None else lengths.contiguous()
    decode.launch(
        (plan.row_tiles * batch * kv_heads * plan.splits,),
        q, k_cache, v_cache, counts, table, out, partial, maxima, sums,
        *q.stride()[:3], *k_cache.stride()[:3], *v_cache.stride()[:3], table.stride(0),
        heads, kv_heads, group, n_queries, capacity, plan.splits, scale, window, softcap,
    )  # fmt: skip
    if plan.splits > 1:
        combine.launch(
            (batch * n_queries * heads,),
            partial, maxima, sums, counts, out, heads, n_queries, capacity, plan.splits, window,
        )  # fmt: skip
    return out
