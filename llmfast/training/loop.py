"""The only training loop: accumulate, clip, update, measure, save, evaluate, and stop or resume at any step."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .. import __version__, environment, hardware
from ..errors import CheckpointError, InputError, LLMFastError
from ..models import GPT
from ..weights import latest, save
from . import optim
from .config import TrainConfig
from .gradients import IGNORED, Gradients
from .metrics import Evaluation, MetricsFile, Step
from .trackers import Tracker

STEPS_A_REPORT = 10  # losses stay on the device this long, or for a second, so that the host does not wait for it
MAX_SKIPPED = 10  # updates in a row without a finite loss and gradient


class Report(Protocol):
    """Hears how training goes; `Progress` shows it."""

    def step(self, step: Step, progress: float) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def message(self, text: str) -> None: ...


@dataclass(frozen=True)
class Result:
    """How a run ended: steps done, tokens trained on, best validation bits per byte, stopped by a signal or not."""

    step: int
    tokens: int
    best_bpb: float | None
    interrupted: bool


def train(
    model: GPT,
    config: TrainConfig,
    batches: Callable[[int], Tensor],
    *,
    evaluate: Callable[[GPT], float] | None,
    run_dir: Path,
    resume: bool,
    report: Report,
    corpus_hash: str = "",
    trackers: Sequence[Tracker] = (),
) -> Result:
    """Train `model` in place until max_steps, the end of the budget, SIGTERM or SIGINT (a second SIGINT interrupts).

    `batches(i)` gives batch i, int64 (batch_size, context + 1) on the CPU, as a pure function of i: step n uses batches
    n * accumulation and on. In it -100 is padding. `evaluate` gives validation bits per byte.

    Writes `run_dir/metrics.jsonl` (`trackers` get the same records), `run_dir/checkpoints/step-N` and, after each
    evaluation that is the best so far, its weights in `run_dir/best/step-N`. With `resume` the newest undamaged
    checkpoint is continued. A failed save or an
    evaluation that runs out of memory is reported and training goes on. An update whose loss or gradient is not finite,
    or whose gradient stands out (`spike_threshold`), is left out; ten in a row raise LLMFastError after a save.
    """
    config.check_fits(model.config)
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    if config.deterministic:
        environment.make_cublas_deterministic()
    torch.use_deterministic_algorithms(config.deterministic or was_deterministic)
    was_training, was_checkpointing, was_fp8 = model.training, model.activation_checkpointing, model.fp8
    model.activation_checkpointing = config.activation_checkpointing
    model.set_fp8(config.fp8)
    try:
        run = _Run(model, config, batches, evaluate, run_dir, report, corpus_hash, trackers)
        try:
            run.restore() if resume else torch.manual_seed(config.seed)
            with _stop_on_signal() as stop:
                return run.until(stop.is_set)
        finally:
            run.optimizer.release()
    finally:
        model.train(was_training)
        model.activation_checkpointing = was_checkpointing
        model.set_fp8(was_fp8)
        torch.use_deterministic_algorithms(was_deterministic)


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        batches: Callable[[int], Tensor],
        evaluate: Callable[[GPT], float] | None,
        run_dir: Path,
        report: Report,
        corpus_hash: str,
        trackers: Sequence[Tracker],
    ) -> None:
        self.model, self.config, self.batches, self.evaluate = model, config, batches, evaluate
        self.run_dir, self.report, self.corpus_hash = run_dir, report, corpus_hash
        self.device = model.token_embedding.weight.device
        self.optimizer = optim.Optimizer(model, config)
        self.gradients = Gradients(model, config.cuda_graph)
        self.trackers: list[Tracker] = [MetricsFile(run_dir / "metrics.jsonl"), *trackers]
        self.step, self.tokens, self.best_bpb = 0, 0, math.inf
        self.skipped_in_a_row = 0
        self.reported_tokens = 0
        self.seconds_before = 0.0  # of the processes this one resumes
        self.started = self.reported_at = time.perf_counter()
        self.unreported: list[tuple[int, int, float, Tensor]] = []  # step, tokens, lr, [loss, norm, made] on device

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    @property
    def progress(self) -> float:
        """The share of the schedule that is done; 1 is the end."""
        by_step = self.step / self.config.max_steps
        budget = self.config.budget_seconds
        return min(1.0, by_step if budget is None else max(by_step, self.seconds / budget))

    def until(self, stopped: Callable[[], bool]) -> Result:
        first = self.step
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for tracker in self.trackers:
            tracker.rewind(first, self.report.message)
        self.reported_tokens, saved = self.tokens, True
        while True:
            finished, interrupted = self.progress >= 1.0, stopped()
            ends = finished or interrupted
            due = ends or self.step % self.config.save_every == 0
            if (self.step > first and due) or (self.step == 0 and ends):  # a run stopped before step 1 can be resumed
                saved = self.save()  # before the evaluation, which may fail
            if self.step > 0 and not interrupted and (finished or self.step % self.config.eval_every == 0):
                self.measure()
            if interrupted and not saved:
                remedy = "free space, then resume from the checkpoint before"
                raise CheckpointError(f"{self.run_dir}: stopped after step {self.step}, which is not saved; {remedy}")
            if ends:
                best = None if math.isinf(self.best_bpb) else self.best_bpb
                return Result(self.step, self.tokens, best, stopped())  # asked again: it may have come while measuring
            self.update()
            if len(self.unreported) >= STEPS_A_REPORT or time.perf_counter() - self.reported_at > 1.0:
                self.report_steps()

    def update(self) -> None:
        """One step: gradients of all its batches, and the update of the weights unless it is to be left out."""
        config, rate = self.config, optim.learning_rate(self.config, self.step, self.progress)
        self.model.train()
        batches = [self.batches(self.step * config.accumulation + i) for i in range(config.accumulation)]
        valid = [int((batch[:, 1:] != IGNORED).sum()) for batch in batches]
        loss = torch.zeros((), device=self.device)
        for batch, count in zip(batches, valid, strict=True):
            # Means weighted by their tokens: the mean over the whole step, however padding is spread over its batches.
            loss = loss + self.gradients(batch, count / max(1, sum(valid)))
            if len(batches) > 1:
                self.optimizer.add_gradients()
        outcome = self.optimizer.step(rate, self.step + 1, loss)
        self.step += 1
        self.tokens += sum(valid)
        self.unreported.append((self.step, self.tokens, rate, torch.cat((loss[None], outcome))))

    def report_steps(self) -> None:
        """Fetch the losses of the steps since the last call, and write and report them.

        Too many without an update raise LLMFastError here: saves may be so frequent that nobody else calls this.
        """
        if not self.unreported:
            return
        values = torch.stack([row[3] for row in self.unreported]).tolist()  # the host waits for the device here
        now = time.perf_counter()
        tok_s = (self.tokens - self.reported_tokens) / (now - self.reported_at)
        steps = []
        for (step, tokens, rate, _), (loss, norm, made) in zip(self.unreported, values, strict=True):
            skipped = made == 0.0
            self.skipped_in_a_row = self.skipped_in_a_row + 1 if skipped else 0
            steps.append(Step(step, tokens, loss, rate, norm, tok_s, self.seconds, skipped))
            if skipped:
                self.report.message(f"step {step} skipped: loss {loss}, gradient norm {norm}")
        self.unreported, self.reported_at, self.reported_tokens = [], now, self.tokens
        self.write(*steps)
        self.report.step(steps[-1], self.progress)
        if self.skipped_in_a_row >= MAX_SKIPPED:
            self.save()
            raise LLMFastError(
                f"{self.skipped_in_a_row} steps in a row up to step {self.step} had a loss or gradient that is not"
                " finite or stands out; the weights before them are saved, lower the learning rate or check the data"
            )

    def measure(self) -> None:
        """Evaluate, and keep the weights if they are the best so far."""
        if self.evaluate is None:
            return
        self.report_steps()
        try:
            bpb = self.evaluate(self.model)
        except (RuntimeError, MemoryError) as error:
            if not hardware.is_out_of_memory(error):
                raise
            self.report.message(f"evaluation at step {self.step} ran out of memory, training goes on: {_line(error)}")
        else:
            evaluation = Evaluation(self.step, self.tokens, bpb, self.seconds)
            self.write(evaluation)
            self.report.evaluation(evaluation)
            if bpb < self.best_bpb and self.try_save("best", {"model": self.optimizer.masters()}, {"val_bpb": bpb}):
                self.best_bpb = bpb
        self.reported_at = time.perf_counter()

    def save(self) -> bool:
        """Write everything that the next step depends on; whether that could be done."""
        self.report_steps()
        rng = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            rng["cuda"] = torch.cuda.get_rng_state(self.device)
        tensors = {
            "model": self.optimizer.masters(),
            "optimizer": self.optimizer.state(),
            "rng": rng,
        }
        saved = self.try_save("checkpoints", tensors, {"tokens": self.tokens, "seconds": self.seconds})
        self.reported_at = time.perf_counter()
        return saved

    def try_save(self, kind: str, tensors: dict[str, dict[str, Tensor]], values: dict[str, Any]) -> bool:
        state = values | {
            "step": self.step,
            "model": self.model.config.to_dict(),
            "training": self.config.to_dict(),
            "corpus_hash": self.corpus_hash,
            "versions": {"llmfast": __version__, "torch": torch.__version__},
        }
        try:
            save(self.run_dir / kind, self.step, tensors, state)
        except CheckpointError as error:
            self.report.message(f"training goes on without a checkpoint of step {self.step}: {error}")
            return False
        return True

    def write(self, *records: Step | Evaluation) -> None:
        for tracker in self.trackers:
            try:
                tracker.append(records)
            except OSError as error:
                self.report.message(f"training goes on without metrics of step {self.step}: {error}")

    def restore(self) -> None:
        """Continue the newest undamaged checkpoint."""
        checkpoint = latest(self.run_dir / "checkpoints", self.report.message)
        for what, saved, given in (
            ("model", checkpoint.state["model"], self.model.config.to_dict()),
            ("corpus", checkpoint.state["corpus_hash"], self.corpus_hash),
        ):
            if saved != given:
                raise InputError(f"{checkpoint.path}: was trained with another {what}; resume with that one")
        self.optimizer.load(checkpoint.tensors("model"), checkpoint.tensors("optimizer"))
        rng = checkpoint.tensors("rng")
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"], self.device)
        self.step, self.tokens = checkpoint.step, checkpoint.state["tokens"]
        self.seconds_before = checkpoint.state["seconds"]
        if (self.run_dir / "best").is_dir():
            try:
                self.best_bpb = latest(self.run_dir / "best", self.report.message).state["val_bpb"]
            except CheckpointError as error:
                self.report.message(f"the best weights so far are lost, later ones will be kept: {error}")
        self.report.message(f"resumed {checkpoint.path}")


@contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """An event that SIGTERM and the first SIGINT set. Signals can be handled in the main thread only."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, previous[signal.Signals(number)])  # the second one acts as it would without us

    try:
        for number in previous:
            signal.signal(number, handle)
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _line(error: Exception) -> str:
    return str(error).split("\n")[0]
