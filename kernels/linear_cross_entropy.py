"""Cross-entropy of a linear layer's outputs that never holds more than a chunk of the logits.

Rows are taken in chunks: their logits by a matrix product, the loss and, in the logits' memory, their gradient by a
kernel of cross_entropy, and what that gives x, weight and bias by further products (the idea of
https://arxiv.org/abs/2410.10989). So gradients of the losses' sum are ready after the forward pass, and the backward
pass scales them by the upstream gradient and, for a mean, the number of targets: not earlier, as a 16-bit dtype would
lose the small probabilities of a large batch. The weight's is summed over chunks in float32. A chunk's logits are as
large as the weight, or an eighth of all: smaller ones would spend more time on reading and writing that sum. Where all
logits take no more than it would, they are one chunk, whose sum bfloat16 can hold. Not supported: float64, and
reduction="none", for which gradients cannot be made before the upstream gradient is known.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import cdiv
from ._launch import launch
from .cross_entropy import reduce_losses, row_losses, row_losses_and_gradients


@triton.jit
def _linear_cross_entropy_bwd_kernel(X, Grad, Count, Y, size, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """X, Y: (size,); Grad, Count: one number each. PyTorch's product of a float32 tensor and a number on the device,
    into a bfloat16 one, ran at 0.6 TB/s on an H200."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(Grad).to(tl.float32)
    if MEAN:
        g = tl.div_rn(g, tl.maximum(tl.load(Count), 1.0))
    y = tl.load(X + i, mask=i < size).to(tl.float32) * g
    tl.store(Y + i, y.to(Y.dtype.element_ty), mask=i < size)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, total in float32 or a's dtype; the first time instead of what it holds."""
    beta = 0 if first else 1
    if a.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    else:
        torch.addmm(total, a.to(total.dtype), b.to(total.dtype), beta=beta, out=total)


def linear_cross_entropy_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x: (N, D); weight: (V, D); targets: (N,) int64; bias: (V,) or None -> loss () float32, the number of targets that
    count () float32 and, as `needs` says, the gradients of the losses' sum for x (its dtype), weight (float32, or
    bfloat16) and bias (float32)."""
    n_rows, depth = x.shape
    classes = weight.shape[0]
    targets = targets.contiguous()
    losses = torch.empty(targets.shape, dtype=torch.float32, device=x.device)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device) if needs[0] else None
    new = torch.empty if n_rows else torch.zeros
    whole = n_rows <= 2 * depth
    exact = torch.bfloat16 if whole and x.dtype == torch.bfloat16 else torch.float32  # float16 has not the range
    dw = new(weight.shape, dtype=exact, device=x.device) if needs[1] else None
    db = torch.zeros((classes,), dtype=torch.float32, device=x.device) if needs[2] else None
    options = (ignore_index, label_smoothing, z_loss, classes)
    chunk = max(n_rows, 1) if whole else max(depth, -(-n_rows // 8))
    # One memory for all chunks; a row begins a multiple of 64 elements after the last, so that vectors of it are whole.
    buffer = torch.empty((min(chunk, n_rows), -(-classes // 64) * 64), dtype=x.dtype, device=x.device)
    for start in range(0, n_rows, chunk):
        part = slice(start, start + chunk)
        rows, padded = x[part], buffer[: min(chunk, n_rows - start)]
        logits = padded[:, :classes]
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias.to(x.dtype), rows, weight.t(), out=logits)
        (row_losses_and_gradients if any(needs) else row_losses)(padded, targets[part], losses[part], *options)
        if dx is not None:
            torch.mm(logits, weight, out=dx[part])
        if dw is not None:
            _add_product(dw, logits.t(), rows, start == 0)
        if db is not None:
            db += logits.sum(0, dtype=torch.float32)
    return *reduce_losses(losses, targets, ignore_index, reduction), dx, dw, db


def linear_cross_entropy_fwd(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> Tensor:
    """-> the loss alone, () float32."""
    options = (ignore_index, label_smoothing, z_loss, reduction)
    return linear_cross_entropy_gradients(x, weight, targets, bias, *options, (False, False, False))[0]


def linear_cross_entropy_bwd(
    grad: Tensor, count: Tensor, gradient: Tensor, reduction: str, dtype: torch.dtype
) -> Tensor:
    """One of the gradients made above, in `dtype`, for the upstream gradient `grad`."""
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    if out.numel() > 0:
        launch(
            _linear_cross_entropy_bwd_kernel, (cdiv(out.numel(), 2048),),
            gradient, grad, count, out, out.numel(), MEAN=reduction == "mean", BLOCK=2048, num_warps=4,
        )  # fmt: skip
    return out


def linear_cross_entropy_limits(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
) -> str | None:
    """Why the kernels cannot give what is asked."""
    if reduction == "none":
        return "has no reduction 'none'"
    return "needs at least one class" if weight.shape[0] == 0 else None
