"""Run folders: where they are, what their `config.json` says, and the model in them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError
from ..files import exclusive
from ..models import GPT, Config
from ..tokenizers import AnyTokenizer, PretrainedTokenizer, load_saved
from ..weights import Checkpoint, latest, saved_steps

RUNS = Path("runs")
CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
METRICS = "metrics.jsonl"
RECORD = "record.json"


def newest_run() -> Path:
    """The run under `runs/` whose configuration was written last."""
    configs = sorted(RUNS.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not configs:
        raise InputError(f"there is no run under {RUNS}/ here; train one with: llmfast train")
    return configs[-1].parent


def run_folder(name: str | None) -> Path:
    """The run folder `name`; None is the newest."""
    if name == "":
        raise InputError("the run is an empty string; give a run folder")
    return newest_run() if name is None else Path(name)


def read_config(run_dir: Path) -> dict[str, Any]:
    """The run's `config.json`. Raises InputError if `run_dir` is not a run."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise InputError(f"{run_dir}: is not a run, it has no {CONFIG}; give a folder that llmfast train wrote")
    with config_of(run_dir):
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not a JSON object")
    if "model_type" in values:
        remedy = f"make a run of it with: llmfast import {run_dir} runs/NAME"
        raise InputError(f"{run_dir}: is a model in Hugging Face's format; {remedy}")
    return values


@contextmanager
def config_of(run_dir: Path) -> Iterator[None]:
    """Errors over the values of the run's `config.json` become an InputError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else error
        raise InputError(f"{run_dir / CONFIG}: is damaged ({reason}); restore it or train again") from None


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in `run_dir`; InputError if one does. No lock where the system has none."""
    with exclusive(run_dir / LOCK, wait=False) as ours:
        if not ours:
            remedy = "wait for it or give another --out"
            raise InputError(f"{run_dir}: is being trained by another process; {remedy}")
        yield


def has_saved(run_dir: Path) -> bool:
    """Whether the run has weights to show, damaged or not: one killed before its first checkpoint has none."""
    return any(saved_steps(run_dir / kind) for kind in ("best", CHECKPOINTS))


def best_checkpoint(run_dir: Path, on_skip: Any) -> Checkpoint:
    """The best weights of a run, or its newest checkpoint if it was never evaluated or they are damaged."""
    best = run_dir / "best"
    if any(best.glob("step-*")):
        try:
            return latest(best, on_skip)
        except CheckpointError:
            on_skip(f"{best}: holds no undamaged weights; taking the newest of {run_dir / CHECKPOINTS}")
    return latest(run_dir / CHECKPOINTS, on_skip)


def load_weights(run_dir: Path, dtype: torch.dtype, on_skip: Any) -> GPT:
    """The best model of a run, on the CPU; it computes in `dtype`."""
    values = read_config(run_dir)
    with config_of(run_dir):
        config = Config.from_dict(values["model"])
    checkpoint = best_checkpoint(run_dir, on_skip)
    model = GPT(config, dtype)
    try:
        model.load_state_dict(checkpoint.tensors("model"))
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{checkpoint.path}: does not fit config.json ({reason}); restore the run") from None
    return model


def is_only_imported(run_dir: Path) -> bool:
    """Whether the run's model came from another library and was not trained here."""
    values = read_config(run_dir)
    return "imported" in values and "training" not in values


def recorded(run_dir: Path, *names: str) -> str | None:
    """What the run's record says under `names`, each inside the one before; None if it says nothing."""
    try:
        value = json.loads((run_dir / RECORD).read_bytes())
        for name in names:
            value = value[name]
        return str(value)
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None


def load_tokenizer(run_dir: Path) -> AnyTokenizer:
    """A run's tokenizer: that of another library's model if this is one, fine-tuned here or not."""
    return PretrainedTokenizer.load(run_dir) if "imported" in read_config(run_dir) else load_saved(run_dir)


def load_model(run_dir: Path, device: torch.device, dtype: torch.dtype, on_skip: Any) -> tuple[GPT, AnyTokenizer]:
    """The best model of a run, in eval mode on `device`, its matrices in `dtype`, and its tokenizer."""
    model = load_weights(run_dir, dtype, on_skip)
    model.cast_matrices()
    return model.to(device).eval(), load_tokenizer(run_dir)
