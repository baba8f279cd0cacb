"""The metrics file, the loss curve and the progress line."""

import errno
import io
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from llmfast.training import Evaluation, Step, metrics
from llmfast.training.metrics import MetricsFile, read_metrics
from llmfast.training.plots import _smooth, draw_loss
from llmfast.training.progress import Progress


def step(n: int, loss: float = 2.0, tok_s: float = 1000.0) -> Step:
    return Step(n, 64 * n, loss, 1e-3, 0.5, tok_s, float(n), skipped=False)


def test_round_trip_and_rewind(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.rewind(0)  # nothing there yet
    file.append([step(1), step(2, loss=float("nan"))])
    file.append([Evaluation(2, 128, 1.5, 2.0), step(3)])
    records = read_metrics(file.path)
    assert [r["step"] for r in records] == [1, 2, 2, 3]
    assert [r.get("loss") for r in records] == [2.0, None, None, 2.0]
    file.rewind(2)
    assert read_metrics(file.path) == records[:2]


class FullDisk(io.StringIO):
    """What a full disk took of a file: its first 30 bytes."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __exit__(self, *_: object) -> None:
        with open(self.path, "a") as file:
            file.write(self.getvalue()[:30])
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_record_that_a_full_disk_cut_does_not_spoil_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append([step(1)])
    with monkeypatch.context() as patch:
        patch.setattr(metrics, "open", lambda path, *args, **options: FullDisk(path), raising=False)
        with pytest.raises(OSError, match="No space left"):
            file.append([step(2)])
    file.append([step(3)])
    assert [r["step"] for r in read_metrics(file.path, pytest.fail)] == [1, 3]


def test_lines_that_are_damaged_are_left_out_and_said_once(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "m.jsonl")
    file.append([step(1)])
    with open(file.path, "a") as f:
        f.write('{"step": 2, "lo')
    assert [r["step"] for r in read_metrics(file.path)] == [1]
    file.path.write_bytes(b"nonsense\n[1]\n\xff\xfe\n" + b"[" * 100_000 + b"\n" + file.path.read_bytes())
    said: list[str] = []
    file.rewind(1, said.append)
    assert [r["step"] for r in read_metrics(file.path, pytest.fail)] == [1]
    assert len(said) == 1 and "4 damaged line(s), the first is line 1" in said[0]


def test_smoothing_is_unbiased_at_the_start() -> None:
    assert _smooth(np.full(500, 3.0)) == pytest.approx(3.0)
    noisy = 3.0 + np.random.default_rng(0).normal(size=2000)
    assert _smooth(noisy)[500:].std() < 0.2


def test_draws_a_picture(tmp_path: Path) -> None:
    path = tmp_path / "loss.png"
    records = [{"tokens": n, "loss": 5 / (n + 1)} for n in range(50)] + [{"tokens": 49, "val_bpb": 2.0}]
    draw_loss(records, [("trigram", 1.7), ("gzip", 2.04)], path)
    drawn = matplotlib.image.imread(path)
    draw_loss([], [], path)  # a run that stopped at once
    empty = matplotlib.image.imread(path)
    assert drawn.shape == empty.shape and (drawn != empty).any(-1).mean() > 0.01


def test_points_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    records = [{"tokens": n, "val_bpb": float("nan"), "loss": float("inf")} for n in range(3)]
    draw_loss(records, [("model", float("nan"))], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_plain_progress_lines() -> None:
    out = io.StringIO()
    with Progress(Console(file=out), max_steps=200, flops_per_token=1e9, peak_flops=1e13) as progress:
        progress.step(step(10, loss=3.25), 0.05)
        progress.step(step(11), 0.06)  # less than ten seconds later: no line
        progress.evaluation(Evaluation(12, 0, 1.5, 61.0))
        progress.message("step 13 skipped [sic]")
        progress.step(step(200), 1.0)
    lines = out.getvalue().splitlines()
    assert lines[0] == "step 10/200 5%  loss 3.250  1,000 tok/s  10.0% of peak"
    assert lines[1] == "step 12  validation 1.5000 bits/byte  1:01"
    assert lines[2] == "step 13 skipped [sic]"
    assert lines[3].startswith("step 200/200 100%") and lines[3].endswith("0:00 left")
    assert len(lines) == 4


def test_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with Progress(Console(file=out, force_terminal=True, width=120), 200, 1e9, None) as progress:
        progress.step(step(10, loss=3.25), 0.05)
        progress.evaluation(Evaluation(12, 0, 1.5, 61.0))
        progress.step(step(20, loss=2.75), 0.10)
    assert "loss 3.250" in out.getvalue() and "loss 2.750" in out.getvalue()
    assert "val 1.5000" in out.getvalue()


def test_no_share_of_peak_where_it_is_unknown() -> None:
    out = io.StringIO()
    Progress(Console(file=out), 200, 1e9, None).step(step(1), 0.5)
    assert "peak" not in out.getvalue()


def test_a_log_that_cannot_be_written_does_not_end_training() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    with Progress(Console(file=Full()), 3, 1e6, None) as progress:
        progress.step(step(1), 0.5)
        progress.message("passed over a damaged checkpoint")
        progress.evaluation(Evaluation(1, 64, 1.5, 2.0))
