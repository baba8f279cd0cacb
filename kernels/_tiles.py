"""What attention's kernels do with tiles of a head: load, store, multiply; cap scores, and tell who sees what. Zeros in
rows that no tile reaches."""

import triton
import triton.language as tl
from torch import Tensor

from ._common import LOG2E, multiprocessors
from ._launch import launch

# Lengths, head counts and windows change from call to call: specialising on them would compile again for no speed.
SIZES = ("heads", "group", "n_queries", "n_keys", "s_sb", "s_sh", "window")


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
def _capped(s, cap):
    """cap * tanh(s / cap), of float32 scores. By e^(-2 |x|), which cannot overflow; near 0, where that would lose
    digits, by the first terms of tanh's series (https://dlmf.nist.gov/4.33)."""
    x = s / cap
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    large = (1.0 - e) / (1.0 + e)
    x2 = x * x
    small = x * (1.0 + x2 * (-1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))))
    return cap * tl.where(tl.abs(x) < 0.25, small, tl.where(x < 0.0, -large, large))


@triton.jit
def _sees(row, key, offset, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query `row` sees `key`, of those that there are: up to its own, and of these the last `window`."""
    visible = key <= row + offset if CAUSAL else (key >= 0) & (row >= 0)
    if WINDOW:
        visible = visible & (key > row + offset - window)
    return visible


@triton.jit
def _first(Starts, b, batch_stride, row_stride, PACKED: tl.constexpr):
    """Offset of sequence b's first row: by a stride, or where sequences lie one after another, from Starts (B + 1,)."""
    if PACKED:
        return tl.load(Starts + b).to(tl.int64) * row_stride
    return b * batch_stride


@triton.jit
def _length(Starts, b, length, PACKED: tl.constexpr):
    """Rows of sequence b: `length`, or what Starts (B + 1,) says."""
    if PACKED:
        return tl.load(Starts + b + 1) - tl.load(Starts + b)
    return length


@triton.jit
def _zero_rows(X, Starts, sequences, n_rows, stride, width, BLOCK: tl.constexpr):
    """Zeros in this program's share of the rows from Starts[sequences] on, of X (n_rows, width)."""
    for row in range(tl.load(Starts + sequences) + tl.program_id(0), n_rows, tl.num_programs(0)):
        for start in range(0, width, BLOCK):
            col = start + tl.arange(0, BLOCK)
            at = (tl.zeros([], tl.int64) + row) * stride + col
            tl.store(X + at, tl.zeros([BLOCK], X.dtype.element_ty), mask=col < width)


@triton.jit(do_not_specialize=("sequences", "n_queries", "n_keys"))
def _zero_rest_kernel(
    Q, K, V, QueryStarts, KeyStarts, sequences, n_queries, n_keys, q_stride, k_stride, q_width, k_width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros after the last of packed sequences, in Q (n_queries, q_width) alone or also in K and V (n_keys, k_width),
    each by programs of its own; where sequences fill them, these return at once."""
    tensor = tl.program_id(1)
    if tensor == 0:
        _zero_rows(Q, QueryStarts, sequences, n_queries, q_stride, q_width, BLOCK)
    elif tensor == 1:
        _zero_rows(K, KeyStarts, sequences, n_keys, k_stride, k_width, BLOCK)
    else:
        _zero_rows(V, KeyStarts, sequences, n_keys, k_stride, k_width, BLOCK)


def zero_rest(query_starts: Tensor, key_starts: Tensor, q: Tensor, *kv: Tensor) -> None:
    """Zeros after the last sequence in q (all queries, H, D) and, where given, k and v (all keys, Hkv, D), which share
    strides; heads are adjacent. Starts: (sequences + 1,), which the host does not read."""
    k, v = kv or (q, q)
    rows = max(q.shape[0], k.shape[0])
    if rows > 0:
        launch(
            _zero_rest_kernel, (min(rows, 2 * multiprocessors(q.device)), 1 + len(kv)),
            q, k, v, query_starts, key_starts, query_starts.shape[0] - 1, q.shape[0], k.shape[0], q.stride(0),
            k.stride(0), q.shape[1] * q.shape[2], k.shape[1] * k.shape[2], BLOCK=1024, num_warps=4,
        )  # fmt: skip
