"""CrossEntropyLoss."""

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import InputError


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """torch.nn.CrossEntropyLoss of class indices; weights of classes and targets that are probabilities are refused.

    input: (N, C), (C,) or (N, C, d1, ...); target: (N,), () or (N, d1, ...) int64, or uint8, which PyTorch takes of the
    first two alone. The loss is float32 for a 16-bit input, and the mean over no target is 0 where PyTorch's is NaN.
    `z_loss` and `in_place` are those of `llmfast.ops.cross_entropy`.
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: Any = None,
        ignore_index: int = -100,
        reduce: Any = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        in_place: bool = False,
    ) -> None:
        if weight is not None:
            raise InputError("CrossEntropyLoss: weight is not supported; use torch.nn.CrossEntropyLoss for it")
        super().__init__(None, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.z_loss, self.in_place = z_loss, in_place

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        classes = input.dim() - 1 if input.dim() < 2 else 1
        if target.is_floating_point():
            raise InputError(f"CrossEntropyLoss: target has dtype {target.dtype}; it must hold class numbers, int64")
        expected = (*input.shape[:classes], *input.shape[classes + 1 :])
        if input.dim() == 0 or tuple(target.shape) != expected:
            raise InputError(
                f"CrossEntropyLoss: input is {tuple(input.shape)} and target {tuple(target.shape)}; they must be"
                " (N, C) and (N,), (C,) and (), or (N, C, d1, ...) and (N, d1, ...)"
            )
        target = target.long() if target.dtype is torch.uint8 else target
        logits = input.movedim(classes, -1)
        loss = ops.cross_entropy(
            logits.reshape(-1, logits.shape[-1]),
            target.reshape(-1),
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,  # pyright: ignore[reportArgumentType]
            in_place=self.in_place,
        )
        return loss.view(target.shape) if self.reduction == "none" else loss
