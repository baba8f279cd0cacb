"""How a model is trained: every knob of the loop is a field here."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import InputError
from ..models import Config

Schedule = Literal["cosine", "trapezoid"]
OptimizerName = Literal["adamw", "muon"]


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
    schedule: Schedule = "cosine"
    """How the rate falls: by half a cosine over the run, or ("trapezoid") on a straight line over its last part."""
    cooldown: float = 0.3
    """That last part, as a share of the run, 0 to 1."""
    optimizer: OptimizerName = "adamw"
    """Of the blocks' matrices: adamw or muon. The rest is always AdamW's."""
    weight_decay: float = 0.1
    """Decoupled decay of the matrices of the blocks and head."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay a step of AdamW's mean and mean square of the gradients."""
    grad_clip: float = 1.0
    """Largest L2 norm of all gradients together; infinity for no limit."""
    spike_threshold: float = math.inf
    """An update is left out where its gradient norm is this many standard deviations above the recent ones' mean."""
    eval_every: int = 100
    """Steps between evaluations; one more follows the last step."""
    save_every: int = 100
    """Steps between checkpoints; one more follows the last step."""
    seed: int = 0
    """Of dropout; 0 or more."""
    budget_seconds: float | None = None
    """Wall-clock seconds, evaluations and saves counted, after which the schedule is complete at whatever step."""
    cuda_graph: bool = False
    """On a GPU, record the forward and backward pass of a batch once and replay it: saves launching its kernels, and
    keeps its memory for itself."""
    activation_checkpointing: bool = False
    """Keep of each block only what goes into it, and run it again in the backward pass: less memory for more time."""
    fp8: bool = False
    """Train by matrix products of 8-bit floats, scaled tensor by tensor: faster, and less exact."""
    deterministic: bool = False
    """Refuse operations that may give other bits on the same machine (torch.use_deterministic_algorithms)."""

    def __post_init__(self) -> None:
        for name in ("max_steps", "batch_size", "accumulation", "context", "eval_every", "save_every"):
            self._check(name, _is_integer(getattr(self, name), 1, 2**31), "a positive integer below 2**31")
        self._check("warmup_steps", _is_integer(self.warmup_steps, 0, 2**31), "0 or more, an integer below 2**31")
        self._check("seed", _is_integer(self.seed, 0, 2**64), "0 or more, an integer below 2**64")
        self._check("learning_rate", _is_number(self.learning_rate) and self.learning_rate > 0, "positive and finite")
        self._check(
            "grad_clip", self.grad_clip == math.inf or (_is_number(self.grad_clip) and self.grad_clip > 0), "positive"
        )
        spike = self.spike_threshold
        self._check("spike_threshold", spike == math.inf or (_is_number(spike) and spike > 0), "positive")
        self._check("min_lr_ratio", _is_number(self.min_lr_ratio) and 0 <= self.min_lr_ratio <= 1, "in [0, 1]")
        self._check("cooldown", _is_number(self.cooldown) and 0 <= self.cooldown <= 1, "in [0, 1]")
        for name, choices in (("schedule", Schedule), ("optimizer", OptimizerName)):
            self._check(name, getattr(self, name) in get_args(choices), f"one of: {', '.join(get_args(choices))}")
        self._check("weight_decay", _is_number(self.weight_decay) and self.weight_decay >= 0, "0 or a positive number")
        pair = isinstance(self.betas, tuple) and len(self.betas) == 2
        self._check("betas", pair and all(_is_number(b) and 0 <= b < 1 for b in self.betas), "two numbers in [0, 1)")
        budget = self.budget_seconds
        self._check("budget_seconds", budget is None or (_is_number(budget) and budget > 0), "positive and finite")
        for name in ("cuda_graph", "activation_checkpointing", "fp8", "deterministic"):
            self._check(name, isinstance(getattr(self, name), bool), "True or False")

    def _check(self, name: str, valid: bool, requirement: str) -> None:
        if not valid:
            raise InputError(f"TrainConfig.{name} is {getattr(self, name)!r}; it must be {requirement}")

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.context

    def check_fits(self, model: Config) -> None:
        """Raise InputError if `model` cannot be trained with this."""
        self._check("context", self.context <= model.context_length, f"at most {model.context_length}, the model's")
        repeats = self.activation_checkpointing and model.dropout > 0.0
        reason = f"a graph does not repeat the random numbers of dropout {model.dropout}"
        self._check(
            "cuda_graph", not (self.cuda_graph and repeats), f"False with activation_checkpointing, as {reason}"
        )
        q_width, kv_width = (n * model.head_dim for n in (model.n_head, model.n_kv_head))
        widths = {"d_model": model.d_model, "d_mlp": model.d_mlp, "q": q_width, "q, k and v": q_width + 2 * kv_width}
        odd = [f"{name} is {n} wide" for name, n in widths.items() if n % 16]
        self._check("fp8", not (self.fp8 and odd), f"False where widths are no multiples of 16: {', '.join(odd)}")

    def to_dict(self) -> dict[str, Any]:
        """Values that survive JSON."""
        return asdict(self) | {"betas": list(self.betas)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TrainConfig":
        """Inverse of `to_dict`. Unknown and missing fields are refused by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown TrainConfig fields: {', '.join(sorted(unknown))}")
        if isinstance(values.get("betas"), list):  # JSON has no tuples
            values = values | {"betas": tuple(values["betas"])}
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"incomplete TrainConfig: {error}") from None


def _is_integer(value: object, least: int, end: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < end


def _is_number(value: object) -> bool:
    """Whether `value` is a finite number that fits a float."""
    if isinstance(value, int) and not isinstance(value, bool):
        return abs(value) < 2**63
    return isinstance(value, float) and math.isfinite(value)
