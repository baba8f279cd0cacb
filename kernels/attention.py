"""Attention for any GPU since sm_80, forward and backward: FlashAttention-2's algorithm (https://arxiv.org/abs/2307.08691).

Scores are never stored: a program holds a tile of queries and walks the keys with a running maximum and sum. The
backward pass recomputes them in two kernels, one over key tiles for dk and dv and one over query tiles for dq, so that
every sum has a fixed order and no atomics are needed (bitwise repeatable). Tensors are (B, T, H, D) with any strides in
B, T and H. Softmax is in base 2 with fp32 lse; products take the tensors' dtype and accumulate in fp32. On sm_90 the
forward pass is `attention_hopper`'s wherever that runs.
Not supported: head dimensions above 256, float64, dense masks, dropout.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, architecture, exponential

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # times the 128 rows of a tile
# Lengths and head counts change from call to call: specialising on them would compile again for no speed.
SIZES = ("heads", "group", "n_queries", "n_keys")


class Tiles(NamedTuple):
    """Queries and keys per tile, warps, and depth of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_limits(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> str | None:
    """Why these kernels cannot run this call; None if they can."""
    if q.shape[3] > MAX_HEAD_DIM:
        return f"supports head_dim up to {MAX_HEAD_DIM}, not {q.shape[3]}"
    return None


def _tiles(q: Tensor, direction: str) -> Tiles:
    """Tiles by direction, architecture and head dimension; small for float32, which uses no tensor cores."""
    if q.dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _HOPPER if architecture() in (90, 100, 103) else _AMPERE
    return table[direction][64 if q.shape[3] <= 64 else 128 if q.shape[3] <= 128 else 256]


# With Triton 3.6, those for 16-bit types and head dimensions up to 128 on Hopper were the fastest of 7 to 11 on an H200
# at 4096 tokens; the others are the largest tiles that spill few registers on sm_90 (float32) and sm_80.
_FLOAT32 = {
    "fwd": {64: Tiles(64, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 4, 1)},
    "dkdv": {64: Tiles(32, 32, 8, 1), 128: Tiles(16, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
    "dq": {64: Tiles(32, 32, 8, 1), 128: Tiles(32, 32, 8, 1), 256: Tiles(16, 16, 8, 1)},
}
_HOPPER = {
    "fwd": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 128, 8, 3), 256: Tiles(128, 32, 8, 2)},
    "dkdv": {64: Tiles(128, 64, 4, 2), 128: Tiles(64, 128, 8, 1), 256: Tiles(64, 32, 8, 1)},
    "dq": {64: Tiles(64, 64, 4, 3), 128: Tiles(128, 128, 8, 2), 256: Tiles(64, 32, 8, 2)},
}
_AMPERE = {
    "fwd": {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 32, 8, 3), 256: Tiles(64, 32, 8, 2)},
    "dkdv": {64: Tiles(32, 128, 8, 2), 128: Tiles(32, 64, 8, 2), 256: Tiles(32, 32, 8, 1)},
    "dq": {64: Tiles(128, 32, 4, 2), 128: Tiles(64, 32, 4, 2), 256: Tiles(32, 32, 4, 1)},
}


