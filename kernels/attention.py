"""Attention for any GPU since sm_80, forward and backward: FlashAttention-2's algorithm (https://arxiv.org/abs/2307.08691).

Scores are never stored: a program holds a tile of queries and walks the keys with a running maximum and sum. The
backward pass recomputes them in two kernels, one over key tiles for dk and dv and one over query tiles for dq, so that
every sum has a fixed order and no atomics are needed (bitwise repeatable). Tensors are (B, T, H, D) with any strides in
B, T and H. Softmax is in base 2 with fp32 lse; products take the tensors' dtype and accumulate in fp32. On sm_90
`attention_hopper` runs wherever it can, and `attention_hopper_bwd`, after the one forward pass or the other: for head
dimensions above 128 the backward pass is the one here.
Not supported: head dimensions above 256, float64, dense masks, dropout.
"""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, architecture, cdiv, exponential, gradients_like, new_like, next_power_of_2
from ._launch import launch
from ._tiles import SIZES, _capped, _dot, _first, _length, _sees, _store_tile, _tile, zero_rest
from .attention_bwd import _attention_dkdv_kernel, _attention_dq_kernel, _attention_rows_kernel

MAX_HEAD_DIM = 256
MAX_ROW_STRIDE = 2**23  # times the 128 rows of a tile


class Packed(NamedTuple):
    """Sequences one after another: where each begins, (B + 1,) int32, among queries and keys; the longest."""

    query_starts: Tensor
    key_starts: Tensor
    n_queries: int
    n_keys: int


