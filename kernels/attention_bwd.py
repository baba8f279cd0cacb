"""Kernels of attention's backward pass; `attention.py` launches them and says what they do not support.

Probabilities are computed again from the scores and the forward's statistics. One kernel goes over key tiles for dk and
dv, one over query tiles for dq, so that every sum has a fixed order and no atomics are needed (bitwise repeatable).
"""

import triton
import triton.language as tl

from ._common import LOG2E, exponential
from ._tiles import SIZES, _capped, _dot, _first, _length, _sees, _store_tile, _tile


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
    s_sh, n_queries, offset, window, scale, cap,
    MASKED: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add `n_tiles` query tiles of each of `group` heads to dk and dv. Scores are computed transposed, keys by queries.

    One loop over heads and tiles: two nested ones cost 60 registers a thread.
    """
    key = n0 + tl.arange(0, BLOCK_N)[:, None]
    for i in range(0, group * n_tiles):
        head = tl.zeros([], tl.int64) + i // n_tiles
        m0 = (first_tile + i % n_tiles) * BLOCK_M
        row = m0 + tl.arange(0, BLOCK_M)
        inside, rows = row < n_queries, head * s_sh + row
        q = _tile(Q, q_base + head * q_sh, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        if CAP:
            s = _capped(s, cap)
        EXACT: tl.constexpr = q.dtype == tl.float32
        base = tl.load(Base + rows, mask=inside, other=0.0 if EXACT else float("inf"))
        norm = tl.load(Norm + rows, mask=inside, other=0.0) if EXACT else base
        p = _probability(s, base[None, :], norm[None, :], scale, EXACT)
        if MASKED:
            p = tl.where(_sees(row[None, :], key, offset, window, True, WINDOW), p, 0.0)
        dout = _tile(DOut, do_base + head * do_sh, m0, do_st, n_queries, BLOCK_M, D, BLOCK_D, True)
        dv = _dot(p.to(dout.dtype), dout, dv)
        dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
        delta = tl.load(Delta + rows, mask=inside, other=0.0)
        ds = p * (dp - delta[None, :])
        if CAP:  # times tanh's derivative
            ds *= 1.0 - (s / cap) * (s / cap)
        dk = _dot(ds.to(q.dtype), q, dk)
    return dk, dv


@triton.jit(do_not_specialize=SIZES)
def _attention_dkdv_kernel(
    Q, K, V, DOut, DK, DV, Base, Norm, Delta, QueryStarts, KeyStarts, q_sb, q_st, q_sh, k_sb, k_st, k_sh,
    v_sb, v_st, v_sh, do_sb, do_st, do_sh, dk_sb, dk_st, dk_sh, s_sb, s_sh,
    heads, group, n_queries, n_keys, window, scale, cap,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dv = p^T dout and dk = ds^T q * scale for one key tile of one key head, summed over its group of query heads.

    DK, DV share strides. p are the probabilities, ds = p * (dout v^T - delta).
    """
    n_tiles = tl.cdiv(n_keys, BLOCK_N)
    n0 = (tl.program_id(0) % n_tiles) * BLOCK_N
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    kv_heads = heads // group
    b, kv_head = bh // kv_heads, bh % kv_heads
    h = kv_head * group
    n_queries, n_keys = _length(QueryStarts, b, n_queries, PACKED), _length(KeyStarts, b, n_keys, PACKED)
    k_base = _first(KeyStarts, b, k_sb, k_st, PACKED) + kv_head * k_sh
    v_base = _first(KeyStarts, b, v_sb, v_st, PACKED) + kv_head * v_sh
    q_base = _first(QueryStarts, b, q_sb, q_st, PACKED) + h * q_sh
    do_base = _first(QueryStarts, b, do_sb, do_st, PACKED) + h * do_sh
    rows = _first(QueryStarts, b, s_sb, 1, PACKED) + h * s_sh
    k = _tile(K, k_base, n0, k_st, n_keys, BLOCK_N, D, BLOCK_D, True)
    v = _tile(V, v_base, n0, v_st, n_keys, BLOCK_N, D, BLOCK_D, True)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    offset = n_keys - n_queries
    # Query tiles in [first, full) see some keys of the tile, those in [full, inner) all, those in [inner, end) some
    # again, others none.
    first = 0
    full = 0
    end = tl.cdiv(n_queries, BLOCK_M)
    if PACKED:  # a tile beyond the sequence has nothing to do
        end = tl.where(n0 < n_keys, end, 0)
    inner = end
    if CAUSAL:
        first = tl.minimum(tl.maximum(n0 - offset, 0) // BLOCK_M, end)
        full = tl.maximum(tl.minimum(tl.cdiv(tl.maximum(n0 + BLOCK_N - 1 - offset, 0), BLOCK_M), end), first)
        if WINDOW:
            last = tl.maximum(tl.minimum(n0 + BLOCK_N, n_keys) - 1 + window - offset, 0)
            end = tl.maximum(tl.minimum(tl.cdiv(last, BLOCK_M), end), first)
            full = tl.minimum(full, end)
            inner = tl.minimum(tl.maximum(tl.maximum(n0 + window - offset, 0) // BLOCK_M, full), end)
        dk, dv = _dkdv_queries(
            dk, dv, k, v, Q, DOut, Base + rows, Norm + rows, Delta + rows, q_base, do_base, q_st, q_sh, do_st, do_sh,
            n0, first, full - first, group, s_sh, n_queries, offset, window, scale, cap,
            True, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dk, dv = _dkdv_queries(
        dk, dv, k, v, Q, DOut, Base + rows, Norm + rows, Delta + rows, q_base, do_base, q_st, q_sh, do_st, do_sh,
        n0, full, inner - full, group, s_sh, n_queries, offset, window, scale, cap,
        False, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if WINDOW:
        dk, dv = _dkdv_queries(
            dk, dv, k, v, Q, DOut, Base + rows, Norm + rows, Delta + rows, q_base, do_base, q_st, q_sh, do_st, do_sh,
            n0, inner, end - inner, group, s_sh, n_queries, offset, window, scale, cap,
            True, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    base = _first(KeyStarts, b, dk_sb, dk_st, PACKED) + kv_head * dk_sh
    _store_tile(DK, base, n0, dk_st, n_keys, dk * scale, BLOCK_N, D, BLOCK_D)
    _store_tile(DV, base, n0, dk_st, n_keys, dv, BLOCK_N, D, BLOCK_D)


@triton.jit
def _dq_keys(
    dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_stride, v_stride,
    m0, begin, end, n_keys, offset, window, scale, cap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the key tiles in [begin, end) to dq."""
    row = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in range(begin, end, BLOCK_N):
        k = _tile(K, k_base, n0, k_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        v = _tile(V, v_base, n0, v_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAP:
            s = _capped(s, cap)
        p = _probability(s, base[:, None], norm[:, None], scale, q.dtype == tl.float32)
        if MASKED:
            col = n0 + tl.arange(0, BLOCK_N)[None, :]
            p = tl.where((col < n_keys) & _sees(row, col, offset, window, CAUSAL, WINDOW), p, 0.0)
        ds = p * (tl.dot(dout, tl.trans(v), input_precision="ieee") - delta[:, None])
        if CAP:  # times tanh's derivative
            ds *= 1.0 - (s / cap) * (s / cap)
        dq = _dot(ds.to(k.dtype), k, dq)
    return dq


@triton.jit(do_not_specialize=SIZES)
def _attention_dq_kernel(
    Q, K, V, DOut, DQ, Base, Norm, Delta, QueryStarts, KeyStarts, q_sb, q_st, q_sh, k_sb, k_st, k_sh,
    v_sb, v_st, v_sh, do_sb, do_st, do_sh,
    dq_sb, dq_st, dq_sh, s_sb, s_sh, heads, group, n_queries, n_keys, window, scale, cap,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dq = ds k * scale for one query tile of one head, ds = p * (dout v^T - delta)."""
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CAUSAL:
        tile = n_tiles - 1 - tile
    m0 = tile * BLOCK_M
    n_queries, n_keys = _length(QueryStarts, b, n_queries, PACKED), _length(KeyStarts, b, n_keys, PACKED)
    k_base = _first(KeyStarts, b, k_sb, k_st, PACKED) + (h // group) * k_sh
    v_base = _first(KeyStarts, b, v_sb, v_st, PACKED) + (h // group) * v_sh
    q_base = _first(QueryStarts, b, q_sb, q_st, PACKED) + h * q_sh
    do_base = _first(QueryStarts, b, do_sb, do_st, PACKED) + h * do_sh
    offset = n_keys - n_queries
    q = _tile(Q, q_base, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    dout = _tile(DOut, do_base, m0, do_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    row = m0 + tl.arange(0, BLOCK_M)
    inside = row < n_queries
    row += _first(QueryStarts, b, s_sb, 1, PACKED) + h * s_sh
    base = tl.load(Base + row, mask=inside, other=0.0 if q.dtype == tl.float32 else float("inf"))
    norm = tl.load(Norm + row, mask=inside, other=0.0) if q.dtype == tl.float32 else base
    delta = tl.load(Delta + row, mask=inside, other=0.0)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    begin = 0  # as in the forward kernel
    inner = 0
    end = n_keys
    full = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.maximum(m0 + BLOCK_M + offset, 0))
        full = tl.minimum(n_keys, tl.maximum(m0 + 1 + offset, 0))
    if PACKED:
        end = tl.where(m0 < n_queries, end, 0)
        full = tl.minimum(full, end)
    full = full // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(m0 + 1 + offset - window, 0) // BLOCK_N * BLOCK_N
        inner = tl.minimum(tl.cdiv(tl.maximum(m0 + BLOCK_M + offset - window, 0), BLOCK_N) * BLOCK_N, end)
        full = tl.maximum(full, inner)
        dq = _dq_keys(
            dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_st, v_st,
            m0, begin, inner, n_keys, offset, window, scale, cap,
            True, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_st, v_st,
        m0, inner, full, n_keys, offset, window, scale, cap,
        False, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    dq = _dq_keys(
        dq, q, dout, base, norm, delta, K, V, k_base, v_base, k_st, v_st,
        m0, full, end, n_keys, offset, window, scale, cap,
        True, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    _store_tile(
        DQ,
        _first(QueryStarts, b, dq_sb, dq_st, PACKED) + h * dq_sh,
        m0,
        dq_st,
        n_queries,
        dq * scale,
        BLOCK_M,
        D,
        BLOCK_D,
    )
