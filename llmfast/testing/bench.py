"""The benchmark harness: check each backend against the truth, then time it and its peers over the table of cases."""

import argparse
import datetime
import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import hardware
from ..errors import InputError
from ..ops.registry import BACKENDS, REFERENCE
from .accuracy import compare, outputs, upstream
from .cases import Case, make_inputs
from .peers import Function, peers
from .tables import BENCHMARK_CASES, CPU_BENCHMARK_CASES
from .timing import Ceilings, ceilings, milliseconds

DIRECTIONS = ("fwd", "bwd")


@dataclass(frozen=True)
class Row:
    """One provider on one case in one direction. `rate` is in FLOP/s where the record's unit says so, else bytes/s."""

    op: str
    case: str
    direction: str
    provider: str
    ours: bool
    ms: float | None
    rate: float | None
    share: float | None
    """Of the ceiling measured in the same run."""
    accurate: bool | None
    """Whether the accuracy rule holds on these very inputs; None for peers, which are not checked."""
    note: str = ""
    peak_bytes: int | None = None
    """On a GPU, the most memory that one call took at once beside what was held before it."""


def main(op: str, argv: list[str] | None = None) -> None:
    """The command line of benchmarks/<op>.py."""
    parser = argparse.ArgumentParser(description=f"Check, then time, {op} on every backend and its peers.")
    parser.add_argument("--device", help="cuda, cuda:<number> or cpu; by default a GPU if there is one")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], help="bfloat16 on a GPU, else float32")
    parser.add_argument("--only", default="", help="only cases whose label contains this text")
    parser.add_argument("--providers", default="", help="only these providers, separated by commas")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this PNG")
    parser.add_argument("--commit", help="what to record as the commit measured; by default what git says, if it can")
    options = parser.parse_args(argv)
    run(**{"op": op, **vars(options)})


def run(
    op: str,
    *,
    device: str | None = None,
    dtype: str | None = None,
    only: str = "",
    providers: str = "",
    json: Path | None = None,
    plot: Path | None = None,
    commit: str | None = None,
) -> list[Row]:
    """Benchmark `op`; print a table, and write `json` and `plot` if given. Returns the rows."""
    if op not in BENCHMARK_CASES:
        raise InputError(f"unknown benchmark {op!r}; choose one of: {', '.join(BENCHMARK_CASES)}")
    where = hardware.device(device)
    console = Console(width=None if sys.stdout.isatty() else 120)
    cases = BENCHMARK_CASES if where.type == "cuda" else CPU_BENCHMARK_CASES
    dtype = dtype or ("bfloat16" if where.type == "cuda" else "float32")
    if where.type != "cuda":
        console.print("No GPU is used: small shapes on the CPU backends, times by the host's clock.")
    torch_dtype = getattr(torch, dtype)
    ceiling = ceilings(where, torch_dtype)
    rows: list[Row] = []
    wanted = [name for name in providers.split(",") if name]
    for case in cases[op]:
        if only in case.label:
            rows += _bench_case(case, where, torch_dtype, ceiling, wanted)
            console.print(f"[dim]{op} {case.label}[/dim]")
    record = {
        **heading(where, torch_dtype, commit),
        "ceilings": ceiling._asdict(),
        "unit": " or ".join(dict.fromkeys("TFLOP/s" if c.work("fwd", 2).flops else "TB/s" for c in cases[op])),
        "rows": [asdict(row) for row in rows],
    }
    _print(console, rows, record, ceiling)
    if json is not None:
        write(record, json)
    if plot is not None:
        _plot(rows, record, plot)
    return rows


def write(record: dict[str, Any], path: Path) -> None:
    """Write a file of results; folders that it lies in are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def heading(device: torch.device, dtype: torch.dtype, commit: str | None) -> dict[str, Any]:
    """What every file of results begins with: when, on what and of which commit it was measured."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": asdict(hardware.describe(device)),
        "versions": hardware.versions(),
        "commit": commit or _git_commit(),
        "dtype": str(dtype).removeprefix("torch."),
    }


