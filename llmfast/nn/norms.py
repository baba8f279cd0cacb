"""LayerNorm and RMSNorm."""

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError


def _as_rows(op: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x with the dimensions that are normalised flattened into one."""
    if tuple(x.shape[-len(shape) :]) != shape:
        raise InputError(f"{op}: x has shape {tuple(x.shape)}; its last dimensions must be {shape}")
    return x if len(shape) == 1 else x.flatten(-len(shape))


def _flat(p: Tensor | None) -> Tensor | None:
    return p if p is None or p.dim() == 1 else p.flatten()


class LayerNorm(nn.LayerNorm):
    """torch.nn.LayerNorm. x: (..., *normalized_shape) -> as x; the parameters may also be float32 beside a 16-bit x."""

    def forward(self, input: Tensor) -> Tensor:
        rows = _as_rows("LayerNorm", input, self.normalized_shape)
        return ops.layer_norm(rows, _flat(self.weight), _flat(self.bias), self.eps).view(input.shape)


class RMSNorm(nn.RMSNorm):
    """torch.nn.RMSNorm. x: (..., *normalized_shape) -> as x; the weight may also be float32 beside a 16-bit x.

    With eps=None it is the machine epsilon of x's dtype, as PyTorch has it.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = _as_rows("RMSNorm", x, self.normalized_shape)
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        return ops.rms_norm(rows, _flat(self.weight), eps).view(x.shape)
