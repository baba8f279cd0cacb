"""The loop learns, weighs accumulated batches by tokens, skips what is not finite, and stops and fails as promised."""

import errno
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast.errors import CheckpointError, InputError, LLMFastError
from llmfast.models import GPT, preset
from llmfast.training import Evaluation, Result, Step, TrainConfig, loop, train
from llmfast.training.metrics import read_metrics
from llmfast.weights import latest


class Recorder:
    """A Report that keeps everything."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def step(self, step: Step, progress: float) -> None:
        assert 0 < progress <= 1

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def make_model(dropout: float = 0.0) -> GPT:
    torch.manual_seed(0)
    return GPT(preset("tiny", vocab_size=32, context_length=16, n_layer=1, dropout=dropout))


def batches(index: int) -> Tensor:
    start = torch.randint(0, 32, (4, 1), generator=torch.Generator().manual_seed(index))
    return (start + 3 * torch.arange(17)) % 32


def config(**fields) -> TrainConfig:
    return TrainConfig(**({"max_steps": 12, "batch_size": 4, "context": 16, "warmup_steps": 2} | fields))


def run(
    tmp_path: Path, model: GPT | None = None, *, evaluate=None, report=None, resume=False, data=batches, **fields
) -> Result:
    return train(
        model or make_model(),
        config(**fields),
        data,
        evaluate=evaluate,
        run_dir=tmp_path,
        resume=resume,
        report=report or Recorder(),
    )


def losses(run_dir: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(run_dir / "metrics.jsonl") if "loss" in r]


def weights(model: GPT) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def test_learns_and_records_every_step(tmp_path: Path) -> None:
    result = run(tmp_path, max_steps=60, learning_rate=1e-2)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert result == Result(step=60, tokens=60 * 64, best_bpb=None, interrupted=False)
    assert [r["step"] for r in records] == list(range(1, 61))
    assert [r["tokens"] for r in records] == [64 * n for n in range(1, 61)]
    assert records[0]["loss"] > 3.0 and records[-1]["loss"] < 0.5
    assert all(r["tok_s"] > 0 and r["grad_norm"] > 0 and not r["skipped"] for r in records)


def test_accumulation_is_one_large_batch_however_padded(tmp_path: Path) -> None:
    """Two batches of 2, one mostly padding, give the update of both as one batch of 4."""

    def whole(index: int) -> Tensor:
        batch = batches(index)
        batch[:2, 5:] = loop.IGNORED
        return batch

    one, two = make_model(), make_model()
    run(tmp_path / "one", one, data=whole, max_steps=3)
    halves: Callable[[int], Tensor] = lambda i: whole(i // 2)[2 * (i % 2) : 2 * (i % 2) + 2]  # noqa: E731
    run(tmp_path / "two", two, data=halves, max_steps=3, batch_size=2, accumulation=2)
    assert losses(tmp_path / "one") == pytest.approx(losses(tmp_path / "two"), rel=1e-5)
    assert read_metrics(tmp_path / "two" / "metrics.jsonl")[0]["tokens"] == 2 * 4 + 2 * 16
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_clipping_bounds_the_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scales = []
    real = loop.optim.ops.adamw_

    def spy(*tensors, grad_scale, **settings):
        scales.append(grad_scale)
        real(*tensors, grad_scale=grad_scale, **settings)

    monkeypatch.setattr(loop.optim.ops, "adamw_", spy)
    run(tmp_path, grad_clip=0.01, max_steps=3)
    norms = [record["grad_norm"] for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert [scale * norm for scale, norm in zip(scales[::2], norms, strict=True)] == pytest.approx([0.01] * 3, rel=1e-3)


def poison(monkeypatch: pytest.MonkeyPatch, bad: Callable[[int], bool]) -> None:
    """The loss of the calls for which `bad(call number)` becomes nan."""
    real, calls = GPT.loss, iter(range(10**6))
    monkeypatch.setattr(GPT, "loss", lambda self, x, y: real(self, x, y) * (float("nan") if bad(next(calls)) else 1.0))


def test_a_step_that_is_not_finite_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, report = make_model(), Recorder()
    poison(monkeypatch, lambda call: call >= 5)
    run(tmp_path, model, max_steps=9, report=report)
    five = make_model()
    monkeypatch.undo()
    # The same five updates on the same schedule, stopped there.
    monkeypatch.setattr(loop._Run, "progress", property(lambda self: 1.0 if self.step >= 5 else self.step / 9))
    run(tmp_path / "five", five, max_steps=9)
    assert all(torch.equal(p, q) for p, q in zip(weights(model), weights(five), strict=True))
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [r["skipped"] for r in records] == [False] * 5 + [True] * 4
    assert records[-1]["loss"] is None
    assert report.messages[0].startswith("step 6 skipped: loss nan")


def test_a_spike_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient 1000 times as large as others, in update 56 only; without the threshold it would be made."""
    real, calls = GPT.loss, iter(range(10**6))
    monkeypatch.setattr(GPT, "loss", lambda self, x, y: real(self, x, y) * (1000.0 if next(calls) % 60 == 55 else 1.0))
    for threshold, skipped in ((20.0, [56]), (float("inf"), [])):
        run(tmp_path / str(threshold), max_steps=60, learning_rate=1e-4, spike_threshold=threshold)
        records = read_metrics(tmp_path / str(threshold) / "metrics.jsonl")
        assert [r["step"] for r in records if r["skipped"]] == skipped
        assert records[55]["grad_norm"] > 100 * records[54]["grad_norm"]