def _git_commit() -> str | None:
    """The checkout's commit, marked where it has changes; None outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def contenders(case: Case, device: torch.device, dtype: torch.dtype) -> Iterable[tuple[str, Function | str, bool]]:
    """(name, function or why there is none, whether it is ours) of all that can be timed."""
    for backend in BACKENDS[case.op]:
        if device.type in backend.devices and dtype in backend.dtypes:
            yield backend.name, (lambda *t, name=backend.name: case.ours(*t, backend=name)), True
    if device.type != "cuda":
        yield REFERENCE, (lambda *t: case.ours(*t, backend=REFERENCE)), True
    for name, build in peers(case, device).items():
        try:
            yield name, build(case), False
        except ImportError as error:
            yield name, f"not importable: {error}", False


def _bench_case(
    case: Case, device: torch.device, dtype: torch.dtype, ceiling: Ceilings, wanted: list[str]
) -> list[Row]:
    inputs = make_inputs(case, device, dtype)
    grad = torch.randn(case.output, device=device).to(dtype)
    directions = DIRECTIONS if case.differentiable else DIRECTIONS[:1]
    rows = []
    for name, function, ours in contenders(case, device, dtype):
        if wanted and name not in wanted:
            continue
        if isinstance(function, str):
            rows += [Row(case.op, case.label, d, name, ours, None, None, None, None, function) for d in directions]
            continue
        accurate, note = None, ""
        if ours:
            comparisons = compare(case, inputs, grad, name)
            accurate = all(c.ok for c in comparisons)
            note = "; ".join(str(c) for c in comparisons if not c.ok)
        for direction in directions:
            rows.append(_time(case, direction, name, function, ours, inputs, grad, ceiling, accurate, note))
    return rows


def _time(
    case: Case,
    direction: str,
    name: str,
    function: Function,
    ours: bool,
    inputs: list[Tensor],
    grad: Tensor,
    ceiling: Ceilings,
    accurate: bool | None,
    note: str,
) -> Row:
    empty = Row(case.op, case.label, direction, name, ours, None, None, None, accurate, note)
    if accurate is False:  # the time of a wrong result means nothing
        return empty
    try:
        if direction == "fwd":
            timed = torch.no_grad()(lambda: function(*inputs))
        else:
            outs = outputs(function(*inputs))
            grads = upstream(outs, grad)

            def timed() -> object:
                given = outputs(function(*inputs)) if case.joint else outs
                return torch.autograd.grad(given, inputs, grads, retain_graph=not case.joint)

        ms = milliseconds(timed, inputs[0].device)
        peak = _peak_bytes(timed, inputs[0].device)
    except Exception as error:  # a peer may refuse a shape with any error: the table shows which
        if ours:
            raise
        message = (str(error).splitlines() or [""])[0][:120]
        return replace(empty, note=f"{type(error).__name__}: {message}")
    work = case.work(direction, inputs[0].element_size())
    bound = work.flops > 0
    rate = (work.flops if bound else work.bytes) / (ms * 1e-3)
    share = rate / (ceiling.flops if bound else ceiling.bytes_per_s)
    return Row(case.op, case.label, direction, name, ours, ms, rate, share, accurate, note, peak)


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    function()
    return torch.cuda.max_memory_allocated(device) - before


def best_peer(rows: list[Row], row: Row) -> Row | None:
    """The fastest peer on the row's case and direction."""
    peers = [r for r in rows if (r.case, r.direction) == (row.case, row.direction) and not r.ours and r.ms]
    return min(peers, key=lambda r: r.ms or math.inf, default=None)


def _print(console: Console, rows: list[Row], record: dict[str, Any], ceiling: Ceilings) -> None:
    versions = "  ".join(f"{k} {v}" for k, v in record["versions"].items() if v)
    console.print(f"{record['device']['name']}  {record['dtype']}  {versions}")
    console.print(f"ceilings measured now: {ceiling.bytes_per_s / 1e12:.2f} TB/s, {ceiling.flops / 1e12:.1f} TFLOP/s")
    unit = record["unit"]
    table = Table()
    for heading in ("case", "", "provider", "ms", unit, "of ceiling", "vs best peer", "peak MB", "accurate"):
        number = heading not in ("case", "", "provider", "accurate")
        table.add_column(heading, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        accurate = {None: "", True: "yes", False: "NO"}[row.accurate]
        if row.ms is None or row.rate is None or row.share is None:
            table.add_row(row.case, row.direction, row.provider, "-", "", "", "", "", accurate)
            continue
        peer = best_peer(rows, row)
        ratio = f"{peer.ms / row.ms:.2f}x" if row.ours and peer and peer.ms else ""
        memory = "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}"
        figures = (f"{row.ms:.4f}", f"{row.rate / 1e12:.3g}", f"{row.share:.0%}", ratio, memory)
        table.add_row(row.case, row.direction, row.provider, *figures, accurate)
    console.print(table)
    for note in dict.fromkeys(f"{row.provider}: {row.note}" for row in rows if row.note):
        console.print(f"[dim]{note}[/dim]", highlight=False)


def _plot(rows: list[Row], record: dict[str, Any], path: Path) -> None:
    """One panel a direction: rate over cases, a line a provider."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 5), layout="constrained")
    for panel, direction in zip(figure.subplots(1, 2), DIRECTIONS, strict=True):
        timed = [r for r in rows if r.direction == direction and r.rate]
        cases = list(dict.fromkeys(r.case for r in timed))
        for provider in dict.fromkeys(r.provider for r in timed):
            points = [(cases.index(r.case), (r.rate or 0) / 1e12, r.ours) for r in timed if r.provider == provider]
            ours = points[0][2]
            x, y, _ = zip(*points, strict=True)
            panel.plot(x, y, marker="o", label=provider, linewidth=2.5 if ours else 1.2)
        panel.set_xticks(range(len(cases)), cases, rotation=60, ha="right", fontsize=7)
        panel.set_title("forward" if direction == "fwd" else "backward")
        panel.set_ylabel(record["unit"])
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.suptitle(f"{rows[0].op}, {record['dtype']}, {record['device']['name']}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
