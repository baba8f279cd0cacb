"""Time a kernel with other tiles than those of its table: check each candidate, then time both passes, fastest first.

python benchmarks/tiles.py                      # what can be searched
python benchmarks/tiles.py fp8_linear norm_bwd  # on this GPU; the kernels' own tables were found so, on an H200

Nothing is searched when kernels run: a table's entry is changed by hand where another one wins here.
"""

import argparse
import importlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from llmfast import hardware
from llmfast.testing.accuracy import compare, outputs, upstream
from llmfast.testing.cases import (
    AttentionCase,
    Case,
    CrossEntropyCase,
    Fp8LinearCase,
    LinearCase,
    RowCase,
    make_inputs,
)
from llmfast.testing.timing import milliseconds


class Search(NamedTuple):
    """Cases, and candidates for what stands in their kernels' module under `name`: a constant, the entry of a table at
    `key`, or what a function gives."""

    module: str
    name: str
    key: tuple[Any, ...]
    candidates: list[Any]
    cases: list[Case]


def _attention(direction: str, head_dim: int, *tiles: tuple[int, int, int, int]) -> Search:
    """Of the portable kernels: float32 takes none of these, and on sm_90 its own kernels most calls of 16 bits."""
    heads = 2048 // head_dim
    cases: list[Case] = [AttentionCase(4, 4096, 4096, heads, heads, head_dim, causal) for causal in (False, True)]
    return Search("attention", "_HOPPER", (direction, head_dim), list(tiles), cases)


SEARCHES: dict[str, Search] = {
    "fp8_linear": Search(
        "_fp8", "TILE", (),
        [{"ROWS": r, "COLS": c, "num_warps": w} for r, c, w in (
            (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 128, 8), (128, 128, 8), (256, 64, 8), (128, 32, 4),
        )],
        [Fp8LinearCase(65536, 768, 3072), Fp8LinearCase(16384, 4096, 4096)],
    ),
    "column_sums": Search(
        "_sums", "TILE", (),
        [{"ROWS": r, "BLOCK": b, "num_warps": w} for r, b, w in ((8, 512, 4), (32, 128, 4), (16, 512, 8))],
        [LinearCase(65536, 768, 768)],
    ),
    "norm_fwd": Search(
        "norm", "_forward_tile", (),
        [(1, 1024, 2), (2, 1024, 4), (4, 1024, 8), (1, 1024, 4), (8, 1024, 8)],
        [RowCase("layer_norm", 32768, 768), RowCase("rms_norm", 32768, 768)],
    ),
    "norm_bwd": Search(
        "norm", "_backward_tile", (),
        [(2, 1024, 2), (4, 1024, 4), (1, 1024, 2), (4, 1024, 8)],
        [RowCase("layer_norm", 32768, 768), RowCase("rms_norm", 32768, 768)],
    ),
    "cross_entropy_bwd": Search(
        "cross_entropy", "BWD_BLOCK", (), [1024, 2048, 4096, 8192], [CrossEntropyCase(16384, 50304)]
    ),
    "attention_hopper": Search(
        "attention_hopper", "TILES", (256,), [(64, 2, 1), (32, 3, 2), (32, 4, 1)],
        [AttentionCase(4, 4096, 4096, 8, 8, 256, causal) for causal in (False, True)],
    ),
    "attention_fwd": _attention("fwd", 128, (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3)),
    "attention_dkdv": _attention("dkdv", 128, (64, 128, 8, 1), (64, 64, 4, 2), (128, 64, 8, 1), (32, 128, 8, 2)),
    "attention_dq": _attention("dq", 128, (128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 2), (64, 128, 8, 1)),
}  # fmt: skip


@contextmanager
def using(search: Search, candidate: Any) -> Iterator[None]:
    """Inside, kernels take the candidate; None leaves them what they take."""
    module = importlib.import_module(f"llmfast.kernels.{search.module}")
    portable = importlib.import_module("llmfast.kernels.attention")
    found = getattr(module, search.name)
    for key in search.key[:-1]:
        found = found[key]
    with ExitStack() as stack:
        if search.module == "attention":  # where sm_90's own kernels would run
            stack.enter_context(mock.patch.object(portable, "_on_hopper", lambda *_: False))
        if candidate is not None and callable(found):
            stack.enter_context(mock.patch.object(module, search.name, lambda *_: module.Tile(*candidate)))
        elif candidate is not None and search.key:
            entry = type(found[search.key[-1]])(*candidate)
            stack.enter_context(mock.patch.dict(found, {search.key[-1]: entry}))
        elif candidate is not None:
            stack.enter_context(mock.patch.object(module, search.name, candidate))
        _forget(module)
        yield
    _forget(module)


def _forget(module: Any) -> None:
    """What was computed from the tiles before."""
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


def measured(case: Case, device: torch.device) -> tuple[float, float]:
    """Milliseconds of the forward and of the backward pass; NaN where results are wrong."""
    inputs = make_inputs(case, device, torch.bfloat16)
    grad = torch.randn(case.output, device=device).bfloat16()
    if not all(c.ok for c in compare(case, inputs, grad, "triton")):
        return float("nan"), float("nan")
    forward = milliseconds(lambda: case.ours(*inputs, backend="triton"), device)
    outs = outputs(case.ours(*inputs, backend="triton"))
    grads: list[Tensor] = upstream(outs, grad)
    backward = milliseconds(lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True), device)
    return forward, backward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of: {', '.join(SEARCHES)}")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in SEARCHES]
    if unknown or not options.names:
        parser.exit(2 if unknown else 0, f"{'unknown: ' + ', '.join(unknown) + '; ' if unknown else ''}"
                    f"what can be searched: {', '.join(SEARCHES)}\n")  # fmt: skip
    device, console = hardware.device("cuda"), Console(width=120)
    console.print(hardware.describe(device).name, hardware.versions())
    for name in options.names:
        search = SEARCHES[name]
        for case in search.cases:
            table, rows = Table("tile", "forward ms", "backward ms", title=f"{name}: {case.op} {case.label}"), []
            for candidate in (None, *search.candidates):
                with using(search, candidate):
                    try:
                        rows.append((*measured(case, device), "the table's" if candidate is None else str(candidate)))
                    except RuntimeError as error:  # more shared memory than there is
                        console.print(f"{candidate}: {str(error).splitlines()[0][:90]}")
            for forward, backward, label in sorted(rows, key=lambda row: row[0] + row[1]):
                table.add_row(label, f"{forward:.4f}", f"{backward:.4f}")
            console.print(table)


if __name__ == "__main__":
    main()
