"""Cross-entropy of logits with class numbers, forward and backward.

Logits are read once forward, each lane keeping a running maximum and sum of exponentials (online softmax,
https://arxiv.org/abs/1805.02867), rescaled once for eight elements; backward reads them once more and writes the
gradient, in their place where asked. Where loss and gradient are wanted at once, one kernel makes both and takes the
second reading from a cache. Arithmetic is float32. With lse the logsumexp of a row x with target t,
  loss = lse - (1 - smoothing) x_t - smoothing mean(x) + z lse^2,
  dx = g ((1 + 2 z lse) softmax(x) - (1 - smoothing) [t] - smoothing / classes).
A target out of range makes its row's loss and gradient NaN: nothing is read outside the row. Not supported: float64.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, cdiv, exponential, new_like, next_power_of_2
from ._launch import launch

LANE: tl.constexpr = tl.constexpr(8)  # elements a lane takes at once: a 16-byte vector of 16-bit values
MAX_BLOCK = 8192
BWD_BLOCK = 2048


class Tile(NamedTuple):
    """How a program of the kernel that makes loss and gradient at once walks its row."""

    block: int  # elements at a time
    warps: int


def _tile(n_cols: int, itemsize: int) -> Tile:
    """Rows are in work as many at once as programs fit, and all of them must fit the L2 cache: longer ones take larger
    blocks, so more registers. By measurement on an H200 (benchmarks/NOTES.md)."""
    if n_cols <= 8192:
        block = max(128, next_power_of_2(n_cols))
        return Tile(block, max(1, block // 1024))
    if itemsize == 4:
        return Tile(8192, 32)
    return Tile(8192 if n_cols <= 65536 else 16384, 16)


@triton.jit
def _loss_of_row(
    X, target, n_cols, n_classes, smoothing, z_loss,
    SMOOTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, HINT: tl.constexpr,
):  # fmt: skip
    """-> the loss of the row that X points to, its maximum and its sum of exponentials against that. PADDED: it has
    columns that are no class."""
    EXACT: tl.constexpr = X.dtype.element_ty == tl.float32
    element = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    inside = (target >= 0) & (target < n_classes)
    x_target = tl.load(X + target, mask=inside, other=float("nan")).to(tl.float32)
    m = tl.full([BLOCK // LANE], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK // LANE], tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    for start in range(0, n_classes, BLOCK):
        col = start + element
        # Asked for by n_cols: up to an odd number of classes no vectors could be loaded.
        x = tl.load(X + col, mask=col < n_cols, other=-float("inf"), eviction_policy=HINT).to(tl.float32)
        if PADDED:
            x = tl.where(col < n_classes, x, -float("inf"))
        larger = tl.maximum(m, tl.max(x, 1))
        # A lane that has seen only -inf keeps a sum of 0: -inf - -inf would make it NaN.
        base = tl.where(larger == -float("inf"), 0.0, larger)
        s = s * exponential(m - base, EXACT) + tl.sum(exponential(x - base[:, None], EXACT), 1)
        m = larger
        if SMOOTH:
            total += tl.sum(tl.where(col < n_classes, x, 0.0), 1)
    row_max = tl.max(m, 0)
    base = tl.where(row_max == -float("inf"), 0.0, row_max)
    row_sum = tl.sum(s * exponential(m - base, EXACT), 0)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    # The difference first: of a large maximum and its like little is lost then.
    loss = (row_max - x_target) + log_sum + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (x_target - tl.sum(total, 0) / n_classes)
    return loss, row_max, row_sum


@triton.jit
def loss_gradient(
    x, col, target, m, s, g, n_classes, smoothing, z_loss, EXACT: tl.constexpr, PADDED: tl.constexpr
):  # fmt: skip
    """That of a row's logits x in columns col, for an upstream gradient g; m and s are the row's maximum and sum. 0 in
    columns that are no class, which only a PADDED row has."""
    inside = (target >= 0) & (target < n_classes)
    g = tl.where(inside, g, float("nan"))
    target = tl.where(inside, target, 0).to(tl.int32)
    weight = 1.0 + 2.0 * z_loss * (m + tl.log(s))
    spread = smoothing / n_classes
    e = exponential(x - m, EXACT)
    if EXACT:
        dx = g * (weight * tl.div_rn(e, s) - tl.where(col == target, 1.0 - smoothing + spread, spread))
    else:  # as much as possible once a row
        dx = (g * weight / s) * e - tl.where(col == target, g * (1.0 - smoothing + spread), g * spread)
    return tl.where(col < n_classes, dx, 0.0) if PADDED else dx


@triton.jit
def _cross_entropy_fwd_kernel(
    X, Targets, Losses, Maxima, Sums, x_stride, n_cols, n_classes, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (rows, n_cols) with a row stride; Targets: (rows,) int64; Losses, Maxima, Sums: (rows,) fp32. A row a program.
    Rows to ignore are not read; their statistics stay unset."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    if target == ignore_index:
        tl.store(Losses + row, 0.0)
        return
    loss, row_max, row_sum = _loss_of_row(
        X + row * x_stride, target, n_cols, n_classes, smoothing, z_loss, SMOOTH, PADDED, BLOCK, ""
    )  # fmt: skip
    tl.store(Losses + row, loss)
    tl.store(Maxima + row, row_max)
    tl.store(Sums + row, row_sum)


@triton.jit
def _cross_entropy_fwd_bwd_kernel(
    X, Targets, Losses, x_stride, n_cols, n_classes, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (rows, n_cols) with a row stride, overwritten by the gradient of the losses' sum; Targets: (rows,) int64;
    Losses: (rows,) fp32. A row a program, which is read twice, the second time from a cache. Rows to ignore are not
    read."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    X += row * x_stride
    element = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    if target == ignore_index:
        tl.store(Losses + row, 0.0)
        for start in range(0, n_cols, BLOCK):
            col = start + element
            tl.store(X + col, tl.zeros([BLOCK // LANE, LANE], X.dtype.element_ty), mask=col < n_cols)
        return
    loss, row_max, row_sum = _loss_of_row(
        X, target, n_cols, n_classes, smoothing, z_loss, SMOOTH, PADDED, BLOCK, "evict_last"
    )  # fmt: skip
    tl.store(Losses + row, loss)
    tl.debug_barrier()  # no thread may write before all have read
    blocks = tl.cdiv(n_cols, BLOCK)
    for i in range(0, blocks):
        col = (blocks - 1 - i) * BLOCK + element  # what was read last is the likeliest to be in a cache yet
        x = tl.load(X + col, mask=col < n_cols, other=0.0, eviction_policy="evict_first").to(tl.float32)
        dx = loss_gradient(
            x, col, target, row_max, row_sum, 1.0, n_classes, smoothing, z_loss,
            X.dtype.element_ty == tl.float32, PADDED,
        )  # fmt: skip
        tl.store(X + col, dx.to(X.dtype.element_ty), mask=col < n_cols)


@triton.jit
def _reduce_losses_kernel(Losses, Targets, Loss, Count, n_rows, ignore_index, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """The losses' sum or mean and the number of rows that count, by one program in a fixed order."""
    total = tl.zeros([BLOCK], tl.float32)
    count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        total += tl.load(Losses + row, mask=row < n_rows, other=0.0)
        target = tl.load(Targets + row, mask=row < n_rows, other=ignore_index)
        count += (target != ignore_index).to(tl.int32)
    counted = tl.sum(count, 0).to(tl.float32)
    loss = tl.sum(total, 0)
    tl.store(Loss, tl.div_rn(loss, tl.maximum(counted, 1.0)) if MEAN else loss)
    tl.store(Count, counted)


