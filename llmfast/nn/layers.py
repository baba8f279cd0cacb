"""Embedding and Linear: what holds a model's matrices."""

from torch import Tensor, nn

from .. import ops
from ..errors import InputError
from .functional import autocast


class Embedding(nn.Embedding):
    """torch.nn.Embedding, whose weight's gradient is dense and summed in a fixed order; `max_norm`,
    `scale_grad_by_freq` and `sparse` are refused. ids: int64 or int32 of any shape -> (*ids.shape, embedding_dim).
    """

    def forward(self, input: Tensor) -> Tensor:
        for name in ("max_norm", "scale_grad_by_freq", "sparse"):
            if getattr(self, name):
                raise InputError(f"Embedding: {name} is {getattr(self, name)}; only torch.nn.Embedding has it")
        return ops.embedding(self.weight, input.long(), padding_idx=self.padding_idx)


class Linear(nn.Linear):
    """torch.nn.Linear: PyTorch's products, the bias's gradient in one pass. The bias may be float32 beside a 16-bit x
    and weight. Autocast casts x and the weight, as there."""

    def forward(self, input: Tensor) -> Tensor:
        x, weight = autocast(input, self.weight)
        return ops.linear(x, weight, self.bias)
