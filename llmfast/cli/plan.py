"""Everything that decides a run, from options or from a run's `config.json`, and what it will cost."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..models import Config, preset
from ..training import TrainConfig
from .defaults import DEFAULTS
from .runs import config_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """A run: `dtype` names what the model computes in, `data` is the data folder, `eval_tokens` as in Defaults."""

    preset: str
    model: Config
    training: TrainConfig
    dtype: str
    data: str
    eval_tokens: int

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; choose one of: {', '.join(DTYPES)}")
        if type(self.eval_tokens) is not int or self.eval_tokens < 1:
            raise InputError(f"eval_tokens is {self.eval_tokens!r}; it must be a positive integer")
        for name in ("preset", "data"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a text")
        self.training.check_fits(self.model)

    def to_dict(self) -> dict[str, Any]:
        nested = {"model": self.model.to_dict(), "training": self.training.to_dict()}
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | nested

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: Path) -> "Plan":
        """Inverse of `to_dict`; `origin` is the run that an error names."""
        with config_of(origin):
            nested = {
                "model": Config.from_dict(values["model"]),
                "training": TrainConfig.from_dict(values["training"]),
            }
            return cls(**(values | nested))


def make_plan(
    kind: str, preset_name: str | None, dtype: str, data: str, vocab_size: int | None, **options: Any
) -> Plan:
    """The defaults for device type `kind`, with the options that are not None in their place. They are TrainConfig's
    fields, and `tokens`, from which max_steps is made.

    The model gets the vocabulary of the data, `vocab_size`, exactly; None keeps the preset's.
    """
    defaults = DEFAULTS[kind]
    name = preset_name or defaults.preset
    model = preset(name, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    given = {key: value for key, value in options.items() if value is not None}
    tokens = given.pop("tokens", None)
    if tokens is not None:
        if tokens < 1:
            raise InputError(f"tokens is {tokens}; it must be positive")
        given["max_steps"] = 1
    if given.get("max_steps") is not None and "budget_seconds" not in given:
        given["budget_seconds"] = None  # asked for steps: do them, however long they take
    fitting = {"context": min(defaults.training["context"], model.context_length)}
    training = TrainConfig(**(defaults.training | fitting | given))
    if tokens is not None:
        training = dataclasses.replace(training, max_steps=math.ceil(tokens / training.tokens_per_step))
    return Plan(name, model, training, dtype, data, defaults.eval_tokens)


def memory_bytes(plan: Plan) -> int:
    """A rough estimate of what training needs on the device.

    16 bytes a parameter (float32 weight, gradient and AdamW's two moments); 17 values a token, layer and model
    dimension kept for the backward pass (34 bytes in 16 bits, https://arxiv.org/abs/2205.05198, without the attention
    matrix, which fused attention does not keep); the logits and their gradient, and a float32 copy.
    """
    size = DTYPES[plan.dtype].itemsize
    tokens = plan.training.batch_size * plan.training.context
    activations = 17 * size * tokens * plan.model.n_layer * plan.model.d_model
    return 16 * plan.model.n_params + activations + tokens * plan.model.vocab_size * (2 * size + 4)


def describe(plan: Plan) -> str:
    """Parameters, memory and tokens per step, a line each."""
    training = plan.training
    batches = f"{training.accumulation} {'batch' if training.accumulation == 1 else 'batches'}"
    shape = f"{training.batch_size} sequences x {batches} x {training.context} tokens"
    budget = "" if training.budget_seconds is None else f", at most {training.budget_seconds / 60:g} min"
    return "\n".join(
        (
            f"model: {plan.preset}, {plan.model.n_params:,} parameters, vocabulary {plan.model.vocab_size:,}",
            f"memory: about {memory_bytes(plan) / 2**30:.2f} GiB to train in {plan.dtype}",
            f"step: {training.tokens_per_step:,} tokens ({shape})",
            f"run: {training.max_steps:,} steps{budget}",
        )
    )
