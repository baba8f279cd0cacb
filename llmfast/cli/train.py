"""`llmfast train`: prepare the data, train, evaluate, and leave a run folder that explains itself."""

import gc
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.table import Table

from .. import hardware, ops
from ..data import Dataset, Manifest
from ..data.sources import STDLIB
from ..errors import InputError, LLMFastError
from ..evals import Rung, bits_per_byte
from ..files import write_atomic
from ..models import GPT, preset
from ..training import Result
from ..training import train as run_loop
from ..training.metrics import read_metrics
from ..training.plots import draw_loss
from ..training.progress import Progress, TrainingConsole
from ..training.trackers import TensorBoard, Tracker
from ..weights.pretrained import copy_companions
from .backends import explain_ops
from .corpus import check_tokenizer, is_data_folder, open_data, read_ladder, validation_text
from .defaults import DEFAULTS, FINE_TUNING
from .generate import stream
from .memory import explaining_memory
from .plan import AUTO, DTYPES, Plan, describe, expected_time, make_plan, memory_bytes
from .runs import (
    CHECKPOINTS,
    CONFIG,
    LOCK,
    METRICS,
    RECORD,
    RUNS,
    has_saved,
    is_only_imported,
    load_model,
    load_tokenizer,
    load_weights,
    locked,
    read_config,
    recorded,
    run_folder,
)

MEMORY_REMEDY = (
    "give a smaller --batch-size and a larger --accumulation to make up for it, or --activation-checkpointing"
)
SAMPLE_PROMPT_TOKENS = 24  # of the validation text, which the finished model continues


def train(
    data: Annotated[
        str, typer.Option(help="A prepared data folder, stdlib, a text file, a .jsonl or a folder.")
    ] = STDLIB,
    preset: Annotated[str | None, typer.Option(help="The model; by default one that suits the device.")] = None,
    parent: Annotated[
        str | None, typer.Option("--from", help="Fine-tune: begin with this run's best weights and its tokenizer.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder; runs/<date-time>-<preset> by default.")] = None,
    resume: Annotated[str | None, typer.Option(help="Continue this run; auto is the newest under runs/.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of the weights.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on, in place of --steps.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Wall-clock time in which training ends.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Sequences at once; auto is as many as fit.")] = None,
    context: Annotated[int | None, typer.Option(help="Tokens a sequence.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Batches a step.")] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help=f"The highest learning rate; by default {FINE_TUNING['learning_rate']:g} with --from."),
    ] = None,
    optim: Annotated[str | None, typer.Option(help="adamw, or muon for the matrices of the blocks.")] = None,
    spike_threshold: Annotated[
        float | None, typer.Option(help="Leave out updates this many deviations above recent gradient norms.")
    ] = None,
    schedule: Annotated[str | None, typer.Option(help="cosine or trapezoid, how the learning rate falls.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, data order and dropout.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16, what the model computes in.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernel backend: auto, reference, triton.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail where auto would fall back to the reference.")] = False,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Replay a GPU's passes as one graph.")] = False,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Less memory for more time: run blocks twice.")
    ] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="Matrix products of 8-bit floats: faster, less exact.")] = False,
    deterministic: Annotated[bool, typer.Option("--deterministic", help="The same bits each time.")] = False,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write records for TensorBoard.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what it would cost, and exit.")] = False,
) -> None:
    """Train a model; with no arguments, the main job on Python's own source."""
    where = hardware.device(device)
    if preset is not None and parent is not None:
        raise InputError(f"--preset {preset} and --from {parent} say two different models; give one of them")
    if tokens is not None and steps is not None:
        raise InputError(f"--tokens {tokens} and --steps {steps} say the same in two ways; give one of them")
    options = {
        "tokens": tokens,
        "max_steps": steps,
        "budget_seconds": None if minutes is None else minutes * 60,
        "batch_size": _batch_size(batch_size),
        "context": context,
        "accumulation": accumulation,
        "learning_rate": learning_rate,
        "optimizer": optim,
        "schedule": schedule,
        "spike_threshold": spike_threshold,
        "seed": seed,
        "cuda_graph": cuda_graph or None,
        "activation_checkpointing": activation_checkpointing or None,
        "fp8": fp8 or None,
        "deterministic": deterministic or None,
    }
    if resume is not None and ops.current_backend() == "auto":
        backend = backend or recorded(run_folder(None if resume == "auto" else resume), "backend")
    with ops.use_backend(backend or ops.current_backend(), strict=strict):
        if resume is not None:
            fixed = options | {"preset": preset, "from": parent, "out": out, "dtype": dtype}
            fixed |= {"data": None if data == STDLIB else data}
            _resume(resume, fixed, where, tensorboard, dry_run)
            return
        dtype = dtype or str(hardware.compute_dtype(where)).removeprefix("torch.")
        parent_dir = None if parent is None else run_folder(parent)
        properties = hardware.describe(where)
        planned = partial(make_plan, properties, preset, dtype, parent=parent_dir, **options)
        if parent_dir is None:
            vocabulary = _vocab_size(preset, where)
        else:
            vocabulary = load_tokenizer(parent_dir)
            check_tokenizer(data, vocabulary, parent_dir)
        if dry_run:
            _print_cost(planned(data, Manifest.load(Path(data)).vocab_size if is_data_folder(data) else None), where)
            return
        expected = planned(data, None)  # refuses bad options before preparing the data
        _check_memory(expected, properties)
        folder = out or RUNS / f"{datetime.now():%Y%m%d-%H%M%S}-{expected.preset}"
        _check_new(folder)
        trackers, console = _trackers(folder, tensorboard), TrainingConsole()
        dataset = open_data(data, vocabulary, console)
        plan = planned(str(dataset.folder.resolve()), dataset.manifest.vocab_size)
        dataset.batch("train", 0, 1, plan.training.context, 0)  # refuses a text shorter than a context
        _check_ids(dataset, plan)
        with _new_run(folder, plan):
            _run(plan, dataset, folder, where, console, trackers, halve=batch_size == AUTO)


