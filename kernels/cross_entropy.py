"""Cross-entropy of logits with class numbers, forward and backward.

Logits are read once forward, each lane keeping a running maximum and sum of exponentials (online softmax,
https://arxiv.org/abs/1805.02867), rescaled once for eight elements; backward reads them once more and writes the
gradient, in their place where asked. Arithmetic is float32. With lse the logsumexp of a row x with target t,
  loss = lse - (1 - smoothing) x_t - smoothing mean(x) + z lse^2,
  dx = g ((1 + 2 z lse) softmax(x) - (1 - smoothing) [t] - smoothing / classes).
A target out of range makes its row's loss and gradient NaN: nothing is read outside the row. Not supported: float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, exponential

LANE: tl.constexpr = tl.constexpr(8)  # elements a lane takes at once: a 16-byte vector of 16-bit values
MAX_BLOCK = 8192
BWD_BLOCK = 2048


@triton.jit
def _cross_entropy_fwd_kernel(
    X, Targets, Losses, Maxima, Sums, x_stride, n_classes, ignore_index, smoothing, z_loss,
    SMOOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (rows, >= n_classes) with a row stride; Targets: (rows,) int64; Losses, Maxima, Sums: (rows,) fp32. A row a
    program. Rows to ignore are not read; their statistics stay unset."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(Targets + row)
    if target == ignore_index:
        tl.store(Losses + row, 0.0)
        return
    EXACT: tl.constexpr = X.dtype.element_ty == tl.float32
    X += row * x_stride
    element = tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]
    m = tl.full([BLOCK // LANE], -float("inf"), tl.float32)
    s = tl.zeros([BLOCK // LANE], tl.float32)
    total = tl.zeros([BLOCK // LANE], tl.float32)
    for start in range(0, n_classes, BLOCK):
        col = start + element
        x = tl.load(X + col, mask=col < n_classes, other=-float("inf")).to(tl.float32)
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
    inside = (target >= 0) & (target < n_classes)
    x_target = tl.load(X + target, mask=inside, other=float("nan")).to(tl.float32)
    log_sum = tl.log(row_sum)
    lse = row_max + log_sum
    # The difference first: of a large maximum and its like little is lost then.
    loss = (row_max - x_target) + log_sum + z_loss * lse * lse
    if SMOOTH:
        loss += smoothing * (x_target - tl.sum(total, 0) / n_classes)
    tl.store(Losses + row, loss)
    tl.store(Maxima + row, row_max)
    tl.store(Sums + row, row_sum)


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
    ignore_index, smoothing, z_loss, MEAN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row and BLOCK columns a program. Grad: one number, or one a row; X, DX: (rows, n_cols) with row strides, DX may
    be X."""
    blocks = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    EXACT: tl.constexpr = X.dtype.element_ty == tl.float32
    # Nothing waits for the target: rows to ignore are few, and read in vain.
    x = tl.load(X + row * x_stride + col, mask=col < n_classes, other=-float("inf")).to(tl.float32)
    target = tl.load(Targets + row)
    g = tl.load(Grad + row * grad_stride).to(tl.float32)
    if MEAN:
        g = tl.div_rn(g, tl.load(Count))
    g = tl.where((target >= 0) & (target < n_classes), g, float("nan"))
    m = tl.load(Maxima + row)
    s = tl.load(Sums + row)
    weight = 1.0 + 2.0 * z_loss * (m + tl.log(s))
    e = exponential(x - m, EXACT)
    p = tl.div_rn(e, s) if EXACT else e * (1.0 / s)
    dx = g * (weight * p - tl.where(col == target, 1.0 - smoothing, 0.0) - smoothing / n_classes)
    dx = tl.where((col < n_classes) & (target != ignore_index), dx, 0.0)
    tl.store(DX + row * dx_stride + col, dx.to(DX.dtype.element_ty), mask=col < n_cols)


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
    n_rows = rows.shape[0]
    losses, statistics = (torch.empty(s, dtype=torch.float32, device=logits.device) for s in ((n_rows,), (2, n_rows)))
    new = torch.empty if n_rows else torch.zeros
    loss, count = (new((), dtype=torch.float32, device=logits.device) for _ in range(2))
    if n_rows > 0:
        block = min(MAX_BLOCK, max(128, triton.next_power_of_2(n_classes)))
        _cross_entropy_fwd_kernel[(n_rows,)](
            rows, targets, losses, *statistics, rows.stride(0), n_classes, ignore_index, label_smoothing, z_loss,
            SMOOTH=label_smoothing != 0.0, BLOCK=block, num_warps=max(1, block // 1024),
        )  # fmt: skip
        block = min(8192, max(32, triton.next_power_of_2(n_rows)))
        _reduce_losses_kernel[(1,)](
            losses, targets, loss, count, n_rows, ignore_index,
            MEAN=reduction == "mean", BLOCK=block, num_warps=max(1, block // 256),
        )  # fmt: skip
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
    """-> dlogits, of logits' dtype: `logits` itself, overwritten, if `in_place`, else contiguous."""
    rows = as_rows(logits)  # a copy where its elements are not adjacent
    dx = rows if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    n_rows, n_cols = rows.shape
    if n_rows > 0:
        block = min(BWD_BLOCK, max(128, triton.next_power_of_2(n_cols)))
        _cross_entropy_bwd_kernel[(n_rows * triton.cdiv(n_cols, block),)](
            grad, rows, targets.contiguous(), *statistics, count, dx, grad.stride(0) if grad.dim() else 0,
            rows.stride(0), dx.stride(0), n_cols, n_classes, ignore_index, label_smoothing, z_loss,
            MEAN=reduction == "mean", BLOCK=block, num_warps=max(1, block // 512),
        )  # fmt: skip
    if not in_place:
        return dx
    return logits if rows.data_ptr() == logits.data_ptr() else logits.copy_(rows)


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
