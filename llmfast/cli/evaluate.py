"""`llmfast eval`: how well a run's model predicts a text, and how that depends on the context it sees."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from .. import evals, hardware, ops
from ..data import Dataset
from ..errors import InputError
from ..files import write_atomic
from ..models import GPT
from ..tokenizers import AnyTokenizer
from ..training.plots import draw_positions
from .corpus import check_tokenizer, read_ladder, validation_text
from .memory import explaining_memory
from .plan import Plan
from .runs import is_only_imported, load_model, read_config, recorded, run_folder

IMPORTED_CONTEXT = 1024  # tokens, at most, for a model that was imported: no run says how many it shall see


def evaluate(
    run: Annotated[str | None, typer.Argument(help="A run folder; the newest under runs/ by default.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text file; by default the run's validation text.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens that a prediction sees at most; the run's.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows computed at once.")] = 8,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the results to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the loss by position into this PNG.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernel backend: auto, reference, triton.")] = None,
) -> None:
    """Bits per byte and loss of a run's model on a text, beside the baselines, and its loss by position."""
    console, where, folder = Console(), hardware.device(device), run_folder(run)
    imported = is_only_imported(folder)
    if imported and text is None:
        raise InputError(f"{folder}: was imported and has no validation text; give --text")
    plan = None if imported else Plan.from_dict(read_config(folder), folder)
    with ops.use_backend(backend or ops.current_backend()):
        warn = lambda message: console.print(message, highlight=False, markup=False, soft_wrap=True)  # noqa: E731
        model, tokenizer = load_model(folder, where, hardware.compute_dtype(where), warn)
        data = None
        if plan and text is None:
            check_tokenizer(plan.data, tokenizer, folder)
            data = Dataset.open(plan.data)
            if recorded(folder, "corpus", "hash") not in (None, data.manifest.corpus_hash):
                remedy = "put that back, or give a text that it has not seen by --text"
                raise InputError(f"{data.folder}: holds another text than {folder} was trained on; {remedy}")
        tokens, n_bytes = validation_text(data) if data else _encode(text, tokenizer)
        usual = plan.training.context if plan else min(model.config.context_length, IMPORTED_CONTEXT)
        remedy = "give a smaller --context"  # the number of windows at once was halved already
        with console.status("scoring"), explaining_memory(where, remedy):
            result = score(model, tokens, n_bytes, usual if context is None else context, batch_size)
    result["text"] = f"validation text of {data.folder}" if data else str(text)
    if data is not None:
        result["ladder"] = {rung.name: rung.bits_per_byte for rung in read_ladder(data, console)}
    console.print(f"{result['text']}: {result['tokens']:,} tokens, {result['bytes']:,} bytes", highlight=False)
    console.print(_baselines(result))
    console.print(_positions(result["loss_by_position"]))
    if plot is not None:
        draw_positions(np.array(result["loss_by_position"]), plot)
        console.print(f"picture: {plot}", highlight=False, soft_wrap=True)
    if json_file is not None:
        write_atomic(json_file, (json.dumps(result, indent=1) + "\n").encode())


def score(model: GPT, tokens: np.ndarray, n_bytes: int, context: int, batch_size: int) -> dict[str, Any]:
    """What `evaluate` prints, of a text of `n_bytes` and all tokens but the first, which it begins after: bits per byte
    over windows that advance by half."""
    bpb = evals.bits_per_byte(model, tokens, n_bytes, context, None, batch_size)
    by_position = evals.loss_by_position(model, tokens, min(context, len(tokens) - 1), batch_size)
    return {
        "tokens": len(tokens) - 1,
        "bytes": n_bytes,
        "context": context,
        "bits_per_byte": bpb,
        "nats_per_token": bpb * math.log(2) * n_bytes / (len(tokens) - 1),
        "loss_by_position": by_position.tolist(),
    }


def _encode(path: Path | None, tokenizer: AnyTokenizer) -> tuple[np.ndarray, int]:
    """A file's text as the model would be given it, up to what ends one, and how many bytes it has."""
    assert path is not None
    try:
        text = path.read_bytes().decode("utf-8-sig")  # as training reads it: read_text() would change ends of lines
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text:
        raise InputError(f"{path}: is empty; give a text")
    return np.array([*tokenizer.prompt_ids(text), *sorted(tokenizer.stop_ids)[:1]]), len(text.encode())


def _baselines(result: dict[str, Any]) -> Table:
    table = Table("", "bits/byte")
    table.columns[1].justify = "right"
    rungs = sorted((result.get("ladder") or {}).items(), key=lambda rung: -rung[1])
    for name, bpb in rungs:
        table.add_row(name, f"{bpb:.3f}")
    table.add_row("the model", f"{result['bits_per_byte']:.3f}", style="bold")
    table.caption = f"{result['nats_per_token']:.3f} nats a token, context {result['context']}"
    return table


def _positions(losses: list[float]) -> Table:
    """Means over positions that double."""
    table = Table("tokens seen before", "nats per token")
    table.columns[1].justify = "right"
    first = 1
    while first <= len(losses):
        last = min(2 * first - 1, len(losses))
        table.add_row(f"{first} to {last}" if last > first else str(first), f"{np.mean(losses[first - 1 : last]):.3f}")
        first = last + 1
    return table