def _batch_size(text: str | None) -> int | str | None:
    try:
        return text if text in (None, AUTO) else int(text)
    except ValueError:
        raise InputError(f"batch_size is {text!r}; give a number or {AUTO}") from None


def _check_memory(plan: Plan, device: hardware.Device) -> None:
    """InputError where training would need twice the device's memory or more, before any is taken: a host swaps for
    hours before it says so. The estimate is rough, so that what is nearer is tried."""
    needed, there = memory_bytes(plan), device.memory_bytes
    if there is not None and needed > 2 * there:
        needs = f"{plan.training.batch_size} sequences at once need about {needed / 2**30:,.0f} GiB"
        raise InputError(f"{needs}, and {device.name} has {there / 2**30:,.0f}; {MEMORY_REMEDY}")


def _vocab_size(name: str | None, device: torch.device) -> int:
    return preset(name or DEFAULTS[device.type].preset).vocab_size


def _trackers(folder: Path, tensorboard: bool) -> list[Tracker]:
    return [TensorBoard(folder / "tensorboard")] if tensorboard else []


def _print_cost(plan: Plan, where: torch.device) -> None:
    print(describe(plan), expected_time(plan, where), sep="\n")


def _resume(name: str, fixed: dict[str, Any], where: torch.device, tensorboard: bool, dry_run: bool) -> None:
    given = [key for key, value in fixed.items() if value is not None]
    if given:
        raise InputError(f"--resume continues a run as it was configured; leave out: {', '.join(given)}")
    run_dir = run_folder(None if name == "auto" else name)
    if is_only_imported(run_dir):
        raise InputError(f"{run_dir}: was imported, not trained; train it with: llmfast train --from {run_dir}")
    plan = Plan.from_dict(read_config(run_dir), run_dir)
    if dry_run:
        _print_cost(plan, where)
        return
    check_tokenizer(plan.data, load_tokenizer(run_dir), run_dir)
    trackers, data = _trackers(run_dir, tensorboard), Dataset.open(plan.data)
    console = TrainingConsole()
    with locked(run_dir):
        if not (saved := has_saved(run_dir)):
            _printing(console)(f"{run_dir}: saved no checkpoint, it begins again")
        _run(plan, data, run_dir, where, console, trackers, resume=saved)


