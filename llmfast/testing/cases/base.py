"""What every case of an op has, and what it is unless its own class says otherwise."""

from typing import NamedTuple

from torch import Tensor

# One tensor, or those of an op with several.
Result = Tensor | tuple[Tensor, ...]


class Work(NamedTuple):
    """The fewest bytes that must move through device memory, and the floating-point operations of the definition."""

    bytes: float
    flops: float


class Defaults:
    """What a case is unless its own class says otherwise."""

    @property
    def amplification(self) -> float:
        """How far the op can magnify a rounding error of its input."""
        return 1.0

    differentiable = True
    """Whether the op has a gradient."""
    joint = False
    """Whether backward is timed together with forward, which does part of its work."""

    def prepare(self, tensors: list[Tensor]) -> None:
        """Change random inputs in place into those of this case."""

    def looseness(self, result: Tensor) -> float:
        """How many times PyTorch's error is allowed."""
        return 2.0

    def probe(self, t: Tensor) -> Tensor:
        """The part of a tensor that is compared: all of it."""
        return t

    @property
    def plain(self) -> bool:
        """Whether it asks for nothing but what every backend of the op does."""
        return True
