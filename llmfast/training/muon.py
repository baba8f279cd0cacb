"""Muon: momentum made orthogonal, for the matrices inside a model (https://kellerjordan.github.io/posts/muon/)."""

import torch
from torch import Tensor

MOMENTUM = 0.95
STEPS = 5
# Of the odd polynomial that is applied STEPS times: singular values in (0, 1] come out near 1 (the page above).
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# An orthogonal (r, c) matrix times this and sqrt(max(r, c)) has elements as large as an update of AdamW's, so that both
# share a learning rate and a decay (https://arxiv.org/abs/2502.16982, section 2.2).
SCALE = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """U V^T of each U S V^T, roughly: singular values of 0.7 to 1.2 in place of S. (n, r, c) -> (n, r, c), float32."""
    wide = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if wide else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.bfloat16() if x.is_cuda else x
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.transpose(1, 2) if wide else x).float()


@torch.no_grad()
def update(
    weights: list[Tensor], grads: list[Tensor], momenta: list[Tensor], rate: float, weight_decay: float, scale: Tensor
) -> None:
    """Update float32 matrices and momenta for the gradients grad * scale; where scale is not finite, change nothing.

    Nesterov momentum; those of one shape are multiplied together.
    """
    finite = torch.isfinite(scale)
    by_shape: dict[torch.Size, list[int]] = {}
    for i, weight in enumerate(weights):
        by_shape.setdefault(weight.shape, []).append(i)
    for shape, indices in by_shape.items():
        grad = torch.stack([grads[i].float() for i in indices]) * scale
        momentum = torch.stack([momenta[i] for i in indices]).lerp_(grad, 1.0 - MOMENTUM)
        change = orthogonalized(grad.lerp(momentum, MOMENTUM)) * (SCALE * max(shape) ** 0.5)
        for i, new, step in zip(indices, momentum, change, strict=True):
            updated = weights[i] * (1.0 - rate * weight_decay) - rate * step
            momenta[i].copy_(torch.where(finite, new, momenta[i]))
            weights[i].copy_(torch.where(finite, updated, weights[i]))
