"""What a run measured: a JSON line for every step and evaluation, and the loss curve drawn from them."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_atomic


@dataclass(frozen=True)
class Step:
    """After `step` updates, of which this was the last.

    `tokens` trained on so far, training `loss` in nats a token, `lr` the learning rate, `grad_norm` before clipping,
    `tok_s` tokens a second since the previous measurement, `seconds` of the run so far. `skipped`: loss or norm was not
    finite (and is null in the file), and the update was left out.
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
        with open(self.path, "a", encoding="utf-8") as file:
            for record in records:
                values = {
                    k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(record).items()
                }
                file.write(json.dumps(values) + "\n")


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
        except ValueError:
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


def draw_loss(records: Sequence[dict[str, Any]], ladder: Sequence[tuple[str, float]], path: Path) -> None:
    """Draw training loss and validation bits per byte against tokens as a PNG.

    ladder: (name, bits per byte) of what the model is compared with, drawn as horizontal lines.
    Points that are not finite are left out.
    """
    steps = [r for r in records if _finite(r.get("loss"))]
    evaluations = [r for r in records if _finite(r.get("val_bpb"))]
    ladder = [rung for rung in ladder if _finite(rung[1])]
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    train, validation = figure.subplots(1, 2)
    train.set(title="Training", xlabel="tokens", ylabel="loss (nats per token)")
    if steps:
        tokens, loss = (np.array([r[key] for r in steps], dtype=float) for key in ("tokens", "loss"))
        train.plot(tokens, loss, color="C0", alpha=0.25, linewidth=0.8, label="each step")
        train.plot(tokens, _smooth(loss), color="C0", linewidth=1.8, label="smoothed")
        train.legend(frameon=False)
    validation.set(title="Validation", xlabel="tokens", ylabel="bits per byte")
    if evaluations:
        points = [(r["tokens"], r["val_bpb"]) for r in evaluations]
        validation.plot(
            *zip(*points, strict=True), color="C3", marker="o", markersize=3.5, linewidth=1.8, label="model"
        )
        offset = {"xytext": (0, 7), "textcoords": "offset points"}
        validation.annotate(f"{points[-1][1]:.3f}", points[-1], color="C3", ha="center", weight="bold", **offset)
    _draw_ladder(validation, ladder, [r["val_bpb"] for r in evaluations])
    for axes in (train, validation):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4), useMathText=True)
    png = io.BytesIO()
    figure.savefig(png, dpi=130, format="png")
    write_atomic(path, png.getvalue())


def _finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _draw_ladder(axes: Any, ladder: Sequence[tuple[str, float]], model: Sequence[float]) -> None:
    """Horizontal lines named at the right margin, names that would touch pushed apart."""
    values = [value for _, value in ladder] + list(model)
    if not values:
        return
    low, high = min(values), max(values)
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    gap = 0.055 * (high - low + 2 * margin)
    label_height = -math.inf
    for name, value in sorted(ladder, key=lambda rung: rung[1]):
        axes.axhline(value, color="0.45", linewidth=0.9, linestyle="--")
        label_height = max(value, label_height + gap)
        axes.annotate(
            f"{name} {value:.2f}",
            xy=(1.0, value),
            xytext=(1.03, label_height),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            fontsize=8,
            color="0.3",
            va="center",
            arrowprops={"arrowstyle": "-", "color": "0.7", "linewidth": 0.6},
            annotation_clip=False,
        )


def _smooth(values: np.ndarray) -> np.ndarray:
    """Moving average over a fiftieth of the curve around each point, of what there is of it at the ends."""
    window = np.ones(max(1, len(values) // 50))
    return np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