class Tiles(NamedTuple):
    """Queries and keys per tile, warps, and depth of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


def attention_limits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float,
    return_lse: bool,
) -> str | None:
    """Why these kernels cannot run this call; None if they can."""
    if q.shape[3] > MAX_HEAD_DIM:
        return f"supports head_dim up to {MAX_HEAD_DIM}, not {q.shape[3]}"
    return None


def attention_kernels(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str:
    """Which kernels run a call with `attention_limits`' arguments, and why not sm_90's own."""
    softcap = options[-2]
    if architecture(q.device) != 90:
        return "portable kernels"
    from .hopper import hopper_limits

    said = []
    for name, direction in (("forward", "fwd"), ("backward", "bwd")):
        reason = hopper_limits(q, k, v, softcap, direction)
        said.append(f"{name}: sm_90's own kernel" if reason is None else f"{name}: portable, sm_90's own {reason}")
    return "; ".join(said)


def _tiles(q: Tensor, direction: str, plain: bool) -> Tiles:
    """Tiles by direction, architecture and head dimension; small for float32, which uses no tensor cores, and for
    windows and capped scores, which take registers that Hopper's large ones have not."""
    if q.dtype == torch.float32:
        table = _FLOAT32
    else:
        table = _HOPPER if architecture(q.device) in (90, 100, 103) and plain else _AMPERE
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
def _fwd_keys(
    acc, m, total, q, K, V, k_base, v_base, k_stride, v_stride, m0, begin, end, n_keys, offset, window, scale, cap,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Walk the key tiles in [begin, end), updating the output, row maxima and row sums; mask only where MASKED."""
    row = m0 + tl.arange(0, BLOCK_M)[:, None]
    for n0 in range(begin, end, BLOCK_N):
        k = _tile(K, k_base, n0, k_stride, n_keys, BLOCK_N, D, BLOCK_D, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CAP:
            s = _capped(s, cap)
        if MASKED:
            col = n0 + tl.arange(0, BLOCK_N)[None, :]
            s = tl.where((col < n_keys) & _sees(row, col, offset, window, CAUSAL, WINDOW), s, -float("inf"))
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
    Q, K, V, Out, Max, Sum, QueryStarts, KeyStarts, q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh,
    o_sb, o_st, o_sh, s_sb, s_sh, heads, group, n_queries, n_keys, window, scale, cap,
    PACKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, CAP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Q, Out: (B, n_queries, heads, D); K, V: (B, n_keys, heads / group, D); Max, Sum: (B, heads, n_queries) fp32. cap:
    of scores before they are scaled. PACKED: sequences lie one after another in T, from QueryStarts and KeyStarts
    (B + 1,) on; n_queries and n_keys are the longest.

    One program per query tile and head. Causal tiles are started longest first.
    """
    n_tiles = tl.cdiv(n_queries, BLOCK_M)
    tile = tl.program_id(0) % n_tiles
    bh = (tl.program_id(0) // n_tiles).to(tl.int64)
    b, h = bh // heads, bh % heads
    if CAUSAL:
        tile = n_tiles - 1 - tile
    m0 = tile * BLOCK_M
    n_queries, n_keys = _length(QueryStarts, b, n_queries, PACKED), _length(KeyStarts, b, n_keys, PACKED)
    q_base = _first(QueryStarts, b, q_sb, q_st, PACKED) + h * q_sh
    o_base = _first(QueryStarts, b, o_sb, o_st, PACKED) + h * o_sh
    k_base = _first(KeyStarts, b, k_sb, k_st, PACKED) + (h // group) * k_sh
    v_base = _first(KeyStarts, b, v_sb, v_st, PACKED) + (h // group) * v_sh
    offset = n_keys - n_queries
    q = _tile(Q, q_base, m0, q_st, n_queries, BLOCK_M, D, BLOCK_D, True)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    m = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # Keys in [begin, inner) are seen by some queries of the tile, those in [inner, full) by all, those in [full, end)
    # by some again, others by none.
    begin = 0
    inner = 0
    end = n_keys
    full = n_keys
    if CAUSAL:
        end = tl.minimum(n_keys, tl.maximum(m0 + BLOCK_M + offset, 0))
        full = tl.minimum(n_keys, tl.maximum(m0 + 1 + offset, 0))
    if PACKED:  # a tile beyond the sequence has nothing to do
        end = tl.where(m0 < n_queries, end, 0)
        full = tl.minimum(full, end)
    full = full // BLOCK_N * BLOCK_N
    if WINDOW:
        begin = tl.maximum(m0 + 1 + offset - window, 0) // BLOCK_N * BLOCK_N
        inner = tl.minimum(tl.cdiv(tl.maximum(m0 + BLOCK_M + offset - window, 0), BLOCK_N) * BLOCK_N, end)
        full = tl.maximum(full, inner)
        acc, m, total = _fwd_keys(
            acc, m, total, q, K, V, k_base, v_base, k_st, v_st, m0, begin, inner, n_keys, offset, window, scale, cap,
            True, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    acc, m, total = _fwd_keys(
        acc, m, total, q, K, V, k_base, v_base, k_st, v_st, m0, inner, full, n_keys, offset, window, scale, cap,
        False, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, m, total = _fwd_keys(
        acc, m, total, q, K, V, k_base, v_base, k_st, v_st, m0, full, end, n_keys, offset, window, scale, cap,
        True, CAUSAL, WINDOW, CAP, D, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    out = acc * tl.div_rn(1.0, tl.where(total == 0.0, 1.0, total))[:, None]
    _store_tile(Out, o_base, m0, o_st, n_queries, out, BLOCK_M, D, BLOCK_D)
    row = m0 + tl.arange(0, BLOCK_M)
    base = _first(QueryStarts, b, s_sb, 1, PACKED) + h * s_sh
    tl.store(Max + base + row, m, mask=row < n_queries)
    tl.store(Sum + base + row, total, mask=row < n_queries)


def _readable(x: Tensor) -> Tensor:
    """x itself, or a copy: the last dimension must have unit stride, and offsets inside a tile must fit 32 bits."""
    unit = x.stride(3) == 1 or x.shape[3] == 1
    return x if unit and x.stride(1) < MAX_ROW_STRIDE else x.contiguous()


def _positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """q and scale such that scores are the same and scale > 0: the kernels take row maxima before scaling."""
    if scale > 0:
        return q, scale
    return (-q, -scale) if scale < 0 else (torch.zeros_like(q), 1.0)


def _constants(
    tiles: Tiles, head_dim: int, packed: bool, causal: bool, window: int | None, softcap: float
) -> dict[str, Any]:
    return {
        "PACKED": packed,
        "CAUSAL": causal,
        "WINDOW": window is not None,
        "CAP": softcap != 0.0,
        "D": head_dim,
        "BLOCK_M": tiles.queries,
        "BLOCK_N": tiles.keys,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
    }


def _on_hopper(q: Tensor, k: Tensor, v: Tensor, softcap: float, direction: str) -> bool:
    """Whether sm_90's own kernel runs this. In Gluon, it is imported for that architecture alone."""
    if architecture(q.device) != 90:
        return False
    from .hopper import hopper_limits

    return hopper_limits(q, k, v, softcap, direction) is None


def _narrow(window: int | None, n_keys: int) -> int | None:
    """The window, where it is less than all keys."""
    return None if window is None or window >= n_keys else window


def _sizes(q: Tensor, k: Tensor, packed: Packed | None) -> tuple[int, int, int]:
    """Sequences, and the most queries and keys of one."""
    if packed is None:
        return q.shape[0], q.shape[1], k.shape[1]
    return packed.query_starts.shape[0] - 1, packed.n_queries, packed.n_keys


def _forward(
    q: Tensor, k: Tensor, v: Tensor, packed: Packed | None, causal: bool, scale: float, window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> out as q, contiguous; statistics (2, B, H, Tq), or (2, 1, H, all queries) of packed sequences."""
    q, scale = _positive_scale(q, scale)
    batch, n_queries, n_keys = _sizes(q, k, packed)
    window = _narrow(window, n_keys)
    q, k, v = _readable(q), _readable(k), _readable(v)
    heads, head_dim = q.shape[2:]
    out = new_like(q)
    new = torch.empty if packed is None else torch.zeros  # of a query after the last sequence, which sees no key
    statistics = new((2, q.shape[0], heads, q.shape[1]), dtype=torch.float32, device=q.device)
    if out.numel() == 0 or batch == 0:
        return out, statistics
    if _on_hopper(q, k, v, softcap, "fwd"):
        from .attention_hopper import attention_hopper_fwd

        attention_hopper_fwd(q, k, v, out, statistics, causal, scale, window, softcap, packed)
        return out, statistics
    tiles = _tiles(q, "fwd", window is None and not softcap)
    starts = (statistics, statistics) if packed is None else packed[:2]
    launch(
        _attention_fwd_kernel, (cdiv(n_queries, tiles.queries) * batch * heads,),
        q, k, v, out, *statistics, *starts, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *statistics.stride()[1:3], heads, heads // k.shape[2], n_queries, n_keys, window or 0, scale, softcap / scale,
        **_constants(tiles, head_dim, packed is not None, causal, window, softcap),
    )  # fmt: skip
    return out, statistics


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor, packed: Packed | None,
    causal: bool, scale: float, window: int | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, n_queries, n_keys = _sizes(q, k, packed)
    window = _narrow(window, n_keys)
    if batch > 0 and _on_hopper(q, k, v, softcap, "bwd"):
        from .attention_hopper_bwd import attention_hopper_bwd

        return attention_hopper_bwd(dout, q, k, v, out, statistics, causal, scale, window, softcap, packed)
    dq, dk, dv = gradients_like(q, k, v)
    if dq.numel() == 0 or dk.numel() == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    sign = math.copysign(1.0, scale) if scale else 0.0
    q, scale = _positive_scale(q, scale)
    dout, q, k, v = _readable(dout), _readable(q), _readable(k), _readable(v)
    heads, head_dim = q.shape[2:]
    rows = torch.empty((3, *statistics.shape[1:]), dtype=torch.float32, device=q.device)
    delta, base, norm = rows
    block_d = max(16, next_power_of_2(head_dim))
    # Of each query alone: packed sequences are one here.
    launch(
        _attention_rows_kernel, (cdiv(q.shape[1], 32) * q.shape[0] * heads,),
        dout, out, *statistics, delta, base, norm, *dout.stride()[:3], *out.stride()[:3], heads, q.shape[1], scale,
        EXACT=q.dtype == torch.float32, D=head_dim, BLOCK_M=32, BLOCK_D=block_d,
    )  # fmt: skip
    starts = (statistics, statistics) if packed is None else packed[:2]
    tensors = (q, k, v, dout), (base, norm, delta, *starts)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *dout.stride()[:3])
    sizes = (*statistics.stride()[1:3], heads, heads // k.shape[2], n_queries, n_keys)
    scores = (window or 0, scale, softcap / scale)
    settings = (head_dim, packed is not None, causal, window, softcap)
    tiles = _tiles(q, "dkdv", window is None and not softcap)
    launch(
        _attention_dkdv_kernel, (cdiv(n_keys, tiles.keys) * batch * k.shape[2],),
        *tensors[0], dk, dv, *tensors[1], *strides, *dk.stride()[:3], *sizes, *scores, **_constants(tiles, *settings),
    )  # fmt: skip
    tiles = _tiles(q, "dq", window is None and not softcap)
    launch(
        _attention_dq_kernel, (cdiv(n_queries, tiles.queries) * batch * heads,),
        *tensors[0], dq, *tensors[1], *strides, *dq.stride()[:3], *sizes, *scores, **_constants(tiles, *settings),
    )  # fmt: skip
    return dq if sign == 1.0 else dq * sign, dk, dv


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) -> out as q, contiguous; statistics (2, B, H, Tq) float32.

    The statistics, which are always there, are each query's largest score m, capped but not scaled, and its sum of
    e^((s - m) * |scale|), apart: in their log-sum-exp the rounding of a large m would take what the sum adds.
    """
    return _forward(q, k, v, None, causal, scale, window, softcap)


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, statistics: Tensor,
    causal: bool, scale: float, window: int | None, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward's tensors and the gradient of `out` -> dq, dk, dv, in memory as `gradients_like` gives it."""
    return _backward(dout, q, k, v, out, statistics, None, causal, scale, window, softcap)


def attention_varlen_limits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float,
    return_lse: bool,
) -> str | None:
    """Why these kernels cannot run this call; None if they can."""
    return f"supports head_dim up to {MAX_HEAD_DIM}, not {q.shape[2]}" if q.shape[2] > MAX_HEAD_DIM else None


def attention_varlen_kernels(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> str:
    return attention_kernels(q[None], k[None], v[None], *options)


def attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q: (all queries, H, D); k, v: (all keys, Hkv, D) -> out as q; attention_fwd's statistics (2, H, all queries)."""
    packed = Packed(query_starts, key_starts, max_queries, max_keys)
    out, statistics = _forward(q[None], k[None], v[None], packed, causal, scale, window, softcap)
    zero_rest(query_starts, key_starts, out[0])
    return out[0], statistics[:, 0]


def attention_varlen_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, query_starts: Tensor, key_starts: Tensor, out: Tensor,
    statistics: Tensor, max_queries: int, max_keys: int, causal: bool, scale: float, window: int | None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The forward's tensors and the gradient of `out` -> dq, dk, dv, in memory as `gradients_like` gives it."""
    packed = Packed(query_starts, key_starts, max_queries, max_keys)
    tensors = (t[None] for t in (dout, q, k, v, out))
    dq, dk, dv = (t[0] for t in _backward(*tensors, statistics[:, None], packed, causal, scale, window, softcap))
    zero_rest(query_starts, key_starts, dq, dk, dv)
    return dq, dk, dv
