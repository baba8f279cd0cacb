"""A run killed with SIGKILL and resumed gives the losses and weights of an uninterrupted one, bit for bit."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmfast.errors import CheckpointError, InputError
from llmfast.models import GPT, preset
from llmfast.training import Evaluation, Step, TrainConfig, train
from llmfast.training.metrics import read_metrics
from llmfast.weights import latest

STEPS = 14


class Silent:
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.batches: list[int] = []  # asked for

    def step(self, step: Step, progress: float) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def run(
    run_dir: Path,
    *,
    bpb: tuple[float, ...] = (4.0, 3.0, 5.0, 2.0),
    resume: bool = False,
    kill_at: int | None = None,
    corpus_hash: str = "c",
    dropout: float = 0.2,
    device: str = "cpu",
    cuda_graph: bool = False,
) -> Silent:
    """Train the tiny preset with dropout. Evaluations give `bpb` in turn; fetching batch `kill_at` kills.

    On a GPU in bfloat16 and deterministically: there, PyTorch's own kernels repeat their bits only when asked to.
    """

    def batches(index: int) -> torch.Tensor:
        if index == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        report.batches.append(index)
        return torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(index))

    config = TrainConfig(
        max_steps=STEPS,
        batch_size=2,
        accumulation=2,
        context=32,
        warmup_steps=3,
        save_every=4,
        eval_every=4,
        deterministic=device != "cpu",
        cuda_graph=cuda_graph,
    )
    torch.manual_seed(1)
    model = GPT(preset("tiny", dropout=dropout), torch.float32 if device == "cpu" else torch.bfloat16).to(device)
    values = iter(bpb)
    report = Silent()
    train(
        model,
        config,
        batches,
        evaluate=lambda model: next(values),
        run_dir=run_dir,
        resume=resume,
        report=report,
        corpus_hash=corpus_hash,
    )
    return report


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("uninterrupted")
    run(path)
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed while it fetches a batch of step 11, after the checkpoint of step 8."""
    path = tmp_path_factory.mktemp("killed")
    assert in_a_process(path, kill_at=21) == -signal.SIGKILL
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == ["step-4", "step-8"]
    return path


def in_a_process(path: Path, **options: object) -> int:
    """`run` in a process of its own; its exit status, with what it printed if that is an error of its own."""
    code = (
        "import importlib.util, pathlib, sys\n"
        f"spec = importlib.util.spec_from_file_location('test_resume', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"module.run(pathlib.Path({str(path)!r}), **{options!r})"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode <= 0, process.stderr
    return process.returncode


def trained(run_dir: Path) -> list[tuple]:
    """Everything in the metrics that time does not change."""
    return [
        (r["step"], r["tokens"], r.get("loss"), r.get("grad_norm"), r.get("lr"), r.get("val_bpb"))
        for r in read_metrics(run_dir / "metrics.jsonl")
    ]


def assert_same_run(a: Path, b: Path) -> None:
    assert trained(a) == trained(b)
    first, second = (latest(path / "checkpoints", pytest.fail) for path in (a, b))
    assert first.step == second.step == STEPS
    for name in ("model", "optimizer", "rng"):
        left, right = first.tensors(name), second.tensors(name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    best = latest(b / "best", pytest.fail)
    assert (best.step, best.state["val_bpb"]) == (14, 2.0)


def test_killed_and_resumed_is_bitwise_the_uninterrupted_run(uninterrupted: Path, killed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(killed, tmp_path / "run")
    report = run(run_dir, resume=True, bpb=(3.0, 5.0, 2.0))
    assert report.messages[0] == f"resumed {run_dir / 'checkpoints' / 'step-8'}"
    assert report.batches == list(range(8 * 2, STEPS * 2))  # none of those before: resuming costs no data
    assert_same_run(uninterrupted, run_dir)


def test_the_losses_depend_on_dropout_and_so_on_the_generator(uninterrupted: Path, tmp_path: Path) -> None:
    run(tmp_path, dropout=0.0)
    assert trained(tmp_path) != trained(uninterrupted)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Path, killed: Path, tmp_path: Path) -> None:
    run_dir = shutil.copytree(killed, tmp_path / "run")
    weights = run_dir / "checkpoints" / "step-8" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    report = run(run_dir, resume=True)
    assert "model.safetensors" in report.messages[0] and "passed over" in report.messages[0]
    assert report.messages[1] == f"resumed {run_dir / 'checkpoints' / 'step-4'}"
    assert_same_run(uninterrupted, run_dir)


def test_resuming_with_another_corpus_or_model_is_refused(killed: Path) -> None:
    with pytest.raises(InputError, match="another corpus"):
        run(killed, resume=True, corpus_hash="other")
    with pytest.raises(InputError, match="another model"):
        run(killed, resume=True, dropout=0.0)


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(tmp_path, resume=True)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_on_a_gpu_too(cuda_graph: bool, tmp_path: Path) -> None:
    options = {"device": "cuda", "cuda_graph": cuda_graph}
    assert in_a_process(tmp_path / "whole", **options) == 0
    assert in_a_process(tmp_path / "killed", kill_at=21, **options) == -signal.SIGKILL
    assert in_a_process(tmp_path / "killed", resume=True, bpb=(3.0, 5.0, 2.0), **options) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
