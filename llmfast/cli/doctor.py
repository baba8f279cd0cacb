"""`llmfast doctor`: what this machine has, and which backend runs each op on it."""

import importlib
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from .. import __version__, environment, hardware
from ..models import PRESETS
from ..native import library
from .backends import explain_ops


def doctor() -> None:
    """Show the device, versions, and which backend runs each op and why."""
    console = Console()
    device = hardware.default_device()
    dtype = hardware.compute_dtype(device)
    table = Table("", "", box=None, show_header=False)
    for name, value in asdict(hardware.describe(device)).items():
        table.add_row(name.replace("_", " "), "unknown" if value is None else str(value))
    table.add_row("computes in", str(dtype).removeprefix("torch."))
    table.add_row("llmfast", __version__)
    for name, value in hardware.versions().items():
        table.add_row(name, value or "not found")
    table.add_row("triton imports", _import_triton())
    table.add_row("C++ library", library.describe("cpu"))
    table.add_row("CUDA library", library.describe("cuda"))
    table.add_row("cache", str(environment.cache_dir()))
    console.print(table)
    console.print("\nops, for a training step of gpt2 with one sequence:", highlight=False)
    for text in explain_ops(PRESETS["gpt2"], 1, PRESETS["gpt2"].context_length, device, dtype).values():
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _import_triton() -> str:
    try:
        importlib.import_module("triton")
    except Exception as error:  # a broken Triton raises anything at import; that is what doctor is asked about
        return f"no: {type(error).__name__}: {error}".splitlines()[0]
    return "yes"
