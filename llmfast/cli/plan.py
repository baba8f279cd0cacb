"""Everything that decides a run, from options or from a run's `config.json`, and what it will cost."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import hardware
from ..errors import InputError
from ..models import Config, preset
from ..models.gpt import MAX_LOGITS
from ..testing.timing import matrix_product_flops
from ..training import TrainConfig
from ..training.progress import clock
from .defaults import DEFAULTS, FINE_TUNING
from .runs import config_of, read_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AUTO = "auto"  # for a batch size
MEMORY_SHARE = 0.9  # of the device's memory that an automatic batch size fills; the estimate is rough
PEAK_SHARE = 0.4  # of the matrix products' rate that training is expected to reach


@dataclass(frozen=True)
class Plan:
    """A run: `dtype` names what the model computes in, `data` is the data folder, `eval_tokens` as in Defaults.

    `parent` is the run whose weights it begins with, if it fine-tunes; `imported` what is known of the other library's
    model that these came from, for an export.
    """

    preset: str
    model: Config
    training: TrainConfig
    dtype: str
    data: str
    eval_tokens: int
    parent: str | None = None
    imported: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"unknown dtype {self.dtype!r}; choose one of: {', '.join(DTYPES)}")
        if type(self.eval_tokens) is not int or self.eval_tokens < 1:
            raise InputError(f"eval_tokens is {self.eval_tokens!r}; it must be a positive integer")
        for name in ("preset", "data"):
            if not isinstance(getattr(self, name), str):
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be a text")
        for name, kind in (("parent", str), ("imported", dict)):
            if not isinstance(getattr(self, name), kind | None):
                raise InputError(f"{name} is {getattr(self, name)!r}; leave it out or restore it")
        self.training.check_fits(self.model)

    def to_dict(self) -> dict[str, Any]:
        nested = {"model": self.model.to_dict(), "training": self.training.to_dict()}
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)} | nested
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_dict(cls, values: dict[str, Any], origin: Path) -> "Plan":
        """Inverse of `to_dict`; `origin` is the run that an error names."""
        with config_of(origin):
            nested = {
                "model": Config.from_dict(values["model"]),
                "training": TrainConfig.from_dict(values["training"]),
            }
            return cls(**(values | nested))

    def with_training(self, **changes: Any) -> "Plan":
        """This plan with other values in fields of TrainConfig."""
        return dataclasses.replace(self, training=dataclasses.replace(self.training, **changes))


def make_plan(
    device: hardware.Device,
    preset_name: str | None,
    dtype: str,
    data: str,
    vocab_size: int | None,
    parent: Path | None = None,
    **options: Any,
) -> Plan:
    """The defaults for the type of `device`, with the options that are not None in their place. They are TrainConfig's
    fields, where batch_size may be AUTO, and `tokens`, from which max_steps is made.

    The model is that of the run `parent`, or else the preset: with the vocabulary of the data, `vocab_size`, exactly;
    None keeps the preset's.
    """
    defaults = DEFAULTS[device.type]
    if parent is None:
        name, origin = preset_name or defaults.preset, {}
        model = preset(name, **({} if vocab_size is None else {"vocab_size": vocab_size}))
    else:
        name, model, origin = _of_parent(parent)
    given = {key: value for key, value in options.items() if value is not None}
    tokens = given.pop("tokens", None)
    if tokens is not None:
        if tokens < 1:
            raise InputError(f"tokens is {tokens}; it must be positive")
        given["max_steps"] = 1
    if given.get("max_steps") is not None and "budget_seconds" not in given:
        given["budget_seconds"] = None  # asked for steps: do them, however long they take
    fitting = {"context": min(defaults.training["context"], model.context_length)}
    automatic = given.get("batch_size") == AUTO
    if automatic:
        given["batch_size"] = 1
    usual = defaults.training | ({} if parent is None else FINE_TUNING)
    training = TrainConfig(**(usual | fitting | given))
    plan = Plan(name, model, training, dtype, data, defaults.eval_tokens, **origin)
    if automatic:
        plan = _with_largest_batch(plan, device.memory_bytes or math.inf, defaults.auto_tokens)
    if tokens is not None:
        plan = plan.with_training(max_steps=math.ceil(tokens / plan.training.tokens_per_step))
    return plan


def _of_parent(run_dir: Path) -> tuple[str, Config, dict[str, Any]]:
    """What a run that begins with the weights of another one has of it: name, model, and the Plan's fields on that."""
    values = read_config(run_dir)
    with config_of(run_dir):
        model = Config.from_dict(values["model"])
    origin = {"parent": str(run_dir.resolve()), "imported": values.get("imported")}
    return values.get("preset", run_dir.resolve().name), model, origin


