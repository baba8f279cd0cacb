"""What a run measured: a JSON line for every step and evaluation."""

import json
import math
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..files import write_atomic


@dataclass(frozen=True)
class Step:
    """After `step` updates, of which this was the last.

    `tokens` trained on so far, training `loss` in nats a token, `lr` the learning rate, `grad_norm` before clipping,
    `tok_s` tokens a second since the previous measurement, `seconds` of the run so far. `skipped`: loss or norm was not
    finite (and is null in the file) or stood out, and the update was left out.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tok_s: float
    seconds: float
    skipped: bool


@dataclass(frozen=True)
class Evaluation:
    """Validation bits per byte of the weights after `step` updates."""

    step: int
    tokens: int
    val_bpb: float
    seconds: float


class MetricsFile:
    """Records in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int, on_skip: Callable[[str], None] | None = None) -> None:
        """Cut off what is later than `step`, whose own evaluation goes too: a run that starts there does it again."""
        if not self.path.exists():
            return
        records = read_metrics(self.path, on_skip)
        kept = [r for r in records if r["step"] < step or (r["step"] == step and "val_bpb" not in r)]
        write_atomic(self.path, "".join(json.dumps(r) + "\n" for r in kept).encode())

    def append(self, records: Sequence[Step | Evaluation]) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                for record in records:
                    values = {
                        k: None if isinstance(v, float) and not math.isfinite(v) else v
                        for k, v in asdict(record).items()
                    }
                    file.write(json.dumps(values) + "\n")
        except OSError:
            with suppress(OSError):
                os.truncate(self.path, size)  # the beginning of a line would spoil the next one
            raise


def read_metrics(path: Path, on_skip: Callable[[str], None] | None = None) -> list[dict[str, Any]]:
    """The records of a JSONL file, in order, none if there is no file.

    A last line cut short by a killed process is left out, and so are damaged lines: `on_skip` gets one line on them.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    records, damaged = [], []
    for number, line in enumerate(lines[:-1], start=1):  # a complete line ends in a newline
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if _is_record(record):
            records.append(record)
        else:
            damaged.append(number)
    if damaged and on_skip:
        on_skip(f"{path}: passed over {len(damaged)} damaged line(s), the first is line {damaged[0]}")
    return records


def _is_record(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and all(isinstance(value.get(key), int) for key in ("step", "tokens"))
        and all(v is None or isinstance(v, int | float) for v in value.values())
    )