@triton.jit
def _tile(X, base, first, stride, limit, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows first .. first + N of one head as (N, BLOCK_D), zero beyond D columns and, if MASKED, `limit` rows."""
    row = tl.arange(0, N)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    X += base + (tl.zeros([], tl.int64) + first) * stride  # in int64: a tensor may hold more than 2^31 elements
    if MASKED:
        return tl.load(X + row * stride + col, mask=(first + row < limit) & (col < D), other=0.0)
    if D < BLOCK_D:
        return tl.load(X + row * stride + col, mask=col < D, other=0.0)
    return tl.load(X + row * stride + col)


@triton.jit
def _store_tile(X, base, first, stride, limit, x, N: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, N)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    X += base + (tl.zeros([], tl.int64) + first) * stride  # in int64: a tensor may hold more than 2^31 elements
    tl.store(X + row * stride + col, x.to(X.dtype.element_ty), mask=(first + row < limit) & (col < D))


@triton.jit
def _dot(a, b, acc):
    """acc + a b. In float32 a tile's sum is made on its own: one chain of additions over all tiles would round off
    more, and an addition, unlike a multiply-add with 1, the compiler would fold back into that chain."""
    if a.dtype == tl.float32:
        return tl.fma(tl.dot(a, b, input_precision="ieee"), 1.0, acc)
    return tl.dot(a, b, acc)


@triton.jit
def _fwd_keys(
    acc, m, total, q, K, V, k_base, v_base, k_stride, v_stride, m0, begin, end, n_keys, offset, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk the key tiles in [begin, end), updating the output, row maxima and row sums; mask only where MASKED."""
    row = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in range(begin, end, BLOCK_N):
        k = _tile(K, k_base, n0, k_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            col = n0 + tl.arange(0, BLOCK_N)[None, :]
            visible = col < n_keys
            if CAUSAL:
                visible = visible & (col <= row + offset)
            s = tl.where(visible, s, -float("inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # A row that has seen no key yet has maximum -inf; subtracting 0 instead keeps its exponentials 0, not NaN.
        base = tl.where(m_new == -float("inf"), 0.0, m_new) if MASKED else m_new
        if q.dtype == tl.float32:
            p = exponential((s - base[:, None]) * scale, True)
            alpha = exponential((m - base) * scale, True)
        else:  # all but s is one number a row: a single multiply-add remains
            p = tl.exp2(s * (scale * LOG2E) - (base * (scale * LOG2E))[:, None])
            alpha = tl.exp2((m - base) * (scale * LOG2E))
        total = total * alpha + tl.sum(p, 1)
        v = _tile(V, v_base, n0, v_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        acc = _dot(p.to(v.dtype), v, acc * alpha[:, None])
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=SIZES)
def _attention_fwd_kernel(
    Q, K, V, Out, Max, Sum, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, o_sb, o_st, o_sh,
    heads, group, n_queries, n_keys, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q, Out: (B, n_queries, heads, D); K, V: (B, n_keys, heads / group, D); Max, Sum: (B, heads, n_queries) fp32.

    One program per query tile and head. Causal tiles are started longest first.
    """
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CAUSAL:
        tile = n_tiles - 1 - tile
    m0 = tile * BLOCK_M
    k_base, v_base = b * k_sb + (h // group) * k_sh, b * v_sb + (h // group) * v_sh
    offset = n_keys - n_queries
    q = _tile(Q, b * q_sb + h * q_sh, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Keys in [0, full) are seen by every query of the tile, keys in [full, end) by some, keys from end on by none.
    end = n_keys
    full = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.maximum(m0 + BLOCK_M + offset, 0))
        full = tl.minimum(n_keys, tl.maximum(m0 + 1 + offset, 0))
    full = full // BLOCK_N * BLOCK_N
    acc, m, total = _fwd_keys(
        acc, m, total, q, K, V, k_base, v_base, k_st, v_st, m0, 0, full, n_keys, offset, scale,
        False, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m, total = _fwd_keys(
        acc, m, total, q, K, V, k_base, v_base, k_st, v_st, m0, full, end, n_keys, offset, scale,
        True, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))[:, None]
    _store_tile(Out, b * o_sb + h * o_sh, m0, o_st, n_queries, out, BLOCK_M, D, BLOCK_D)
    row = m0 + tl.arange(0, BLOCK_M)
    tl.store(Max + bh * n_queries + row, m, mask=row < n_queries)
    tl.store(Sum + bh * n_queries + row, total, mask=row < n_queries)


@triton.jit(do_not_specialize=SIZES)
def _attention_rows_kernel(
    DOut, Out, Max, Sum, Delta, Base, Norm, do_sb, do_st, do_sh, o_sb, o_st, o_sh, heads, n_queries, scale,
    EXACT: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the backward pass needs of each query, (B, heads, n_queries) fp32.

    Delta = sum over D of dout * out, which softmax's backward subtracts. Base and Norm recompute a probability from its
    score, see `_probability`; a query that saw no key gets such that all its probabilities are 0.
    """
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    m0 = (tl.program_id(0) % n_tiles) * BLOCK_M
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    dout = _tile(DOut, b * do_sb + h * do_sh, m0, do_st, n_queries, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    out = _tile(Out, b * o_sb + h * o_sh, m0, o_st, n_queries, BLOCK_M, D, BLOCK_D, True).to(tl.float32)
    row = m0 + tl.arange(0, BLOCK_M)
    inside = row < n_queries
    row += bh * n_queries
    tl.store(Delta + row, tl.sum(dout * out, 1), mask=inside)
    m = tl.load(Max + row, mask=inside, other=0.0)
    total = tl.load(Sum + row, mask=inside, other=1.0)
    blind = total == 0.0
    if EXACT:
        tl.store(Base + row, tl.where(blind, 0.0, m), mask=inside)
        tl.store(Norm + row, tl.where(blind, 0.0, tl.div_rn(1.0, tl.where(blind, 1.0, total))), mask=inside)
    else:
        tl.store(Base + row, tl.where(blind, float("inf"), m * (scale * LOG2E) + tl.log2(total)), mask=inside)


@triton.jit
def _probability(s, base, norm, scale, EXACT: tl.constexpr):
    """e^((s - max) * scale) / sum of unscaled scores s. EXACT, for float32: base is the maximum and norm 1 / sum; else
    base holds all but s, in base 2, so that one multiply-add and one exponential remain."""
    if EXACT:
        return exponential((s - base) * scale, True) * norm
    return tl.exp2(s * (scale * LOG2E) - base)


@triton.jit
def _dkdv_queries(
    dk, dv, k, v, Q, DOut, Base, Norm, Delta, q_base, do_base, q_st, q_sh, do_st, do_sh, n0, first_tile, n_tiles, group,
    n_queries, offset, scale,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add `n_tiles` query tiles of each of `group` heads to dk and dv. Scores are computed transposed, keys by queries.

    One loop over heads and tiles: two nested ones cost 60 registers a thread.
    """
    key = n0 + tl.arange(0, BLOCK_N)[:, None]
    for i in range(0, group * n_tiles):
        head = tl.zeros([], tl.int64) + i // n_tiles
        m0 = (first_tile + i % n_tiles) * BLOCK_M
        row = m0 + tl.arange(0, BLOCK_M)
        inside, rows = row < n_queries, head * n_queries + row
        q = _tile(Q, q_base + head * q_sh, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        EXACT: tl.constexpr = q.dtype == tl.float32
        base = tl.load(Base + rows, mask=inside, other=0.0 if EXACT else float("inf"))
        norm = tl.load(Norm + rows, mask=inside, other=0.0) if EXACT else base
        p = _probability(s, base[None, :], norm[None, :], scale, EXACT)
        if MASKED:
            p = tl.where(key <= row[None, :] + offset, p, 0.0)
        dout = _tile(DOut, do_base + head * do_sh, m0, do_st, n_queries, BLOCK_M, D, BLOCK_D, True)
        dv = _dot(p.to(dout.dtype), dout, dv)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        delta = tl.load(Delta + rows, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _attention_dkdv_kernel(
    Q, K, V, DOut, DK, DV, Base, Norm, Delta, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh,
    do_sb, do_st, do_sh, dk_sb, dk_st, dk_sh, heads, group, n_queries, n_keys, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv = p^T dout and dk = ds^T q * scale for one key tile of one key head, summed over its group of query heads.

    DK, DV share strides. p are the probabilities, ds = p * (dout v^T - delta).
    """
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    n0 = (tl.program_id(0) % n_tiles) * BLOCK_N
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    kv_heads = heads // group
    b, kv_head = bh // kv_heads, bh % kv_heads
    k = _tile(K, b * k_sb + kv_head * k_sh, n0, k_st, n_keys, BLOCK_N, D, BLOCK_D, True)
    v = _tile(V, b * v_sb + kv_head * v_sh, n0, v_st, n_keys, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offset = n_keys - n_queries
    h = kv_head * group
    q_base, do_base, rows = b * q_sb + h * q_sh, b * do_sb + h * do_sh, (b * heads + h) * n_queries
    # Query tiles before `first` see no key of the tile, those in [first, full) some, those from full on all of them.
    first = 0
    full = 0
    end = tl.cdiv(n_queries, BLOCK_M)
    if CAUSAL:
        first = tl.minimum(tl.maximum(n0 - offset, 0) // BLOCK_M, end)
        full = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - offset, 0), BLOCK_M), end), first)
        dk, dv = _dkdv_queries(
            dk, dv, k, v, Q, DOut, Base + rows, Norm + rows, Delta + rows, q_base, do_base, q_st, q_sh, do_st, do_sh,
            n0, first, full - first, group, n_queries, offset, scale, True, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dk, dv = _dkdv_queries(
        dk, dv, k, v, Q, DOut, Base + rows, Norm + rows, Delta + rows, q_base, do_base, q_st, q_sh, do_st, do_sh,
        n0, full, end - full, group, n_queries, offset, scale, False, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    base = b * dk_sb + kv_head * dk_sh
    _store_tile(DK, base, n0, dk_st, n_keys, dk * scale, BLOCK_N, D, BLOCK_D)
    _store_tile(DV, base, n0, dk_st, n_keys, dv, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dq_keys(
    dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_stride, v_stride,
    m0, begin, end, n_keys, offset, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the key tiles in [begin, end) to dq."""
    row = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in range(begin, end, BLOCK_N):
        k = _tile(K, k_base, n0, k_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        v = _tile(V, v_base, n0, v_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = _probability(s, base[:, None], norm[:, None], scale, q.dtype == tl.float32)
        if MASKED:
            col = n0 + tl.arange(0, BLOCK_N)[None, :]
            visible = col < n_keys
            if CAUSAL:
                visible = visible & (col <= row + offset)
            p = tl.where(visible, p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=SIZES)
def _attention_dq_kernel(
    Q, K, V, DOut, DQ, Base, Norm, Delta, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, do_sb, do_st, do_sh,
    dq_sb, dq_st, dq_sh, heads, group, n_queries, n_keys, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = ds k * scale for one query tile of one head, ds = p * (dout v^T - delta)."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CAUSAL:
        tile = n_tiles - 1 - tile
    m0 = tile * BLOCK_M
    k_base, v_base = b * k_sb + (h // group) * k_sh, b * v_sb + (h // group) * v_sh
    offset = n_keys - n_queries
    q = _tile(Q, b * q_sb + h * q_sh, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    dout = _tile(DOut, b * do_sb + h * do_sh, m0, do_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    row = m0 + tl.arange(0, BLOCK_M)
    inside = row < n_queries
    row += bh * n_queries
    base = tl.load(Base + row, mask=inside, other=0.0 if q.dtype == tl.float32 else float("inf"))
    norm = tl.load(Norm + row, mask=inside, other=0.0) if q.dtype == tl.float32 else base
    delta = tl.load(Delta + row, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    end = n_keys
    full = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.maximum(m0 + BLOCK_M + offset, 0))
        full = tl.minimum(n_keys, tl.maximum(m0 + 1 + offset, 0))
    full = full // BLOCK_N * BLOCK_N
    dq = _dq_keys(
        dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_st, v_st,
        m0, 0, full, n_keys, offset, scale,
        False, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_st, v_st,
        m0, full, end, n_keys, offset, scale,
        True, CAUSAL, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_tile(DQ, b * dq_sb + h * dq_sh, m0, dq_st, n_queries, dq * scale, BLOCK_M, D, BLOCK_D)


def _readable(x: Tensor) -> Tensor:
    """x itself, or a copy: the last dimension must have unit stride, and offsets inside a tile must fit 32 bits."""
    unit = x.stride(3) == 1 or x.shape[3] == 1
    return x if unit and x.stride(1) < MAX_ROW_STRIDE else x.contiguous()


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale such that scores are the same and scale > 0: the kernels take row maxima before scaling."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _launch_options(tiles: Tiles, head_dim: int, causal: bool) -> dict[str, Any]:
    return {
        "CAUSAL": causal,
        "D": head_dim,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _on_hopper(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether sm_90's own kernels run this. In Gluon, they are imported for that architecture alone."""
    if architecture() != 90:
        return False
    from .hopper import runs_on_hopper

    return runs_on_hopper(q, k, v)


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) -> out as q, contiguous; statistics (2, B, H, Tq) float32.

    The statistics are each query's largest unscaled score m and its sum of e^((s - m) * |scale|), apart: in their
    log-sum-exp the rounding of a large m would take what the sum adds.
    """
    q, scale = _positive_scale(q, scale)
    q, k, v = _readable(q), _readable(k), _readable(v)
    batch, n_queries, heads, head_dim = q.shape
    n_keys, group = k.shape[1], heads // k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    statistics = torch.empty((2, batch, heads, n_queries), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, statistics
    if _on_hopper(q, k, v):
        from .attention_hopper import attention_hopper_fwd

        attention_hopper_fwd(q, k, v, out, statistics, causal, scale)
        return out, statistics
    tiles = _tiles(q, "fwd")
    grid = (triton.cdiv(n_queries, tiles.queries) * batch * heads,)
    _attention_fwd_kernel[grid](
        q, k, v, out, *statistics, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        heads, group, n_queries, n_keys, scale, **_launch_options(tiles, head_dim, causal),
    )  # fmt: skip
    return out, statistics


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The forward's tensors and the gradient of `out` -> dq, dk, dv, contiguous."""
    if _on_hopper(q, k, v):
        from .attention_hopper_bwd import attention_hopper_bwd

        return attention_hopper_bwd(dout, q, k, v, out, statistics, causal, scale)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    batch, n_queries, heads, head_dim = q.shape
    n_keys, kv_heads = k.shape[1], k.shape[2]
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign = math.copysign(1.0, scale) if scale else 0.0
    q, scale = _positive_scale(q, scale)
    dout, q, k, v = _readable(dout), _readable(q), _readable(k), _readable(v)
    rows = torch.empty((3, *statistics.shape[1:]), dtype=torch.float32, device=q.device)
    delta, base, norm = rows
    block_d = max(16, triton.next_power_of_2(head_dim))
    _attention_rows_kernel[(triton.cdiv(n_queries, 32) * batch * heads,)](
        dout, out, *statistics, *rows, *dout.stride()[:3], *out.stride()[:3], heads, n_queries, scale,
        EXACT=q.dtype == torch.float32, D=head_dim, BLOCK_M=32, BLOCK_D=block_d,
    )  # fmt: skip
    inputs = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (heads, heads // kv_heads, n_queries, n_keys, scale)
    tiles = _tiles(q, "dkdv")
    _attention_dkdv_kernel[(triton.cdiv(n_keys, tiles.keys) * batch * kv_heads,)](
        q, k, v, dout, dk, dv, base, norm, delta, *inputs, *dk.stride()[:3], *sizes,
        **_launch_options(tiles, head_dim, causal),
    )  # fmt: skip
    tiles = _tiles(q, "dq")
    _attention_dq_kernel[(triton.cdiv(n_queries, tiles.queries) * batch * heads,)](
        q, k, v, dout, dq, base, norm, delta, *inputs, *dq.stride()[:3], *sizes,
        **_launch_options(tiles, head_dim, causal),
    )  # fmt: skip
    return dq if sign == 1.0 else dq * sign, dk, dv