def _check_ids(data: Dataset, plan: Plan) -> None:
    """InputError if the text has tokens that the model does not know: some tokenizers have more than their model."""
    if data.manifest.vocab_size <= plan.model.vocab_size:
        return
    largest = max(int(data.tokens(split).max()) for split in data.manifest.splits)
    if largest >= plan.model.vocab_size:
        remedy = "leave out the text that holds it, or import a model with all tokens"
        raise InputError(f"{data.folder}: holds token {largest}, the model knows {plan.model.vocab_size}; {remedy}")


def _check_new(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file; give a folder")
    if folder.is_dir() and any(path.name != LOCK for path in folder.iterdir()):
        raise InputError(f"{folder}: is not empty; give another --out, or --resume {folder}")


@contextmanager
def _new_run(folder: Path, plan: Plan) -> Iterator[None]:
    """Make the run folder with its configuration and tokenizer; it goes again if training fails before a first step."""
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        _check_new(folder)
        try:
            if plan.parent is None:
                Dataset.open(plan.data, verify=False).tokenizer.save(folder)
            else:
                copy_companions(Path(plan.parent), folder)
            _write_json(folder / CONFIG, plan.to_dict())
            yield
        except BaseException:
            if not _has_begun(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def _has_begun(folder: Path) -> bool:
    """Whether the run has anything to show for itself."""
    return (folder / METRICS).exists() or (folder / CHECKPOINTS).exists()


def _run(
    plan: Plan,
    data: Dataset,
    run_dir: Path,
    device: torch.device,
    console: Console,
    trackers: Sequence[Tracker],
    *,
    resume: bool = False,
    halve: bool = False,
) -> None:
    """Train, and unless a signal stopped it, evaluate the best weights and show what they do. Where memory runs out at
    the start, `halve` the batch."""
    started, properties = time.perf_counter(), hardware.describe(device)
    record: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "corpus": {"source": data.manifest.source, "hash": data.manifest.corpus_hash},
        "versions": hardware.versions(),
        "device": asdict(properties),
        "backend": ops.current_backend(),
        "ops": explain_ops(plan.model, 1, plan.training.context, device, DTYPES[plan.dtype]),
    }
    if not resume:  # which may be refused: until there is another result, the one before stands
        _write_json(run_dir / RECORD, record)
    console.print(describe(plan), f"on {properties.name}, in {run_dir}", sep="\n", highlight=False, soft_wrap=True)
    with explaining_memory(device, MEMORY_REMEDY):
        while True:
            try:
                result = _train(plan, data, run_dir, device, console, trackers, resume)
                break
            except (RuntimeError, MemoryError) as error:
                can_halve = halve and plan.training.batch_size > 1 and not _has_begun(run_dir)
                if not (can_halve and hardware.is_out_of_memory(error)):
                    raise
            gc.collect()  # frames in cycles, which importing left, hold on to the model
            plan = _halved(plan, run_dir, console)
    if result.interrupted:
        _write_json(run_dir / RECORD, record | {"result": asdict(result)})
        if records := read_metrics(run_dir / METRICS):
            draw_loss(records, [], run_dir / "loss.png")
        console.print(
            f"stopped after step {result.step}; resume with: llmfast train --resume {run_dir}", soft_wrap=True
        )
        return
    record["result"] = asdict(result) | {"seconds": round(time.perf_counter() - started, 2)}
    with explaining_memory(device, MEMORY_REMEDY):
        _finish(plan, data, run_dir, device, console, record, result)


def _halved(plan: Plan, run_dir: Path, console: Console) -> Plan:
    """The plan with half the batch and twice as many of them, the run's from now on: its steps are the same."""
    before = plan.training
    plan = plan.with_training(batch_size=before.batch_size // 2, accumulation=2 * before.accumulation)
    _write_json(run_dir / CONFIG, plan.to_dict())
    now = f"{plan.training.accumulation} batches of {plan.training.batch_size} a step"
    console.print(f"{before.batch_size} sequences at once do not fit the memory; now {now}", soft_wrap=True)
    return plan


def _train(
    plan: Plan,
    data: Dataset,
    run_dir: Path,
    device: torch.device,
    console: Console,
    trackers: Sequence[Tracker],
    resume: bool,
) -> Result:
    """The loop, over a new model or the parent's."""
    training, dtype = plan.training, DTYPES[plan.dtype]
    torch.manual_seed(training.seed)
    if plan.parent is None or resume:  # a checkpoint takes the place of the parent's weights
        model = GPT(plan.model, dtype)
    else:
        model = load_weights(Path(plan.parent), dtype, _printing(console))
    model = model.to(device)
    text = validation_text(data, plan.eval_tokens)
    peak = hardware.describe(device).peak_flops if plan.dtype == "bfloat16" else None
    with Progress(console, training.max_steps, plan.model.flops_per_token(training.context), peak) as report:
        return run_loop(
            model,
            training,
            lambda i: torch.from_numpy(data.batch("train", i, training.batch_size, training.context, training.seed)),
            evaluate=lambda m: _evaluate(m, plan, text, training.context),
            run_dir=run_dir,
            resume=resume,
            report=report,
            corpus_hash=data.manifest.corpus_hash,
            trackers=trackers,
        )


def _finish(
    plan: Plan,
    data: Dataset,
    run_dir: Path,
    device: torch.device,
    console: Console,
    record: dict[str, Any],
    result: Result,
) -> None:
    """Score the best weights on the whole validation text beside the baselines, and let them write."""
    warn = _printing(console)
    model, tokenizer = load_model(run_dir, device, DTYPES[plan.dtype], warn)
    with console.status("scoring the validation text"):
        bpb = _evaluate(model, plan, validation_text(data), max(1, plan.training.context // 2))
    if not math.isfinite(bpb):
        remedy = "lower the learning rate or check the data"
        raise LLMFastError(f"{run_dir}: the model's bits per byte are not finite; {remedy}")
    record["result"]["val_bpb"] = bpb
    _write_json(run_dir / RECORD, record)  # the result stands, whatever becomes of the baselines
    rungs = read_ladder(data, console)
    record["ladder"] = {rung.name: rung.bits_per_byte for rung in rungs}
    _write_json(run_dir / RECORD, record)
    # The curve's points score only the first eval_tokens; this line is what compares with the others.
    ladder = [*((rung.name, rung.bits_per_byte) for rung in rungs), ("model, whole text", bpb)]
    draw_loss(read_metrics(run_dir / METRICS, warn), ladder, run_dir / "loss.png")
    name = f"{plan.preset}, {result.step:,} steps"
    console.print(_ladder_table([*rungs, Rung(name, bpb, record["result"]["seconds"])], name))
    console.print(f"loss curve: {run_dir / 'loss.png'}\n", highlight=False, soft_wrap=True)
    stream(model, tokenizer, tokenizer.decode(data.tokens("val")[:SAMPLE_PROMPT_TOKENS]), max_tokens=100)


def _evaluate(model: GPT, plan: Plan, text: tuple[np.ndarray, int], stride: int) -> float:
    """Bits per byte of `text`, as `validation_text` gives it."""
    return bits_per_byte(model, *text, plan.training.context, stride, 2 * plan.training.batch_size)


def _printing(console: Console) -> Callable[[str], None]:
    """Prints a message as it is."""
    return partial(console.print, highlight=False, markup=False, soft_wrap=True)


def _ladder_table(rungs: list[Rung], model: str) -> Table:
    table = Table("", "bits/byte", "seconds", title="Validation text")
    table.columns[1].justify = table.columns[2].justify = "right"
    for rung in sorted(rungs, key=lambda rung: -rung.bits_per_byte):
        style = "bold" if rung.name == model else None
        table.add_row(rung.name, f"{rung.bits_per_byte:.3f}", f"{rung.seconds:.1f}", style=style)
    return table


def _write_json(path: Path, values: dict[str, Any]) -> None:
    write_atomic(path, (json.dumps(values, indent=1) + "\n").encode())
