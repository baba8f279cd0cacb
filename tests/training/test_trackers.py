"""Trackers get every record, and one that fails costs no training."""

import errno
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmfast.errors import InputError
from llmfast.models import GPT, preset
from llmfast.training import Evaluation, Step, TrainConfig, loop, train
from llmfast.training.metrics import read_metrics
from llmfast.training.trackers import TensorBoard, Tracker


class Silent:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def step(self, step: Step, progress: float) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(run_dir: Path, tracker: Tracker, resume: bool = False, stop_at: int | None = None) -> list[str]:
    """Eight steps, saved and evaluated every second one; fetching batch `stop_at` fails."""

    def batches(index: int) -> Tensor:
        if index == stop_at:
            raise KeyboardInterrupt
        return torch.randint(0, 32, (2, 17), generator=torch.Generator().manual_seed(index))

    torch.manual_seed(0)
    model, report = GPT(preset("tiny", vocab_size=32, context_length=16, n_layer=1)), Silent()
    config = TrainConfig(max_steps=8, batch_size=2, context=16, save_every=2, eval_every=2)
    train(
        model,
        config,
        batches,
        evaluate=lambda model: model.token_embedding.weight[0, 0].item(),
        run_dir=run_dir,
        resume=resume,
        report=report,
        trackers=[tracker],
    )
    return report.messages


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), purge_orphaned_data=True)
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_shows_the_records_of_a_run_and_of_its_resumption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 5, after the checkpoint, is done again and is there once. What was measured is there while a run goes on."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(loop, "STEPS_A_REPORT", 1)
    tracker = TensorBoard(tmp_path / "tensorboard")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tracker, stop_at=5)
    assert [step for step, _ in scalars(tracker.folder)["loss"]] == [1, 2, 3, 4, 5]
    run(tmp_path, TensorBoard(tmp_path / "tensorboard"), resume=True)
    found, records = scalars(tmp_path / "tensorboard"), read_metrics(tmp_path / "metrics.jsonl")
    assert set(found) == {"loss", "lr", "grad_norm", "tok_s", "val_bpb"}
    for name, values in found.items():
        expected = {r["step"]: r[name] for r in records if name in r}
        assert dict(values) == pytest.approx(expected, rel=1e-6)
        assert [step for step, _ in values if name != "val_bpb"] in ([], list(range(1, 9)))


def test_no_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="TensorBoard's package is missing .*; pip install tensorboard"):
        TensorBoard(tmp_path)


class Full:
    def rewind(self, step: int, on_skip: object) -> None: ...

    def append(self, records: Sequence[Step | Evaluation]) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_tracker_that_cannot_write_is_reported(tmp_path: Path) -> None:
    messages = run(tmp_path, Full())
    assert messages and all("training goes on without metrics of step" in m and "No space" in m for m in messages)
    assert len([r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]) == 8
