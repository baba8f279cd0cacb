"""The gradient of an embedding table, without atomics: bitwise repeatable.

Tokens are sorted (stably), so that those of one row of the table are neighbours, and their gradients are added up in
the order of the text, in float32. A row of more than `UNIT` tokens is cut into units of that many, each summed by a
program of its own into a partial, so that a frequent token keeps nobody waiting. The number of units is known on the
device alone: programs are launched for the most there can be. Forward is PyTorch's own gather. Not supported: float64.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, cdiv, next_power_of_2
from ._launch import launch

UNIT = 64
ROWS = 4  # gradients added at once


@triton.jit
def _add_tokens(DY, Order, first, end, dy_stride, col, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the gradients of sorted tokens first to end, for these columns."""
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(first, end, ROWS):
        at = start + tl.arange(0, ROWS)
        token = tl.load(Order + at, mask=at < end, other=0)
        here = (at < end)[:, None] & inside[None, :]
        total += tl.load(DY + token[:, None] * dy_stride + col[None, :], mask=here, other=0.0).to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def _embedding_partials_kernel(
    DY, Order, Starts, UnitEnds, UnitRows, Partial, dy_stride, n_rows, n_cols,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A unit and BLOCK columns a program. DY: (tokens, n_cols) with a row stride; Order: (tokens,) int64, tokens by row
    of the table; Starts: (n_rows + 1,), where those of each row begin; UnitEnds: (n_rows,), where its units end,
    counted over all; UnitRows: (units,), the row of each, n_rows past their end; Partial: (units, n_cols) fp32."""
    unit = tl.program_id(0).to(tl.int64)
    row = tl.load(UnitRows + unit)
    if row < n_rows:
        col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        begin, end = tl.load(Starts + row), tl.load(Starts + row + 1)
        units = tl.cdiv(end - begin, UNIT)
        first = begin + (unit - (tl.load(UnitEnds + row) - units)) * UNIT
        total = _add_tokens(DY, Order, first, tl.minimum(first + UNIT, end), dy_stride, col, col < n_cols, ROWS, BLOCK)
        tl.store(Partial + unit * n_cols + col, total, mask=col < n_cols)


@triton.jit
def _embedding_rows_kernel(
    DY, Order, Starts, UnitEnds, Partial, DW, dy_stride, n_cols,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of the table and BLOCK columns a program: its partials, or its tokens' gradients, added up. Arguments as
    above; DW: (n_rows, n_cols), contiguous."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(Starts + row), tl.load(Starts + row + 1)
    total = tl.zeros([BLOCK], tl.float32)
    if end - first > UNIT:
        unit_end = tl.load(UnitEnds + row)
        for unit in range(unit_end - tl.cdiv(end - first, UNIT), unit_end):
            total += tl.load(Partial + unit * n_cols + col, mask=col < n_cols, other=0.0)
    elif end > first:
        total = _add_tokens(DY, Order, first, end, dy_stride, col, col < n_cols, ROWS, BLOCK)
    tl.store(DW + row * n_cols + col, total.to(DW.dtype.element_ty), mask=col < n_cols)


def embedding_fwd(weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
    """weight: (V, D); tokens: int64 of any shape -> (*tokens.shape, D)."""
    return F.embedding(tokens, weight)


def embedding_bwd(dy: Tensor, weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
    """-> dweight, of weight's dtype; zeros in row `padding_idx`."""
    n_rows, n_cols = weight.shape
    dw = torch.empty((n_rows, n_cols), dtype=weight.dtype, device=weight.device)
    if tokens.numel() == 0:
        return dw.zero_()
    dy_rows, n_tokens = as_rows(dy), tokens.numel()
    ordered, order = tokens.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(n_rows + 1, device=weight.device))
    counts = starts.diff()
    unit_ends = torch.where(counts > UNIT, (counts + UNIT - 1) // UNIT, 0).cumsum(0)
    # A row of more than UNIT tokens has at most twice as many units as whole ones.
    most_units = 2 * (n_tokens // UNIT)
    partial = torch.empty((most_units, n_cols), dtype=torch.float32, device=weight.device)
    block = min(512, max(16, next_power_of_2(n_cols)))
    columns, settings = cdiv(n_cols, block), {"UNIT": UNIT, "ROWS": ROWS, "BLOCK": block, "num_warps": 4}
    if most_units > 0:
        unit_rows = torch.searchsorted(unit_ends, torch.arange(most_units, device=weight.device), right=True)
        launch(
            _embedding_partials_kernel, (most_units, columns),
            dy_rows, order, starts, unit_ends, unit_rows, partial, dy_rows.stride(0), n_rows, n_cols, **settings,
        )  # fmt: skip
    launch(
        _embedding_rows_kernel, (n_rows, columns),
        dy_rows, order, starts, unit_ends, partial, dw, dy_rows.stride(0), n_cols, **settings,
    )  # fmt: skip
    if padding_idx is not None:
        dw[padding_idx] = 0
    return dw


def embedding_limits(weight: Tensor, tokens: Tensor, padding_idx: int | None) -> str | None:
    """Why there is no row to add up."""
    return "needs at least one row and one column" if weight.numel() == 0 else None
