"""Run folders: where they are, what their `config.json` says, and the model in them."""

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..models import GPT, Config
from ..tokenizers import Tokenizer
from ..weights import Checkpoint, latest

RUNS = Path("runs")


def newest_run() -> Path:
    """The run under `runs/` whose configuration was written last."""
    configs = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise InputError(f"there is no run under {RUNS}/ here; train one with: llmfast train")
    return configs[-1].parent


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's `config.json`. Raises InputError if `run_dir` is not a run."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise InputError(f"{run_dir}: is not a run, it has no config.json; give a folder that llmfast train wrote")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise InputError(f"{path}: is damaged; restore it or train again") from None


def best_checkpoint(run_dir: Path, on_skip: Any) -> Checkpoint:
    """The best weights of a run, or its newest checkpoint if it was never evaluated."""
    if any((run_dir / "best").glob("step-*")):
        return latest(run_dir / "best", on_skip)
    return latest(run_dir / "checkpoints", on_skip)


def load_model(run_dir: Path, device: torch.device, dtype: torch.dtype, on_skip: Any) -> tuple[GPT, Tokenizer]:
    """The best model of a run, in eval mode on `device`, and its tokenizer."""
    config = read_config(run_dir)
    checkpoint = best_checkpoint(run_dir, on_skip)
    model = GPT(Config.from_dict(config["model"]), dtype)
    try:
        model.load_state_dict(checkpoint.tensors("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path}: does not fit config.json ({reason}); restore the run") from None
    return model.to(device).eval(), Tokenizer.load(run_dir / "tokenizer.json")
