"""How a model is trained: every knob of the loop is a field here."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError


@dataclass(frozen=True)
class TrainConfig:
    """A training run. One step is one update of the weights, from batch_size * accumulation sequences.

    Resuming reproduces an uninterrupted run bit for bit, on one machine, only without `budget_seconds`: with it the
    learning rate follows the clock.
    """

    max_steps: int
    """Steps after which training ends."""
    batch_size: int = 8
    """Sequences computed at once."""
    accumulation: int = 1
    """Batches whose gradients add up to one step."""
    context: int = 256
    """Tokens a sequence."""
    learning_rate: float = 1e-3
    """The highest rate, reached at the end of the warm-up."""
    min_lr_ratio: float = 0.1
    """The last rate as a share of `learning_rate`, 0 to 1."""
    warmup_steps: int = 20
    """Steps over which the rate rises linearly."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay of the matrices of the blocks and head."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay a step of AdamW's mean and mean square of the gradients."""
    grad_clip: float = 1.0
    """Largest L2 norm of all gradients together; infinity for no limit."""
    eval_every: int = 100
    """Steps between evaluations; one more follows the last step."""
    save_every: int = 100
    """Steps between checkpoints; one more follows the last step."""
    seed: int = 0
    """Of dropout; 0 or more."""
    budget_seconds: float | None = None
    """Wall-clock seconds, evaluations and saves counted, after which the schedule is complete at whatever step."""
    deterministic: bool = False
    """Refuse operations that may give other bits on the same machine (torch.use_deterministic_algorithms)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation", "context", "eval_every", "save_every"):
            self._check(name, isinstance(getattr(self, name), int) and getattr(self, name) >= 1, "a positive integer")
        for name in ("learning_rate", "grad_clip"):
            self._check(name, getattr(self, name) > 0, "positive")
        self._check("learning_rate", math.isfinite(self.learning_rate), "finite")
        self._check("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "in [0, 1]")
        self._check("warmup_steps", self.warmup_steps >= 0, "0 or more")
        self._check("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number")
        self._check("seed", self.seed >= 0, "0 or more")
        self._check("betas", len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        self._check("budget_seconds", self.budget_seconds is None or 0 < self.budget_seconds < math.inf, "positive")

    def _check(self, name: str, valid: bool, requirement: str) -> None:
        if not valid:
            raise InputError(f"TrainConfig.{name} is {getattr(self, name)!r}; it must be {requirement}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.context

    def check_fits(self, context_length: int) -> None:
        """Raise InputError if a model of `context_length` tokens cannot be trained with this."""
        self._check("context", self.context <= context_length, f"at most {context_length}, the model's")

    def to_dict(self) -> dict[str, Any]:
        """Values that survive JSON."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Inverse of `to_dict`. Unknown and missing fields are refused by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown TrainConfig fields: {', '.join(sorted(unknown))}")
        if "betas" in values:  # JSON has no tuples
            values = values | {"betas": tuple(values["betas"])}
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"incomplete TrainConfig: {error}") from None