@pytest.mark.parametrize("save_every", [100, 4])
def test_ten_skipped_in_a_row_stop_with_a_saved_state(
    save_every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often what was measured is fetched."""
    poison(monkeypatch, lambda call: call >= 3 and call != 7)
    with pytest.raises(LLMFastError, match="1[0-9] steps in a row .* lower the learning rate"):
        run(tmp_path, max_steps=1000, save_every=save_every)
    checkpoint = latest(tmp_path / "checkpoints", pytest.fail)
    assert 18 <= checkpoint.step <= 18 + loop.STEPS_A_REPORT
    assert all(t.isfinite().all() for t in checkpoint.tensors("model").values())
    assert all(t.isfinite().all() for t in checkpoint.tensors("optimizer").values())


def test_budget_completes_the_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that advances a millisecond whenever it is read."""
    readings = iter(range(10**6))
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: next(readings) / 1000))
    result = run(tmp_path, max_steps=10**6, budget_seconds=0.5, learning_rate=1e-3, min_lr_ratio=0.1)
    assert 500 <= next(readings) < 550
    rates = [r["lr"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert 10 < result.step < 10**6 and not result.interrupted
    assert rates[-1] < 1.2e-4 and max(rates) > 9e-4


def test_save_comes_before_evaluation_and_best_is_kept(tmp_path: Path) -> None:
    values = iter([3.0, 2.0, 2.5, 2.2])
    order = []

    def evaluate(model: GPT) -> float:
        order.append(sorted(p.name for p in (tmp_path / "checkpoints").iterdir())[-1])
        return next(values)

    model = make_model()
    result = run(tmp_path, model, evaluate=evaluate, max_steps=8, eval_every=2, save_every=2)
    assert order == ["step-2", "step-4", "step-6", "step-8"]
    assert result.best_bpb == 2.0
    best = latest(tmp_path / "best", pytest.fail)
    assert (best.step, best.state["val_bpb"]) == (4, 2.0)
    assert not torch.equal(best.tensors("model")["token_embedding.weight"], model.token_embedding.weight)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "val_bpb" in r]
    assert [(r["step"], r["val_bpb"]) for r in records] == [(2, 3.0), (4, 2.0), (6, 2.5), (8, 2.2)]


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, MemoryError, RuntimeError])
def test_failed_save_and_evaluation_are_reported_and_training_goes_on(kind: type, tmp_path: Path, monkeypatch) -> None:
    def no_space(*args, **kwargs):
        raise CheckpointError("disk full")

    def no_memory(model: GPT) -> float:
        raise kind("CUDA error: out of memory\nand more")

    report = Recorder()
    monkeypatch.setattr(loop, "save", no_space)
    result = run(tmp_path, evaluate=no_memory, report=report, max_steps=4, save_every=2, eval_every=4)
    assert result.step == 4 and len(losses(tmp_path)) == 4
    assert [m.split(":")[0] for m in report.messages] == [
        "training goes on without a checkpoint of step 2",
        "training goes on without a checkpoint of step 4",
        "evaluation at step 4 ran out of memory, training goes on",
    ]
    assert "and more" not in report.messages[2]


