"""Cross-entropy of a linear layer's outputs that never holds more than a chunk of the logits.

Rows are taken in chunks: their logits by a matrix product, the loss and, in the logits' memory, their gradient by the
kernels of cross_entropy, and what that gives x, weight and bias by further products (the idea of
https://arxiv.org/abs/2410.10989). So gradients are ready after the forward pass, for an upstream gradient of 1, and the
backward pass scales them. The weight's is summed over chunks in float32. A chunk's logits are as large as the weight,
or an eighth of all: smaller ones would spend more time on reading and writing that sum. Not supported: float64, and
reduction="none", for which gradients cannot be made before the upstream gradient is known.
"""

import torch
from torch import Tensor

from .cross_entropy import cross_entropy_bwd, cross_entropy_fwd


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, total in float32; the first time instead of what it holds."""
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
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """x: (N, D); weight: (V, D); targets: (N,) int64; bias: (V,) or None -> loss () float32 and, as `needs` says, the
    gradients of x (its dtype), weight and bias (float32)."""
    n_rows, depth = x.shape
    classes = weight.shape[0]
    loss, ones = (torch.full((), v, dtype=torch.float32, device=x.device) for v in (0.0, 1.0))
    scale = ones if reduction == "sum" else 1.0 / (targets != ignore_index).sum().clamp(min=1).float()
    dx = torch.empty_like(x) if needs[0] else None
    new = torch.empty if n_rows else torch.zeros
    dw = new(weight.shape, dtype=torch.float32, device=x.device) if needs[1] else None
    db = torch.zeros((classes,), dtype=torch.float32, device=x.device) if needs[2] else None
    options = (ignore_index, label_smoothing, z_loss, "sum", classes, True)
    chunk = max(depth, -(-n_rows // 8))
    # One memory for all chunks; a row begins a multiple of 64 elements after the last, so that vectors of it are whole.
    buffer = torch.empty((min(chunk, n_rows), -(-classes // 64) * 64), dtype=x.dtype, device=x.device)
    for start in range(0, n_rows, chunk):
        rows, wanted = x[start : start + chunk], targets[start : start + chunk]
        logits = buffer[: rows.shape[0], :classes]
        if bias is None:
            torch.mm(rows, weight.t(), out=logits)
        else:
            torch.addmm(bias, rows, weight.t(), out=logits)
        part, statistics, count = cross_entropy_fwd(logits, wanted, *options)
        loss += part
        dlogits = cross_entropy_bwd(scale, logits, wanted, statistics, count, *options) if any(needs) else logits
        if dx is not None:
            torch.mm(dlogits, weight, out=dx[start : start + chunk])
        if dw is not None:
            _add_product(dw, dlogits.t(), rows, start == 0)
        if db is not None:
            db += dlogits.sum(0, dtype=torch.float32)
    return loss * scale, dx, dw, db


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
    grad: Tensor, gradients: list[Tensor | None], dtypes: list[torch.dtype]
) -> list[Tensor | None]:
    """The gradients, for the upstream gradient `grad` and in their dtypes."""
    one = grad.reshape(1)  # a tensor without dimensions would be rounded to the gradient's dtype first
    return [
        None if g is None else torch.mul(g, one, out=torch.empty_like(g, dtype=dtype))
        for g, dtype in zip(gradients, dtypes, strict=True)
    ]


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
