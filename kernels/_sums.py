"""Sums over rows in a fixed order, for the gradients of parameters: of a matrix, and of the partials of other kernels.
A matrix' largest magnitude may be found in the same pass.

Each program sums the rows that it walks, in float32, and a second kernel adds those partials up: no atomics, so that
results are bitwise repeatable.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, await_previous, cdiv, launches_early, multiprocessors
from ._launch import launch

# A warp reads 512 bytes of a row in 16 bits, and each thread of a program 32 elements at once.
TILE = {"ROWS": 16, "BLOCK": 256, "num_warps": 4}
PROGRAMS = 4  # on a multiprocessor


@triton.jit
def _columns_kernel(
    X, Partials, Maxima, x_stride, n_rows, n_cols,
    SUMS: tl.constexpr, MAXIMA: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols) with a row stride; Partials: (num_programs(1), n_cols) float32, sums of columns; Maxima: one
    magnitude of each program, NaN left out."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    maxima = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, n_rows, tl.num_programs(1) * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < n_rows) & (column[None, :] < n_cols)
        x = tl.load(X + row * x_stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        if SUMS:
            sums += x
        if MAXIMA:
            maxima = tl.maximum(maxima, tl.abs(x))
    if SUMS:
        tl.store(Partials + tl.program_id(1).to(tl.int64) * n_cols + column, tl.sum(sums, 0), mask=column < n_cols)
    if MAXIMA:
        tl.store(Maxima + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(maxima, 1), 0))


@triton.jit
def _sum_partials_kernel(
    Partials, First, Second, n_partials, N, ROWS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr
):
    """First, Second: (N,), the sums of Partials: (k, n_partials, N), k = 1 or 2 = num_programs(1)."""
    Partials += tl.program_id(1).to(tl.int64) * n_partials * N
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    await_previous(EARLY)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n_partials, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = (row < n_partials) & (column[None, :] < N)
        total += tl.load(Partials + row * N + column[None, :], mask=inside, other=0.0)
    if tl.program_id(1) == 0:
        tl.store(First + column, tl.sum(total, 0), mask=column < N)
    else:
        tl.store(Second + column, tl.sum(total, 0), mask=column < N)


def sum_partials(partials: Tensor, sums: list[Tensor]) -> None:
    """partials: (k, n, N) float32, contiguous, k = 1 or 2, of the kernel launched last -> their sums over n in `sums`,
    k tensors of (N,) float32."""
    n_sums, n_partials, n_cols = partials.shape
    early = launches_early(partials.device)
    launch(
        _sum_partials_kernel, (cdiv(n_cols, 16), n_sums),
        partials, sums[0], sums[-1], n_partials, n_cols,
        ROWS=512, BLOCK=16, EARLY=early, num_warps=8,
    )  # fmt: skip


def column_sums(x: Tensor) -> Tensor:
    """x: (..., N) -> (N,) float32, the sum of its rows."""
    rows = as_rows(x)
    if rows.numel() == 0:
        return torch.zeros((rows.shape[1],), dtype=torch.float32, device=x.device)
    sums, _ = column_sums_and_maxima(rows, True, False)
    assert sums is not None
    return sums


def column_sums_and_maxima(rows: Tensor, sums: bool, maxima: bool = True) -> tuple[Tensor | None, Tensor]:
    """rows: (M, N), not empty, unit stride in N -> (N,) float32, their sum, if `sums`; and, if `maxima`, some numbers,
    float32, whose largest is the largest magnitude of all, NaN left out."""
    n_rows, n_cols = rows.shape
    columns = cdiv(n_cols, TILE["BLOCK"])
    walkers = max(1, PROGRAMS * multiprocessors(rows.device) // columns)
    walkers = min(walkers, cdiv(n_rows, TILE["ROWS"]))
    partials = torch.empty((1, walkers if sums else 0, n_cols), dtype=torch.float32, device=rows.device)
    found = torch.empty((walkers * columns if maxima else 0,), dtype=torch.float32, device=rows.device)
    launch(
        _columns_kernel, (columns, walkers), rows, partials, found, rows.stride(0), n_rows, n_cols,
        SUMS=sums, MAXIMA=maxima, **TILE,
    )  # fmt: skip
    if not sums:
        return None, found
    total = torch.empty((n_cols,), dtype=torch.float32, device=rows.device)
    sum_partials(partials, [total])
    return total, found
