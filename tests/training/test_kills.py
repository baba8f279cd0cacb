"""kill -9 at random moments, again and again: the run that goes on each time is the uninterrupted one, bit for bit.

On the GPU if there is one. The long form: pytest -m slow tests/training/test_kills.py
"""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

from llmfast.models import GPT, preset
from llmfast.training import Evaluation, Step, TrainConfig, train
from llmfast.training.metrics import read_metrics
from llmfast.weights import latest

ACCUMULATION = 2
SAVE_EVERY = 4
MAX_DELAY = 0.05  # seconds from a batch to the kill: it hits the passes, the update, a save or an evaluation


class Printer:
    def step(self, step: Step, progress: float) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def message(self, text: str) -> None:
        print(text, flush=True)


def attempt(run_dir: Path, device: str, steps: int, doomed_at: int | None, pipe: int) -> None:
    """Train, from the newest checkpoint if there is one; a byte in `pipe` says that batch `doomed_at` is reached."""

    def batch(index: int) -> torch.Tensor:
        return torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(index))

    def batches(index: int) -> torch.Tensor:
        if doomed_at is not None and index >= doomed_at:
            os.write(pipe, b".")
        return batch(index)

    @torch.no_grad()
    def evaluate(model: GPT) -> float:
        model.eval()
        ids = batch(10**6).to(device)
        return model.loss(ids[:, :-1], ids[:, 1:]).item()

    config = TrainConfig(
        max_steps=steps,
        batch_size=2,
        accumulation=ACCUMULATION,
        context=32,
        warmup_steps=3,
        optimizer="muon",  # of the blocks' matrices, AdamW of the rest
        spike_threshold=3.0,
        save_every=SAVE_EVERY,
        eval_every=2 * SAVE_EVERY,
        deterministic=True,
    )
    torch.set_num_threads(1)  # which costs such a model nothing, and busy machines do not slow it down
    torch.manual_seed(1)
    model = GPT(preset("tiny", dropout=0.2), torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    resume = any(path.suffix == "" for path in (run_dir / "checkpoints").glob("step-*"))  # not step-4.tmp-123
    train(model, config, batches, evaluate=evaluate, run_dir=run_dir, resume=resume, report=Printer())


def drive(run_dir: Path, device: str, steps: int, points: list[tuple[int, float]]) -> None:
    """A process for each of `points`, killed so many seconds after that batch, and one for the rest. Prints their ends.

    This process imports what they need, and never trains: a copy of it starts at once.
    """
    torch.use_deterministic_algorithms(True)  # imports much
    if device == "cuda":
        importlib.import_module("triton")
    for doomed_at, delay in [*points, (None, 0.0)]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                attempt(run_dir, device, steps, doomed_at, writing)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        os.close(writing)
        if os.read(reading, 1):
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        os.close(reading)
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def outcome(run_dir: Path, device: str, steps: int, points: list[tuple[int, float]]) -> tuple[list[int], list[int]]:
    """`drive` in a process of its own: how its processes ended, and the steps that were resumed."""
    code = (
        "import importlib.util, pathlib\n"
        f"spec = importlib.util.spec_from_file_location('test_kills', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"module.drive(pathlib.Path({str(run_dir)!r}), {device!r}, {steps}, {points!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    ends = [int(line.split()[1]) for line in lines if line.startswith("ended ")]
    assert 1 not in ends, done.stderr
    return ends, [int(line.rsplit("-", 1)[1]) for line in lines if line.startswith("resumed ")]


def compare(whole: Path, killed: Path, steps: int) -> None:
    """Every number that time does not change, and every bit of the state at the end."""
    runs = [
        [{k: v for k, v in r.items() if k not in ("seconds", "tok_s")} for r in read_metrics(path / "metrics.jsonl")]
        for path in (whole, killed)
    ]
    assert runs[0] == runs[1]
    assert [r["step"] for r in runs[0] if "loss" in r] == list(range(1, steps + 1))
    for kind in ("checkpoints", "best"):
        first, second = (latest(path / kind, pytest.fail) for path in (whole, killed))
        assert first.step == second.step
        for file in first.path.glob("*.safetensors"):
            left, right = (checkpoint.tensors(file.stem) for checkpoint in (first, second))
            assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left), file
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == sorted(
        f"step-{n}" for n in (steps - SAVE_EVERY, steps)
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("kills, steps", [(3, 24), pytest.param(20, 160, marks=pytest.mark.slow)])
def test_killed_again_and_again(kills: int, steps: int, tmp_path: Path) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = random.Random(kills)
    batches = sorted(generator.sample(range(int(0.85 * steps * ACCUMULATION)), kills))
    points = [(batch, generator.uniform(0.0, MAX_DELAY)) for batch in batches]
    assert outcome(tmp_path / "whole", device, steps, []) == ([0], [])
    ends, resumed = outcome(tmp_path / "killed", device, steps, points)
    assert ends == [-signal.SIGKILL] * kills + [0]
    assert resumed == sorted(resumed) and len(set(resumed)) > kills // 2
    compare(tmp_path / "whole", tmp_path / "killed", steps)