def test_a_disk_that_fills_up_and_is_freed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file can be synced in steps 3 to 6; the checkpoint before, those after, and all metrics are there."""
    kept, report = [], Recorder()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def data(index: int) -> Tensor:
        if index == 2:
            monkeypatch.setattr(os, "fsync", full)
        if index == 6:
            monkeypatch.undo()
            kept.append(latest(tmp_path / "checkpoints", pytest.fail).step)
        return batches(index)

    result = run(
        tmp_path, data=data, evaluate=lambda model: 1.0, report=report, max_steps=8, save_every=2, eval_every=4
    )
    assert result.step == 8 and len(losses(tmp_path)) == 8 and kept == [2]
    assert [m.split(":")[0] for m in report.messages] == [
        "training goes on without a checkpoint of step 4",  # of the state, then of the best weights
        "training goes on without a checkpoint of step 4",
        "training goes on without a checkpoint of step 6",
    ]
    assert all("(No space left on device); free space there" in m for m in report.messages)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-2", "step-8"]
    assert latest(tmp_path / "best", pytest.fail).step == 8  # step 4's, as good, was not kept


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path: Path, number: signal.Signals) -> None:
    def data(index: int) -> Tensor:
        if index == 5:
            os.kill(os.getpid(), number)
        return batches(index)

    before = signal.getsignal(number)
    result = run(tmp_path, data=data, save_every=100)
    assert result == Result(step=6, tokens=6 * 64, best_bpb=None, interrupted=True)
    assert latest(tmp_path / "checkpoints", pytest.fail).step == 6
    assert signal.getsignal(number) is before


def test_a_signal_whose_checkpoint_finds_no_room_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def data(index: int) -> Tensor:
        if index == 5:
            monkeypatch.setattr(loop, "save", no_space)
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(index)

    def no_space(*args: Any, **kwargs: Any) -> None:
        raise CheckpointError("disk full")

    with pytest.raises(CheckpointError, match="stopped after step 6, which is not saved; free space"):
        run(tmp_path, data=data, save_every=3)
    assert latest(tmp_path / "checkpoints", pytest.fail).step == 3


@pytest.mark.parametrize("during", ["last step", "last evaluation"])
def test_a_signal_at_the_end_stops_too(tmp_path: Path, during: str) -> None:
    """What should follow the last step, a resume does."""

    def data(index: int) -> Tensor:
        if during == "last step" and index == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return batches(index)

    def evaluate(model: GPT) -> float:
        if during == "last evaluation":
            os.kill(os.getpid(), signal.SIGTERM)
        return 1.0

    assert run(tmp_path, data=data, evaluate=evaluate).interrupted
    result = run(tmp_path, evaluate=lambda model: 1.0, resume=True)
    assert result == Result(step=12, tokens=12 * 64, best_bpb=1.0, interrupted=False)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [*range(1, 13), 12]


def test_a_second_interrupt_interrupts(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

    def data(index: int) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return batches(index)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, data=data)
    finally:
        signal.signal(signal.SIGINT, before)


def test_deterministic_is_set_and_put_back(tmp_path: Path) -> None:
    seen = []

    def data(index: int) -> Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return batches(index)

    run(tmp_path, data=data, deterministic=True, max_steps=1)
    assert seen == [True] and not torch.are_deterministic_algorithms_enabled()


def test_checkpointing_changes_no_bit_and_is_put_back(tmp_path: Path) -> None:
    seen, models = [], {}
    for again in (False, True):
        models[again] = model = make_model(dropout=0.2)

        def data(index: int, model: GPT = model) -> Tensor:
            seen.append(model.activation_checkpointing)
            return batches(index)

        run(tmp_path / str(again), model, data=data, max_steps=4, accumulation=2, activation_checkpointing=again)
    assert seen == [False] * 8 + [True] * 8 and not models[True].activation_checkpointing
    assert losses(tmp_path / "True") == losses(tmp_path / "False")
    assert all(torch.equal(p, q) for p, q in zip(weights(models[True]), weights(models[False]), strict=True))


def test_no_graph_of_checkpointed_dropout(tmp_path: Path) -> None:
    both = {"cuda_graph": True, "activation_checkpointing": True}
    with pytest.raises(InputError, match="cuda_graph is True; it must be False .* dropout 0.2"):
        run(tmp_path, make_model(dropout=0.2), **both)
    assert run(tmp_path, max_steps=1, **both).step == 1  # without dropout


@pytest.mark.gpu
def test_a_graph_of_checkpointed_blocks(tmp_path: Path) -> None:
    curves = []
    for again in (False, True):
        model, run_dir = make_model().to("cuda"), tmp_path / str(again)
        run(run_dir, model, cuda_graph=True, deterministic=True, activation_checkpointing=again)
        curves.append(losses(run_dir))
    assert curves[0] == curves[1]


def test_too_long_a_context_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="context is 17; it must be at most 16"):
        run(tmp_path, context=17)


def test_a_run_stopped_before_its_first_step_can_be_resumed(tmp_path: Path) -> None:
    result = run(tmp_path / "run", budget_seconds=1e-9)
    assert (result.step, latest(tmp_path / "run" / "checkpoints", pytest.fail).step) == (0, 0)
    assert run(tmp_path / "run", resume=True).step == 12
    run(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_steps", True),
        ("max_steps", 10**20),
        ("seed", 1.5),
        ("seed", 10**20),
        ("betas", 3),
        ("betas", ("a", 0.9)),
        ("weight_decay", "a"),
        ("learning_rate", 10**400),
        ("budget_seconds", "1"),
        ("deterministic", 1),
        ("warmup_steps", None),
    ],
)
def test_values_of_the_wrong_type_are_named(field: str, value: object) -> None:
    for make in (config, lambda **fields: TrainConfig.from_dict({"max_steps": 1} | fields)):
        with pytest.raises(InputError, match=f"TrainConfig.{field} is "):
            make(**{field: value})
