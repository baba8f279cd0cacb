"""GELU and Softmax."""

from torch import Tensor, nn

from .. import ops
from ..errors import InputError


class GELU(nn.GELU):
    """torch.nn.GELU, element by element."""

    def forward(self, input: Tensor) -> Tensor:
        return ops.gelu(input, approximate=self.approximate)  # pyright: ignore[reportArgumentType]


class Softmax(nn.Softmax):
    """torch.nn.Softmax over `dim`, which must be given. Any but the last dimension costs a copy."""

    def forward(self, input: Tensor) -> Tensor:
        if self.dim is None:
            raise InputError("Softmax: dim is None; say which dimension sums to 1, as Softmax(dim=-1)")
        if input.dim() == 0:  # a row of one
            return self.forward(input[None])[0]
        if self.dim in (-1, input.dim() - 1):
            return ops.softmax(input)
        return ops.softmax(input.transpose(self.dim, -1)).transpose(self.dim, -1)
