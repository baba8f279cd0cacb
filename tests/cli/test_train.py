"""Options of `llmfast train`, and `--resume auto` of a damaged run."""

import json
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from llmfast import ops
from llmfast.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., None]

TRAIN = ("--preset", "tiny", "--device", "cpu", "--context", "32", "--batch-size", "4")


def test_options_reach_the_configuration(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    options = ("--spike-threshold", 6, "--activation-checkpointing", "--steps", 2)
    code, out, _ = cli("train", "--data", data, *TRAIN, *options, "--out", tmp_path / "run")
    training = json.loads((tmp_path / "run" / "config.json").read_text())["training"]
    assert code == 0 and training["spike_threshold"] == 6.0 and training["activation_checkpointing"] is True
    refused(cli("train", "--resume", tmp_path / "run", *options[:2]), "leave out: spike_threshold")
    refused(cli("train", "--data", data, *TRAIN, "--spike-threshold", 0), "spike_threshold is 0.0; it must be positive")
    refused(cli("train", "--data", data, "--batch-size", "many"), "batch_size is 'many'; give a number or auto")
    graph = ("--preset", "small", "--cuda-graph", "--activation-checkpointing")
    refused(cli("train", "--data", data, *graph), "cuda_graph is True; it must be False with activation_checkpointing")


def test_dry_run_tells_parameters_memory_and_time(data: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, _ = cli("train", "--data", data, *TRAIN, "--steps", 9, "--dry-run")
    lines = out.splitlines()
    assert code == 0 and [line.split(":")[0] for line in lines] == ["model", "memory", "step", "run", "time"]
    assert " parameters" in lines[0] and " GiB to train" in lines[1] and "TFLOP/s measured now" in lines[4]
    auto = ("--batch-size", "auto", "--steps", 9, "--dry-run")
    assert "step: 4,096 tokens (128 sequences x 1 batch" in cli("train", "--data", data, *TRAIN[:-2], *auto)[1]
    assert cli("train", "--data", data, *TRAIN, "--steps", 2, "--out", tmp_path / "run")[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    code, out, _ = cli("train", "--resume", tmp_path / "run", "--dry-run")
    assert code == 0 and "run: 2 steps" in out and out.splitlines()[-1].startswith("time: about 0:00")
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_tensorboard(
    data: Path, text: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    pytest.importorskip("tensorboard")
    run, events = tmp_path / "run", tmp_path / "run" / "tensorboard"
    assert cli("train", "--data", data, *TRAIN, "--steps", 2, "--tensorboard", "--out", run)[0] == 0
    assert len(list(events.iterdir())) == 1 and len(read_metrics(run / "metrics.jsonl")) == 3
    assert cli("train", "--resume", run, "--tensorboard")[0] == 0 and len(list(events.iterdir())) == 2
    assert cli("train", "--resume", run)[0] == 0 and len(list(events.iterdir())) == 2
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    new = ("train", "--data", text, *TRAIN, "--steps", 1, "--tensorboard", "--out", tmp_path / "new")
    result = cli(*new)
    refused(result, "TensorBoard's package is missing", "pip install tensorboard")
    assert "preparing" not in result[1] and not (tmp_path / "new").exists()


def test_resume_auto_passes_over_damage_of_the_newest_run(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    """The newest checkpoint is cut short, as by a disk that lied: the one before it is continued, to the same end."""
    from llmfast.cli.defaults import DEFAULTS

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(DEFAULTS["cpu"].training, "save_every", 4)
    options = ("train", "--data", data, *TRAIN, "--steps", 8)
    for name in ("older", "newer"):
        assert cli(*options, "--out", f"runs/{name}")[0] == 0
    before = read_metrics(Path("runs/newer/metrics.jsonl"))
    assert sorted(p.name for p in Path("runs/newer/checkpoints").iterdir()) == ["step-4", "step-8"]
    state = Path("runs/newer/checkpoints/step-8/optimizer.safetensors")
    state.write_bytes(state.read_bytes()[:-1])
    code, out, _ = cli("train", "--resume", "auto", "--device", "cpu")
    assert code == 0
    assert "passed over a damaged checkpoint: runs/newer/checkpoints/step-8/optimizer.safetensors" in out
    assert "resumed runs/newer/checkpoints/step-4" in out
    after = read_metrics(Path("runs/newer/metrics.jsonl"))
    keys = ("step", "loss", "grad_norm", "val_bpb")
    assert [[r.get(key) for key in keys] for r in after] == [[r.get(key) for key in keys] for r in before]
    record = Path("runs/newer/record.json").read_bytes()
    shutil.rmtree("runs/newer/checkpoints")
    refused(cli("train", "--resume", "auto", "--device", "cpu"), "holds no checkpoint; start a new run")
    assert Path("runs/newer/record.json").read_bytes() == record and b'"val_bpb"' in record


def test_data_prepared_again_with_another_tokenizer(
    data: Path, text: Path, tmp_path: Path, cli: Cli, refused: Refused
) -> None:
    """Of the same text: its tokens mean other bytes to the run's model, or nothing."""
    copy, run = shutil.copytree(data, tmp_path / "data"), tmp_path / "run"
    assert cli("train", "--data", copy, *TRAIN, "--steps", 2, "--out", run)[0] == 0
    before = (run / "metrics.jsonl").read_bytes()
    assert cli("data", text, "--out", copy, "--vocab-size", 300)[0] == 0
    for command in (("train", "--resume", run), ("eval", run)):
        refused(cli(*command, "--device", "cpu"), f"{copy}: holds tokens of the tokenizer", f"--tokenizer {run}")
    assert (run / "metrics.jsonl").read_bytes() == before
    assert cli("data", text, "--out", copy, "--tokenizer", run)[0] == 0
    assert cli("train", "--resume", run, "--device", "cpu")[0] == 0


def test_a_resume_goes_on_with_the_runs_backend(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is told another: others round differently, and the losses would have other bits."""
    from llmfast.cli.defaults import DEFAULTS

    monkeypatch.setitem(DEFAULTS["cpu"].training, "save_every", 4)
    run = tmp_path / "run"
    assert cli("train", "--data", data, *TRAIN, "--steps", 8, "--backend", "reference", "--out", run)[0] == 0
    before = read_metrics(run / "metrics.jsonl")
    shutil.rmtree(run / "checkpoints" / "step-8")
    for options, backend in (((), "reference"), (("--backend", "auto"), "auto"), ((), "auto")):
        assert cli("train", "--resume", run, "--device", "cpu", *options)[0] == 0
        assert json.loads((run / "record.json").read_text())["backend"] == backend
        if not options and backend == "reference":
            assert [r.get("loss") for r in read_metrics(run / "metrics.jsonl")] == [r.get("loss") for r in before]
    with ops.use_backend("reference"):  # as LLMFAST_BACKEND would
        assert cli("train", "--resume", run, "--device", "cpu")[0] == 0
    assert json.loads((run / "record.json").read_text())["backend"] == "reference"


def test_a_run_killed_before_its_first_checkpoint_begins_again(
    data: Path, tmp_path: Path, cli: Cli, refused: Refused
) -> None:
    """What a kill -9 in its first steps leaves: no checkpoint, and perhaps half of one."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert cli("train", "--data", data, *TRAIN, "--steps", 4, "--out", whole)[0] == 0
    shutil.copytree(whole, run)
    shutil.rmtree(run / "best")
    (run / "checkpoints" / "step-4").rename(run / "checkpoints" / "step-4.tmp-999999999")
    code, out, _ = cli("train", "--resume", run, "--device", "cpu")
    assert code == 0 and "saved no checkpoint, it begins again" in out
    losses = [[(r["step"], r.get("loss")) for r in read_metrics(path / "metrics.jsonl")] for path in (whole, run)]
    assert losses[0] == losses[1] and [p.name for p in (run / "checkpoints").iterdir()] == ["step-4"]
    for file in (run / "checkpoints" / "step-4", run / "best" / "step-4"):
        (file / "manifest.json").write_text("{}")
    refused(cli("train", "--resume", run, "--device", "cpu"), "holds no undamaged checkpoint")


@pytest.mark.parametrize("name", ["train-00000-of-00001.bin", "manifest.json"])
def test_a_damaged_cache_says_what_to_remove(
    name: str, text: Path, tmp_path: Path, cli: Cli, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMFAST_CACHE", str(tmp_path / "cache"))
    options = ("train", "--data", text, *TRAIN, "--steps", 1, "--out")
    assert cli(*options, tmp_path / "before")[0] == 0
    (folder,) = (tmp_path / "cache" / "data").glob("words-*")
    (folder / name).write_text("{")
    refused(cli(*options, tmp_path / "run"), str(folder / name), f"remove {folder}")
    shutil.rmtree(folder)
    assert cli(*options, tmp_path / "run")[0] == 0


def test_processes_that_want_one_text_prepare_it_once(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As runs that are started together do: the later ones wait."""
    pytest.importorskip("fcntl")
    from llmfast.cli import corpus

    made, real = [], corpus.prepare

    def prepare(source: str, out: Path, **options: Any) -> None:
        made.append(out)
        time.sleep(0.3)
        real(source, out, **options)

    monkeypatch.setattr(corpus, "prepare", prepare)
    monkeypatch.setenv("LLMFAST_CACHE", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(corpus.open_data, str(text), 300, Console(quiet=True)) for _ in range(3)]
        folders = {job.result().folder for job in jobs}
    assert made == list(folders)


def test_eval_of_data_that_has_changed(data: Path, text: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    """Its validation text may be what the run was trained on."""
    copy, run, half = shutil.copytree(data, tmp_path / "data"), tmp_path / "run", tmp_path / "half.txt"
    assert cli("train", "--data", copy, *TRAIN, "--steps", 2, "--out", run)[0] == 0
    half.write_text(text.read_text()[: text.stat().st_size // 2])
    assert cli("data", half, "--out", copy, "--tokenizer", run)[0] == 0
    refused(cli("eval", run, "--device", "cpu"), f"{copy}: holds another text than {run} was trained on", "--text")
    assert cli("eval", run, "--text", half, "--device", "cpu")[0] == 0


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_the_second_gpu(data: Path, tmp_path: Path, cli: Cli) -> None:
    """As on the first, to the last bit, its passes recorded as a graph or not; then a text, token by token."""
    losses = []
    for device, graph in (("cuda:0", True), ("cuda:1", True), ("cuda:1", False)):
        out = tmp_path / f"{device}-{graph}"
        options = ["--device", device, "--deterministic", *["--cuda-graph"] * graph]
        code, _, err = cli("train", "--data", data, "--preset", "mini", "--steps", "6", "--out", out, *options)
        assert code == 0, err
        losses.append([record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record])
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 6
    texts = [
        cli("generate", out, "w1 ", "--max-tokens", "30", "--temperature", "0", "--device", device)[:2]
        for device in ("cuda:0", "cuda:1")
    ]
    assert texts[0] == texts[1] and texts[0][0] == 0
