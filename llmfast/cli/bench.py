"""`llmfast bench`: hands an op to the benchmark harness of `llmfast.testing`."""

from pathlib import Path
from typing import Annotated

import typer


def bench(
    op: Annotated[str, typer.Argument(help="The op, such as softmax.")],
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:<number>.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the results to this file.")] = None,
) -> None:
    """Time an op on every backend against the reference."""
    from ..testing import bench as harness  # imports every backend, which --help does not need

    harness.run(op, device=device, json=json)
