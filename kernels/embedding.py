"""The gradient of an embedding table, without atomics: bitwise repeatable.

Tokens are sorted (stably), so that those of one row of the table are neighbours; a program adds up the gradients of its
row's, in the order of the text, in float32. Forward is PyTorch's own gather. Not supported: float64.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows

ROWS = 16  # gradients added at once


@triton.jit
def _embedding_bwd_kernel(DY, Order, Starts, DW, dy_stride, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """DY: (tokens, n_cols) with a row stride; Order: (tokens,) int64, tokens by row of the table; Starts: (rows + 1,)
    int64, where those of each row begin; DW: (rows, n_cols), contiguous. A row and BLOCK columns a program."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    first, end = tl.load(Starts + row), tl.load(Starts + row + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(first, end, ROWS, num_stages=3):
        at = start + tl.arange(0, ROWS)
        token = tl.load(Order + at, mask=at < end, other=0)
        inside = (at < end)[:, None] & (col < n_cols)[None, :]
        total += tl.load(DY + token[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(DW + row * n_cols + col, tl.sum(total, 0).to(DW.dtype.element_ty), mask=col < n_cols)


def embedding_fwd(weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
    """weight: (V, D); tokens: int64 of any shape -> (*tokens.shape, D)."""
    return F.embedding(tokens, weight)


def embedding_bwd(dy: Tensor, weight: Tensor, tokens: Tensor, padding_idx: int | None) -> Tensor:
    """-> dweight, of weight's dtype; zeros in row `padding_idx`."""
    n_rows, n_cols = weight.shape
    dw = torch.empty((n_rows, n_cols), dtype=weight.dtype, device=weight.device)
    if tokens.numel() == 0:
        return dw.zero_()
    dy_rows = as_rows(dy)
    ordered, order = tokens.flatten().sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(n_rows + 1, device=weight.device))
    block = min(256, max(16, triton.next_power_of_2(n_cols)))
    _embedding_bwd_kernel[(n_rows, triton.cdiv(n_cols, block))](
        dy_rows, order, starts, dw, dy_rows.stride(0), n_cols, ROWS=ROWS, BLOCK=block, num_warps=4
    )
    if padding_idx is not None:
        dw[padding_idx] = 0
    return dw


def embedding_limits(weight: Tensor, tokens: Tensor, padding_idx: int | None) -> str | None:
    """Why there is no row to add up."""
    return "needs at least one row and one column" if weight.numel() == 0 else None
