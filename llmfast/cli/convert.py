"""`llmfast import` and `llmfast export`: between Hugging Face's format and a run folder."""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from .. import weights
from ..errors import InputError, LLMFastError
from ..files import staged_folder
from ..models import GPT
from ..weights.check import difference_from_transformers
from ..weights.pretrained import copy_companions
from .runs import CHECKPOINTS, CONFIG, config_of, load_weights, read_config, run_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
TOLERANCE = 1e-4  # float32's rounding alone gives some 1e-6

Check = Annotated[bool, typer.Option("--check", help="Compare the logits with those of transformers, if installed.")]


def import_model(
    source: Annotated[str, typer.Argument(help="A folder in Hugging Face's format, or a hub name like owner/model.")],
    out: Annotated[Path, typer.Argument(help="The run folder to make.")],
    revision: Annotated[str | None, typer.Option(help="Of the hub: a branch, tag or commit.")] = None,
    check: Check = False,
) -> None:
    """Make a run of a model in Hugging Face's format."""
    _refuse_existing(out)
    model = weights.from_pretrained(source, revision=revision)
    if check:
        _check(model, model.source.folder)
    dtype = model.source.dtype
    with staged_folder(out) as staging:
        tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
        weights.save(staging / CHECKPOINTS, 0, {"model": tensors}, {})
        origin = {"family": model.source.family, "dtype": _name(dtype), "settings": model.source.settings}
        origin["dtypes"] = {name: _name(dtype) for name, dtype in model.source.dtypes.items()}
        values = {"model": model.config.to_dict(), "imported": origin}
        (staging / CONFIG).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        copy_companions(model.source.folder, staging)
    print(f"{out}: {origin['family']}, {model.config.n_params:,} parameters in {_dtypes(model.source)}")


def export_model(
    run: Annotated[str, typer.Argument(help="A run folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    family: Annotated[str | None, typer.Option(help="The first that can express the model by default.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; as imported by default.")] = None,
    check: Check = False,
) -> None:
    """Write a run's best model in Hugging Face's format."""
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"--dtype {dtype!r}: choose one of: {', '.join(DTYPES)}")
    _refuse_existing(out)
    run_dir = run_folder(run)
    model = load_weights(run_dir, torch.float32, lambda message: print("llmfast:", message)).eval()
    source = _source(run_dir, model, family)
    weights.save_pretrained(model, out, source=source, family=family, dtype=None if dtype is None else DTYPES[dtype])
    if check:
        _check(weights.from_pretrained(out), out)
    dtypes = dtype or (_dtypes(source) if family in (None, source.family) else _name(source.dtype))
    print(f"{out}: {family or source.family}, {model.config.n_params:,} parameters in {dtypes}")


def _source(run_dir: Path, model: GPT, family: str | None) -> weights.Source:
    """Where the run's model came from; one trained here has only its tokenizer to hand on."""
    values = read_config(run_dir)
    if "imported" not in values:
        return weights.Source(family or weights.family_of(model.config), torch.float32, run_dir)
    with config_of(run_dir):
        origin: dict[str, Any] = values["imported"]
        dtypes = {name: DTYPES[dtype] for name, dtype in dict(origin.get("dtypes", {})).items()}
        return weights.Source(origin["family"], DTYPES[origin["dtype"]], run_dir, dict(origin["settings"]), dtypes)


def _check(model: GPT, folder: Path) -> None:
    difference = difference_from_transformers(model, folder)
    if not difference <= TOLERANCE:
        raise LLMFastError(f"{folder}: logits differ from transformers' by {difference:.1e} of the largest; report it")
    print(f"{folder}: logits equal transformers' to {difference:.1e} of the largest")


def _refuse_existing(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out}: is there already and not an empty folder; give another one")


def _dtypes(source: weights.Source) -> str:
    return "mixed dtypes" if source.dtypes else _name(source.dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
