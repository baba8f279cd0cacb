"""Memory that runs out: an automatic batch is halved at the start, evaluations at any time, and the rest is told."""

import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmfast.models import GPT
from llmfast.training import loop
from llmfast.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., None]

TRAIN = ("--preset", "tiny", "--device", "cpu", "--context", "32", "--steps", 3)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("CPU: can't allocate memory")]
REMEDY = ("ran out of memory; give a smaller --batch-size and a larger --accumulation", "--activation-checkpointing")


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """limit(training, evaluation, error) sequences at once fit the memory; returns the numbers that are tried."""

    def limit(training: int, evaluation: int = 1 << 20, error: Exception = ERRORS[0]) -> list[int]:
        tried: list[int] = []

        def loss(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
            tried.append(len(ids))
            if len(ids) > (training if self.training else evaluation):
                raise type(error)(*error.args)  # a new one, as it holds on to all that it went through
            return real(self, ids, targets)

        monkeypatch.setattr(GPT, "loss", loss)
        return tried

    real = GPT.loss
    return limit


def losses(run: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]


def test_auto_is_halved_until_it_fits(data: Path, tmp_path: Path, cli: Cli, limit) -> None:
    """A step is the same sequences as before, and the run that of the numbers it ends with, bit for bit."""
    tried, run = limit(16), tmp_path / "run"
    code, out, _ = cli("train", "--data", data, *TRAIN, "--batch-size", "auto", "--out", run)
    assert code == 0 and tried[:4] == [128, 64, 32, 16]
    assert out.count("do not fit the memory") == 3
    assert "32 sequences at once do not fit the memory; now 8 batches of 16 a step" in out
    training = json.loads((run / "config.json").read_text())["training"]
    assert (training["batch_size"], training["accumulation"]) == (16, 8)
    tokens = [r["tokens"] for r in read_metrics(run / "metrics.jsonl") if "loss" in r]
    assert tokens == [4096, 8192, 12288]
    numbers = ("--batch-size", 16, "--accumulation", 8)
    assert cli("train", "--data", data, *TRAIN, *numbers, "--out", tmp_path / "same")[0] == 0
    assert losses(run) == losses(tmp_path / "same")
    whole = ("--batch-size", 128)
    limit(128)
    assert cli("train", "--data", data, *TRAIN, *whole, "--out", tmp_path / "whole")[0] == 0
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-3)  # bfloat16 where the CPU has it
    assert cli("train", "--resume", run)[0] == 0


@pytest.mark.parametrize("error", ERRORS[1:], ids=lambda error: type(error).__name__)
def test_the_hosts_memory_counts_too(data: Path, tmp_path: Path, cli: Cli, limit, error: Exception) -> None:
    tried = limit(64, evaluation=16, error=error)
    options = ("--batch-size", "auto", "--out", tmp_path / "run")
    with pytest.warns(UserWarning, match="now 16 windows"):
        assert cli("train", "--data", data, *TRAIN[:-1], 1, *options)[0] == 0
    assert tried[:2] == [128, 64]


def test_a_batch_size_that_was_given_is_kept(data: Path, tmp_path: Path, cli: Cli, limit, refused: Refused) -> None:
    tried = limit(4)
    refused(cli("train", "--data", data, *TRAIN, "--batch-size", 8, "--out", tmp_path / "run"), *REMEDY)
    assert tried == [8] and not (tmp_path / "run").exists()


def test_not_even_one_sequence_fits(
    data: Path, tmp_path: Path, cli: Cli, limit, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """Before a smaller batch is tried, the memory of the one before is given back, also where Python collects late."""
    tried, models = limit(0), []
    limited = GPT.loss

    def watched(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        assert all(model() is None for model in models)
        models.append(weakref.ref(self))
        return limited(self, ids, targets)

    monkeypatch.setattr(GPT, "loss", watched)
    gc.disable()
    try:
        result = cli("train", "--data", data, *TRAIN, "--batch-size", "auto", "--out", tmp_path / "run")
    finally:
        gc.enable()
    refused(result, *REMEDY)
    assert tried == [128, 64, 32, 16, 8, 4, 2, 1] and not (tmp_path / "run").exists()


def test_later_steps_are_not_done_again(
    data: Path, tmp_path: Path, cli: Cli, limit, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """A run that has begun keeps what it has; its user hears why it ended."""
    tried, allowed = limit(128), iter([1, 1])
    limited = GPT.loss

    def third_fails(self: GPT, ids: Tensor, targets: Tensor) -> Tensor:
        if next(allowed, None) is None:
            raise ERRORS[0]
        return limited(self, ids, targets)

    monkeypatch.setattr(GPT, "loss", third_fails)
    monkeypatch.setattr(loop, "STEPS_A_REPORT", 1)
    refused(cli("train", "--data", data, *TRAIN, "--batch-size", "auto", "--out", tmp_path / "run"), *REMEDY)
    assert tried == [128, 128] and len(losses(tmp_path / "run")) == 2


def test_evaluations_are_halved_down_to_one(data: Path, tmp_path: Path, cli: Cli, limit, refused: Refused) -> None:
    run, options = tmp_path / "run", ("--batch-size", 4, "--out")
    tried = limit(4, evaluation=1)
    with pytest.warns(UserWarning, match="evaluation ran out of memory; now [421] windows at once"):
        assert cli("train", "--data", data, *TRAIN, *options, run)[0] == 0
    assert tried[3:7] == [8, 4, 2, 1]
    assert json.loads((run / "record.json").read_text())["result"]["val_bpb"] > 0
    limit(4, evaluation=0)
    with pytest.warns(UserWarning):
        result = cli("train", "--data", data, *TRAIN, *options, tmp_path / "none")
    assert "evaluation at step 3 ran out of memory, training goes on: CUDA out of memory" in result[1]
    refused(result, *REMEDY)  # of the last one, without which there is no result
    assert len(losses(tmp_path / "none")) == 3
    with pytest.warns(UserWarning):
        refused(cli("eval", run, "--device", "cpu"), "ran out of memory; give a smaller --context")
    refused(cli("eval", run, "--device", "cpu", "--batch-size", 0), "batch_size is 0; it must be positive")


def test_what_can_never_fit_is_refused_before_it_is_tried(cli: Cli, tmp_path: Path, refused: Refused) -> None:
    got = cli("train", *TRAIN, "--data", "nowhere.txt", "--batch-size", 10**7, "--out", tmp_path / "run")
    refused(got, "10000000 sequences at once need about", "GiB, and ", "; give a smaller --batch-size")
    assert not (tmp_path / "run").exists()
