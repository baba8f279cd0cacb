"""What `llmfast train` does when it is not told: one row for each kind of device."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Defaults:
    """The main job on one kind of device; `training` are fields of TrainConfig."""

    preset: str
    training: dict[str, Any]
    eval_tokens: int
    """Validation tokens that evaluations during training score; the last one scores all of them."""
    auto_tokens: int
    """Tokens at once at which the device is busy: `--batch-size auto` goes no further, however much memory is left."""


# In their place where a run begins from trained weights, which a pretraining's rate would undo: the rate that
# transformers fine-tunes with (https://huggingface.co/docs/transformers/main_classes/trainer), and a decay that leaves
# them where they are.
FINE_TUNING: dict[str, Any] = {"learning_rate": 5e-5, "weight_decay": 0.01}

DEFAULTS = {
    "cpu": Defaults(
        preset="mini",
        training={
            "batch_size": 8,
            "context": 128,
            "max_steps": 20_000,
            "budget_seconds": 200.0,
            "learning_rate": 2e-3,
            "warmup_steps": 50,
            "eval_every": 250,
            "save_every": 250,
        },
        eval_tokens=8_192,
        auto_tokens=4_096,
    ),
    "cuda": Defaults(
        preset="small",
        training={
            "batch_size": 32,
            "context": 512,
            "max_steps": 20_000,
            "budget_seconds": 60.0,
            "learning_rate": 1e-3,
            "weight_decay": 1.0,
            "warmup_steps": 100,
            "eval_every": 250,
            "save_every": 1000,
        },
        eval_tokens=1_000_000,
        auto_tokens=65_536,
    ),
}