def _with_largest_batch(plan: Plan, memory: float, max_tokens: int) -> Plan:
    """The plan with the largest power of two for batch_size that `memory` bytes and `max_tokens` at once allow."""
    twice = plan.with_training(batch_size=2 * plan.training.batch_size)
    tokens = twice.training.batch_size * twice.training.context
    if tokens > max_tokens or memory_bytes(twice) > MEMORY_SHARE * memory:
        return plan
    return _with_largest_batch(twice, memory, max_tokens)


def memory_bytes(plan: Plan) -> int:
    """A rough estimate of what training needs on the device: within a tenth of a GPU's measured peak for GPT-2.

    16 bytes a parameter (float32 weight, gradient and AdamW's two moments), 4 more where batches are added up; what
    the blocks keep for the backward pass, all of them or, with activation checkpointing, one and the others' inputs;
    and the logits, which their gradient replaces, or, of many tokens, a chunk of them and the head's gradient in
    float32. In 8 bits there is always a chunk, of which the gradient is kept twice, and the head's gradient of each.
    """
    model, training, size = plan.model, plan.training, DTYPES[plan.dtype].itemsize
    tokens = training.batch_size * training.context
    parameters = model.n_params * (20 if training.accumulation > 1 else 16)
    kept = model.n_layer * _kept(model, size, training.fp8)
    if training.activation_checkpointing:
        kept = _kept(model, size, training.fp8) + model.n_layer * 2 * model.d_model * size
    logits = tokens * model.vocab_size * size
    head = model.vocab_size * model.d_model
    if training.fp8 and not model.logit_softcap:
        logits = logits // 8 + tokens * model.vocab_size // 4 + head * (8 * size + 4)
    elif logits > MAX_LOGITS and not model.logit_softcap:
        logits = logits + size * head if tokens <= 2 * model.d_model else logits // 8 + 4 * head
    return parameters + tokens * kept + logits


def _kept(model: Config, size: int, fp8: bool) -> int:
    """Bytes a token that a block keeps for the backward pass, in values of `size` bytes: two sums and their norms; q,
    k, v and what attention makes of them; gate and up; and dropout's two masks. fp8: in place of the norms, the inputs
    of three layers, in 8 bits."""
    q_width = model.n_head * model.head_dim
    values = 2 * model.d_model + 2 * q_width + 2 * model.n_kv_head * model.head_dim
    values += (2 if model.gated else 1) * model.d_mlp
    inputs = 2 * model.d_model + q_width if fp8 else 2 * model.d_model * size
    return values * size + inputs + (2 * model.d_model if model.dropout else 0)


def describe(plan: Plan) -> str:
    """Parameters, memory and tokens per step, a line each."""
    training, begun = plan.training, "" if plan.parent is None else f" with the weights of {plan.parent}"
    batches = f"{training.accumulation} {'batch' if training.accumulation == 1 else 'batches'}"
    shape = f"{training.batch_size} sequences x {batches} x {training.context} tokens"
    budget = "" if training.budget_seconds is None else f", at most {training.budget_seconds / 60:g} min"
    return "\n".join(
        (
            f"model: {plan.preset}{begun}, {plan.model.n_params:,} parameters, vocabulary {plan.model.vocab_size:,}",
            f"memory: about {memory_bytes(plan) / 2**30:.2f} GiB to train in {plan.dtype}",
            f"step: {training.tokens_per_step:,} tokens ({shape})",
            f"run: {training.max_steps:,} steps{budget}",
        )
    )


def expected_time(plan: Plan, where: torch.device) -> str:
    """A line: how long the steps take, evaluations and saves left out, at PEAK_SHARE of the device's published bfloat16
    peak or, where that is not known or not meant, of a matrix product's rate, measured now."""
    device, training = hardware.describe(where), plan.training
    published = device.peak_flops if plan.dtype == "bfloat16" else None
    rate = published or matrix_product_flops(where, DTYPES[plan.dtype])
    flops = plan.model.flops_per_token(training.context) * (4 / 3 if training.activation_checkpointing else 1)
    step = training.tokens_per_step * flops / (PEAK_SHARE * rate)  # seconds
    budget, time = training.budget_seconds, clock(training.max_steps * step)
    if budget is not None and budget < training.max_steps * step:
        time = f"{clock(budget)}, enough for {budget / step:,.0f} steps"
    source = f"TFLOP/s {'published' if published else 'measured now'} for {plan.dtype} products"
    return f"time: about {time}, at {PEAK_SHARE:.0%} of the {rate / 1e12:.3g} {source}"
