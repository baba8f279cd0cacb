"""`llmfast plot`: the curves of one or several runs in one picture."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..training.metrics import read_metrics
from ..training.plots import draw_runs
from .runs import METRICS, read_config, run_folder


def plot(
    runs: Annotated[list[str] | None, typer.Argument(help="Run folders; the newest under runs/ by default.")] = None,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("runs.png"),
) -> None:
    """Draw training loss and validation bits per byte against tokens, a colour a run."""
    folders = [run_folder(name) for name in runs or [None]]
    curves = {}
    for folder in folders:
        read_config(folder)  # refuses what is not a run
        records = read_metrics(folder / METRICS, lambda message: print("llmfast:", message))
        if not records:
            raise InputError(f"{folder}: has measured nothing yet; train it first")
        curves[folder.name if [f.name for f in folders].count(folder.name) == 1 else str(folder)] = records
    draw_runs(curves, out)
    for name, records in curves.items():
        scored = [r["val_bpb"] for r in records if r.get("val_bpb") is not None]
        last = records[-1]
        best = f", best {min(scored):.3f} bits per byte" if scored else ""
        print(f"{name}: {last['step']:,} steps, {last['tokens']:,} tokens{best}")
    print(f"picture: {out}")
