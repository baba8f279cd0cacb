"""Cases of the losses."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from ...ops.reference import fp8_linear_cross_entropy
from .base import Defaults, Work


@dataclass(frozen=True)
class CrossEntropyCase(Defaults):
    """Cross-entropy of (rows, classes) logits; every fifth target is left out."""

    rows: int
    classes: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: Literal["mean", "sum", "none"] = "mean"
    padding: int = 0
    """Columns at the end that are no classes."""
    in_place: bool = False
    op: str = "cross_entropy"

    @property
    def label(self) -> str:
        label = f"{self.rows}x{self.classes}"
        if self.reduction != "mean":
            label += f" {self.reduction}"
        for name in ("label_smoothing", "z_loss", "padding"):
            if getattr(self, name):
                label += f" {name} {getattr(self, name)}"
        return label + " in place" * self.in_place

    @property
    def plain(self) -> bool:
        return self == CrossEntropyCase(self.rows, self.classes)

    @property
    def output(self) -> tuple[int, ...]:
        return (self.rows,) if self.reduction == "none" else ()

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"logits": (self.rows, self.classes)}

    def targets(self, device: torch.device) -> Tensor:
        row = torch.arange(self.rows, device=device)
        return torch.where(row % 5 == 4, -100, row * 7919 % (self.classes - self.padding))

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        logits = tensors[0].clone() if self.in_place else tensors[0]  # the inputs outlive it
        return ops.cross_entropy(
            logits,
            self.targets(logits.device),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
            n_classes=self.classes - self.padding,
            in_place=self.in_place,
            backend=backend,
        )

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.cross_entropy at the tensors' dtype, its result widened to ours; 0 where it would be 0 / 0."""
        logits = tensors[0][:, : self.classes - self.padding]
        targets = self.targets(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.rows == 0:
            empty = 0 * tensors[0].sum(-1)
            return (empty if self.reduction == "none" else empty.sum()).to(wide)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction=self.reduction)
        if self.z_loss:
            counted = targets != -100
            squares = logits.logsumexp(-1).square() * counted
            if self.reduction != "none":
                squares = squares.sum() / (counted.sum() if self.reduction == "mean" else 1)
            loss = loss + self.z_loss * squares
        return loss.to(wide)

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float((1 if direction == "fwd" else 2) * self.rows * self.classes * itemsize), 0.0)


@dataclass(frozen=True)
class LinearCrossEntropyCase(Defaults):
    """Cross-entropy of (rows, depth) @ (classes, depth)^T."""

    rows: int
    depth: int
    classes: int
    bias: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    op: str = "linear_cross_entropy"
    output: tuple[int, ...] = ()
    joint = True

    @property
    def label(self) -> str:
        label = f"{self.rows}x{self.depth}x{self.classes}" + " bias" * self.bias
        return label if self.reduction == "mean" else f"{label} {self.reduction}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        shapes = {"x": (self.rows, self.depth), "weight": (self.classes, self.depth)}
        return shapes | ({"bias": (self.classes,)} if self.bias else {})

    def targets(self, device: torch.device) -> Tensor:
        return CrossEntropyCase(self.rows, self.classes).targets(device)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        x, weight, *bias = tensors
        return ops.linear_cross_entropy(
            x, weight, self.targets(x.device), *bias, reduction=self.reduction, backend=backend
        )

    def torch(self, *tensors: Tensor) -> Tensor:
        """The logits at the tensors' dtype, and their loss in float32, as models have it."""
        loss = CrossEntropyCase(self.rows, self.classes, reduction=self.reduction)
        return loss.torch(F.linear(*tensors).to(torch.promote_types(tensors[0].dtype, torch.float32)))

    def work(self, direction: str, itemsize: int) -> Work:
        """Matrix products: one for the loss, three for it and the gradients."""
        flops = 2.0 * self.rows * self.depth * self.classes * (1 if direction == "fwd" else 3)
        return Work(0.0, flops)


@dataclass(frozen=True)
class Fp8LinearCrossEntropyCase(LinearCrossEntropyCase):
    """The same by 8-bit floats."""

    op: str = "fp8_linear_cross_entropy"

    def looseness(self, result: Tensor) -> float:
        """PyTorch's sums of products are of float32, those of 8 bits on a GPU of some 14 bits."""
        return 4.0

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        x, weight = tensors
        targets = self.targets(x.device)
        return ops.fp8_linear_cross_entropy(x, weight, targets, reduction=self.reduction, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """The reference, whose rounding of a gradient PyTorch has no functions for, at the tensors' dtype."""
        x, weight = tensors
        return fp8_linear_cross_entropy(x, weight, self.targets(x.device), -100, self.reduction)
