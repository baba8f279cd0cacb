"""Pictures of what runs measured, drawn with matplotlib."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_atomic


def draw_loss(records: Sequence[dict[str, Any]], ladder: Sequence[tuple[str, float]], path: Path) -> None:
    """Draw training loss and validation bits per byte against tokens as a PNG.

    ladder: (name, bits per byte) of what the model is compared with, drawn as horizontal lines.
    Points that are not finite are left out.
    """
    steps = [r for r in records if _finite(r.get("loss"))]
    evaluations = [r for r in records if _finite(r.get("val_bpb"))]
    ladder = [rung for rung in ladder if _finite(rung[1])]
    figure, train, validation = _panels()
    if steps:
        tokens, loss = (np.array([r[key] for r in steps], dtype=float) for key in ("tokens", "loss"))
        train.plot(tokens, loss, color="C0", alpha=0.25, linewidth=0.8, label="each step")
        train.plot(tokens, _smooth(loss), color="C0", linewidth=1.8, label="smoothed")
        train.legend(frameon=False)
    if evaluations:
        points = [(r["tokens"], r["val_bpb"]) for r in evaluations]
        validation.plot(
            *zip(*points, strict=True), color="C3", marker="o", markersize=3.5, linewidth=1.8, label="model"
        )
        offset = {"xytext": (0, 7), "textcoords": "offset points"}
        validation.annotate(f"{points[-1][1]:.3f}", points[-1], color="C3", ha="center", weight="bold", **offset)
    _draw_ladder(validation, ladder, [r["val_bpb"] for r in evaluations])
    _save(figure, path)


def draw_runs(runs: dict[str, Sequence[dict[str, Any]]], path: Path) -> None:
    """The same for several runs, by name: smoothed training losses, and validation bits per byte, as a PNG."""
    figure, train, validation = _panels()
    for i, (name, records) in enumerate(runs.items()):
        color = f"C{i % 10}"
        steps = [r for r in records if _finite(r.get("loss"))]
        evaluations = [r for r in records if _finite(r.get("val_bpb"))]
        if steps:
            tokens, loss = (np.array([r[key] for r in steps], dtype=float) for key in ("tokens", "loss"))
            train.plot(tokens, _smooth(loss), color=color, linewidth=1.6, label=name)
        if evaluations:
            points = [(r["tokens"], r["val_bpb"]) for r in evaluations]
            best = min(bpb for _, bpb in points)
            validation.plot(
                *zip(*points, strict=True), color=color, marker="o", markersize=3, label=f"{name}: {best:.3f}"
            )
    for axes in (train, validation):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    _save(figure, path)


def draw_positions(losses: np.ndarray, path: Path) -> None:
    """Loss by position as `evals.loss_by_position` gives it, with means over a logarithmic scale, as a PNG."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    position = np.arange(1, len(losses) + 1)
    edges = np.unique(np.geomspace(1, len(losses) + 1, 60).astype(int))
    centres = [position[a - 1 : b - 1].mean() for a, b in zip(edges, edges[1:], strict=False)]
    means = [losses[a - 1 : b - 1].mean() for a, b in zip(edges, edges[1:], strict=False)]
    axes.plot(position, losses, color="C0", alpha=0.2, linewidth=0.8)
    axes.plot(centres, means, color="C0", linewidth=1.8, marker="o", markersize=3)
    axes.set(title="Loss by position", xlabel="tokens seen before", ylabel="nats per token", xscale="log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _panels() -> tuple[Figure, Any, Any]:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    train, validation = figure.subplots(1, 2)
    train.set(title="Training", xlabel="tokens", ylabel="loss (nats per token)")
    validation.set(title="Validation", xlabel="tokens", ylabel="bits per byte")
    for axes in (train, validation):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4), useMathText=True)
    return figure, train, validation


def _save(figure: Figure, path: Path) -> None:
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
