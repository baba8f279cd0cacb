"""Cross-entropy of a linear layer's outputs, a chunk of the logits at a time, whose three matrix products are of 8-bit
floats (https://arxiv.org/abs/2209.05433).

As linear_cross_entropy.py has it, but for the gradient of a chunk's logits: it is rounded to e5m2, as it is and
transposed, by the kernel that makes it. Of the losses' sum it is at most 1, so its scale is known before: no pass looks
for its largest magnitude. The weight's gradients of all chunks, eight at most, stand in memory beside one another until
they are added up. Not supported: float64, bias, label smoothing, z-loss, reduction="none".
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, cdiv
from ._fp8 import (
    E4M3,
    E5M2,
    TILE,
    Rounded,
    lacking,
    n_tiles,
    new_rounded,
    product,
    rounded,
    store_rounded,
    tile_place,
    up_to_16,
)
from ._launch import launch
from .cross_entropy import loss_gradient, reduce_losses, row_losses
from .linear_cross_entropy import linear_cross_entropy_bwd

SCALE: tl.constexpr = tl.constexpr(2.0**15)  # times 1 is not above e5m2's largest, 0.875 times 2^16


@triton.jit
def _cross_entropy_bwd_round_kernel(
    X, Targets, Maxima, Sums, Rows, Turned, Inverse, x_stride, padded, n_rows, n_cols, n_classes, ignore_index,
    PADDED: tl.constexpr, KEEP: tl.constexpr, TURN: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """X: (n_rows, n_cols) logits with a row stride; Targets: (n_rows,) int64; Maxima, Sums: (n_rows,) fp32, statistics
    of the rows' first n_classes columns; Inverse: gets 1 / SCALE; the rest as `store_rounded` has it."""
    if tl.program_id(0) == 0:
        tl.store(Inverse, 1.0 / SCALE)
    WIDE: tl.constexpr = X.dtype.element_ty
    row, col = tile_place(n_cols, ROWS, COLS)
    there = row < n_rows
    inside = there[:, None] & (col < n_cols)[None, :]
    x = tl.load(X + row[:, None] * x_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    target = tl.load(Targets + row, mask=there, other=ignore_index)
    counts = target != ignore_index  # the other rows have no statistics
    m, s = tl.load(Maxima + row, mask=there), tl.load(Sums + row, mask=there)
    dx = loss_gradient(
        x, col[None, :], target[:, None], m[:, None], s[:, None], SCALE, n_classes, 0.0, 0.0, WIDE == tl.float32, PADDED
    )
    dx = tl.where(counts[:, None], dx, 0.0)
    store_rounded(dx, row, col, n_cols, padded, n_cols, Rows, Turned, WIDE, KEEP, TURN)


def fp8_linear_cross_entropy_gradients(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """x: (N, D); weight: (V, D); targets: (N,) int64 -> loss () float32, the number of targets that count () float32
    and, as `needs` says, the gradients of the losses' sum for x (its dtype) and weight (float32)."""
    (n_rows, depth), classes = x.shape, weight.shape[0]
    targets = targets.contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    if n_rows == 0:
        dw = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if needs[1] else None
        return *reduce_losses(losses, targets, ignore_index, reduction), dx, dw
    x8 = rounded(as_rows(x), E4M3, True, needs[1])
    w8 = rounded(as_rows(weight), E4M3, True, needs[0])
    chunk = up_to_16(max(depth, cdiv(n_rows, 8)))
    # The weight's gradient, of each chunk: in 16 bits, where these have float32's range.
    dtype = torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32
    sums = torch.empty((cdiv(n_rows, chunk), *w8.rows.shape) if needs[1] else 0, dtype=dtype, device=x.device)
    for start in range(0, n_rows, chunk):
        part = slice(start, min(start + chunk, n_rows))
        logits = product(x8.rows[part], w8.rows, (x8.inverse, w8.inverse), x.dtype, True)
        d8 = _losses_and_gradient(logits, targets[part], losses[part], classes, ignore_index, needs)
        del logits  # before the next chunk's
        if dx is not None:
            rows = d8.rows[: part.stop - start]
            product(rows, w8.turned, (d8.inverse, w8.inverse), x.dtype, False, out=dx[part])
        if needs[1]:
            turned = x8.turned[:, start : start + d8.turned.shape[1]]
            product(d8.turned, turned, (d8.inverse, x8.inverse), dtype, False, out=sums[start // chunk])
    dw = sums.sum(0, dtype=torch.float32)[:classes] if needs[1] else None
    return *reduce_losses(losses, targets, ignore_index, reduction), dx, dw


def _losses_and_gradient(
    logits: Tensor, targets: Tensor, losses: Tensor, n_classes: int, ignore_index: int, needs: tuple[bool, bool]
) -> Rounded:
    """logits: (n, n_classes or more), of which the first n_classes count; `losses` (n,) is filled -> the gradient of
    their sum, as rows and turned, as `needs` says."""
    n_rows, n_cols = logits.shape
    statistics = row_losses(logits, targets, losses, ignore_index, 0.0, 0.0, n_classes)
    d8 = new_rounded(logits, (n_rows, n_cols), E5M2, *needs)
    if any(needs):
        launch(
            _cross_entropy_bwd_round_kernel, (n_tiles(n_rows, n_cols),),
            logits, targets, *statistics, *d8, logits.stride(0), up_to_16(n_rows), n_rows, n_cols, n_classes,
            ignore_index, PADDED=n_cols != n_classes, KEEP=needs[0], TURN=needs[1], **TILE,
        )  # fmt: skip
    return d8.in_format(E5M2)


def fp8_linear_cross_entropy_fwd(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> Tensor:
    """-> the loss alone, () float32."""
    return fp8_linear_cross_entropy_gradients(x, weight, targets, ignore_index, reduction, (False, False))[0]


fp8_linear_cross_entropy_bwd = linear_cross_entropy_bwd


def fp8_linear_cross_entropy_limits(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, reduction: str
) -> str | None:
    """Why the kernels cannot give what is asked."""
    return lacking(x.device)