@triton.jit
def _cross_entropy_bwd_kernel(
    Grad, X, Targets, Maxima, Sums, Count, DX, grad_stride, x_stride, dx_stride, n_cols, n_classes,
    ignore_index, smoothing, z_loss, MEAN: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row and BLOCK columns a program. Grad: one number, or one a row; X, DX: (rows, n_cols) with row strides, DX may
    be X."""
    blocks = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    # Nothing waits for the target: rows to ignore are few, and read in vain.
    x = tl.load(X + row * x_stride + col, mask=col < n_cols, other=0.0).to(tl.float32)
    target = tl.load(Targets + row)
    g = tl.load(Grad + row * grad_stride).to(tl.float32)
    if MEAN:
        g = tl.div_rn(g, tl.load(Count))
    dx = loss_gradient(
        x, col, target, tl.load(Maxima + row), tl.load(Sums + row), g, n_classes, smoothing, z_loss,
        X.dtype.element_ty == tl.float32, PADDED,
    )  # fmt: skip
    dx = tl.where(target != ignore_index, dx, 0.0)
    tl.store(DX + row * dx_stride + col, dx.to(DX.dtype.element_ty), mask=col < n_cols)


def row_losses(
    rows: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    n_classes: int,
) -> Tensor:
    """rows: (N, V), of unit stride in a row; targets: (N,) -> row maxima and sums (2, N); `losses` (N,) is filled."""
    statistics = torch.empty((2, rows.shape[0]), dtype=torch.float32, device=rows.device)
    n_rows, n_cols = rows.shape
    if n_rows > 0:
        block = min(MAX_BLOCK, max(128, next_power_of_2(n_classes)))
        launch(
            _cross_entropy_fwd_kernel, (n_rows,),
            rows, targets, losses, *statistics, rows.stride(0), n_cols, n_classes, ignore_index, label_smoothing,
            z_loss, SMOOTH=label_smoothing != 0.0, PADDED=n_cols != n_classes, BLOCK=block,
            num_warps=max(1, block // 1024),
        )  # fmt: skip
    return statistics


def row_losses_and_gradients(
    rows: Tensor,
    targets: Tensor,
    losses: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    n_classes: int,
) -> None:
    """rows: (N, V), of unit stride in a row, become the gradient of the losses' sum; `losses` (N,) is filled."""
    n_rows, n_cols = rows.shape
    if n_rows > 0:
        tile = _tile(n_cols, rows.element_size())
        launch(
            _cross_entropy_fwd_bwd_kernel, (n_rows,),
            rows, targets, losses, rows.stride(0), n_cols, n_classes, ignore_index, label_smoothing, z_loss,
            SMOOTH=label_smoothing != 0.0, PADDED=n_cols != n_classes, BLOCK=tile.block, num_warps=tile.warps,
        )  # fmt: skip


def reduce_losses(losses: Tensor, targets: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """losses: (N,) float32 -> their mean over the targets that count, or their sum, and the number of these targets."""
    n_rows = losses.shape[0]
    new = torch.empty if n_rows else torch.zeros
    loss, count = (new((), dtype=torch.float32, device=losses.device) for _ in range(2))
    if n_rows > 0:
        block = min(8192, max(32, next_power_of_2(n_rows)))
        launch(
            _reduce_losses_kernel, (1,),
            losses, targets, loss, count, n_rows, ignore_index,
            MEAN=reduction == "mean", BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
    return loss, count


def cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits: (N, V); targets: (N,) int64 -> loss () or (N,), row maxima and sums (2, N), targets counted ()."""
    rows, targets = as_rows(logits), targets.contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=logits.device)
    statistics = row_losses(rows, targets, losses, ignore_index, label_smoothing, z_loss, n_classes)
    loss, count = reduce_losses(losses, targets, ignore_index, reduction)
    return losses if reduction == "none" else loss, statistics, count


def cross_entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> Tensor:
    """-> dlogits, of logits' dtype: `logits` itself, overwritten, if `in_place` and its elements are adjacent, in rows
    that share no memory, as an expanded tensor's do; else contiguous."""
    rows = as_rows(logits)  # a copy where its elements are not adjacent
    n_rows, n_cols = rows.shape
    in_place = in_place and (n_rows < 2 or rows.stride(0) >= n_cols)
    dx = rows if in_place else new_like(logits)
    if n_rows > 0:
        block = min(BWD_BLOCK, max(128, next_power_of_2(n_cols)))
        launch(
            _cross_entropy_bwd_kernel, (n_rows * cdiv(n_cols, block),),
            grad, rows, targets.contiguous(), *statistics, count, dx, grad.stride(0) if grad.dim() else 0,
            rows.stride(0), dx.stride(0), n_cols, n_classes, ignore_index, label_smoothing, z_loss,
            MEAN=reduction == "mean", PADDED=n_cols != n_classes, BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    return logits if in_place and rows.data_ptr() == logits.data_ptr() else dx


def cross_entropy_limits(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> str | None:
    """Why there are no rows to work on."""
    return "needs at least one class" if logits.shape[1] == 0 else None
