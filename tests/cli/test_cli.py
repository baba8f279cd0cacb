"""The command line end to end on a small text, and what it says when it is given something wrong."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmfast import __version__
from llmfast.cli.main import COMMANDS
from llmfast.data import Dataset
from llmfast.errors import InputError
from llmfast.training.metrics import read_metrics
from llmfast.weights import latest

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., None]

TRAIN = ("--preset", "tiny", "--device", "cpu", "--context", "32", "--batch-size", "4")


def process(*args: object, cwd: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmfast.cli.main", *map(str, args)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ladder(out: str) -> dict[str, float]:
    rows = [line.strip("│").split("│") for line in out.splitlines() if line.startswith("│")]
    return {name.strip(): float(bits) for name, bits, _ in rows}


def test_main_job_in_small_then_generate(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = cli("train", "--data", text, "--preset", "tiny", "--device", "cpu", "--steps", 20)
    assert (code, err) == (0, "")
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.endswith("-tiny")
    names = {p.name for p in run.iterdir()}
    files = {"config.json", "metrics.jsonl", "loss.png", "record.json", "tokenizer.json"}
    assert names - {".lock"} == files | {"checkpoints", "best"}
    assert len([r for r in read_metrics(run / "metrics.jsonl") if "loss" in r]) == 20
    record = json.loads((run / "record.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert "attention: reference" in record["ops"]["attention"]
    rows = ladder(out)
    assert rows["tiny, 20 steps"] == pytest.approx(record["result"]["val_bpb"], abs=1e-3)
    assert rows["unigram"] < rows["gzip -9"] + 5 and "trigram" in rows
    dataset = Dataset.open(json.loads((run / "config.json").read_text())["data"])
    prompt = dataset.tokenizer.decode(dataset.tokens("val")[:24])
    sample = out.split("loss.png\n\n")[1]
    assert sample.startswith(prompt) and len(sample) > len(prompt) + 1

    code, first, err = cli("generate", run, "w1 w2", "--max-tokens", 12, "--seed", 3)
    assert (code, err) == (0, "")
    assert first.startswith("w1 w2") and len(first) > len("w1 w2\n")
    assert cli("generate", "--max-tokens", 5, "--temperature", 0)[0] == 0  # the newest run
    assert cli("generate", run, "w1 w2", "--max-tokens", 12, "--seed", 3)[1] == first

    before = cli("train", "--data", text, "--preset", "tiny", "--device", "cpu", "--steps", 1, "--out", tmp_path / "b")
    assert "preparing" in out and "preparing" not in before[1]  # the data were cached


def test_interrupted_and_resumed_equals_uninterrupted(data: Path, tmp_path: Path, cli: Cli) -> None:
    options = ("train", "--data", data, *TRAIN, "--steps", 150)
    running = process(*options, "--out", "run", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.stat().st_size > 0):
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.002)
    running.send_signal(signal.SIGTERM)
    out, err = running.communicate(timeout=60)
    assert running.returncode == 0 and "Traceback" not in err, err  # a fallback may have warned
    assert "resume with: llmfast train --resume run" in out
    stopped = max(r["step"] for r in read_metrics(metrics))
    assert 0 < stopped < 150

    code, out, _ = cli("train", "--resume", tmp_path / "run", "--device", "cpu")
    assert code == 0 and f"step-{stopped}" in out
    assert cli(*options, "--out", tmp_path / "whole")[0] == 0
    losses = [
        [(r["step"], r.get("loss"), r.get("val_bpb")) for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("run", "whole")
    ]
    assert losses[0] == losses[1]
    assert [step for step, loss, _ in losses[0] if loss is not None] == list(range(1, 151))
    assert losses[0][-1][2] is not None


def test_a_reader_that_goes_away_ends_training_with_a_checkpoint(data: Path, tmp_path: Path) -> None:
    """As in `llmfast train | head -1`."""
    running = process("train", "--data", data, *TRAIN, "--steps", 10**6, "--out", "run", cwd=tmp_path)
    assert running.stdout is not None
    running.stdout.readline()
    running.stdout.close()
    assert running.wait(timeout=60) == 0
    steps = [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert latest(tmp_path / "run" / "checkpoints", pytest.fail).step == max(steps)


def test_ctrl_c_outside_training_exits_130(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmfast.cli.doctor as doctor

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor.hardware, "default_device", interrupted)
    code, _, err = cli("doctor")
    assert code == 130 and "Traceback" not in err


def test_data_and_tokenizer(text: Path, tmp_path: Path, cli: Cli) -> None:
    code, out, _ = cli("data", text, "--out", tmp_path / "d", "--vocab-size", 300)
    assert code == 0 and "vocabulary 300" in out and "train" in out and "val" in out
    code, out, _ = cli("tokenizer", tmp_path / "d")
    assert code == 0 and "300 tokens" in out
    ids = cli("tokenizer", tmp_path / "d", "--encode", "w1 café")[1]
    assert cli("tokenizer", tmp_path / "d", "--decode", ids)[1] == "w1 café\n"
    code, out, _ = cli("tokenizer", tmp_path / "t.json", "--train", text, "--vocab-size", 280)
    assert code == 0 and "280 tokens" in out


def test_dry_run_and_doctor(data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = cli("train", "--data", data, *TRAIN, "--accumulation", 3, "--dry-run")
    vocab_size = json.loads((data / "manifest.json").read_text())["vocab_size"]
    assert code == 0 and f"vocabulary {vocab_size}" in out
    assert "step: 384 tokens (4 sequences x 3 batches x 32 tokens)" in out
    code, out, _ = cli("train", "--data", data, *TRAIN, "--tokens", 1000, "--dry-run")
    assert code == 0 and "run: 8 steps\n" in f"{out}\n"  # 1000 tokens are 7.8 steps of 128, and no minutes limit them
    assert list(tmp_path.iterdir()) == []
    code, out, _ = cli("doctor")
    assert code == 0 and torch.__version__ in out and "cross_entropy: reference" in out


def test_help_and_version_do_not_import_torch(tmp_path: Path, cli: Cli) -> None:
    probe = (
        "import sys; sys.argv = ['llmfast', '--help']\n"
        "from llmfast.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip()) == (0, "False")
    assert all(name in done.stdout for name in COMMANDS)
    assert cli("--version")[:2] == (0, f"llmfast {__version__}\n")


@pytest.mark.parametrize("name", ["train", "generate", "data", "tokenizer", "doctor"])
def test_help_of_commands(name: str, cli: Cli) -> None:
    code, out, _ = cli(name, "--help")
    assert code == 0 and COMMANDS[name][1].split(";")[0].split(":")[0] in " ".join(out.split())


def test_files_that_cannot_be_trained_on(tmp_path: Path, cli: Cli, refused: Refused) -> None:
    missing, empty, binary = (tmp_path / name for name in ("missing.txt", "empty.txt", "binary.txt"))
    empty.touch()
    binary.write_bytes(bytes(range(256)) * 40)
    for path in (missing, empty, binary):
        refused(cli("train", "--data", path, *TRAIN, "--steps", 1, "--out", tmp_path / "run"), str(path))
        refused(cli("data", path, "--out", tmp_path / "data"), str(path))
        assert not (tmp_path / "run").exists() and not (tmp_path / "data").exists()


def test_text_shorter_than_a_context(tmp_path: Path, cli: Cli, refused: Refused) -> None:
    path = tmp_path / "short.txt"
    path.write_text("a few words\n" * 25)
    result = cli(
        "train", "--data", path, "--preset", "tiny", "--device", "cpu", "--steps", 1, "--out", tmp_path / "run"
    )
    refused(result, "context + 1 = 129")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options, parts",
    [
        (("--preset", "huge"), ("unknown preset 'huge'", "tiny")),
        (("--backend", "fast"), ("unknown backend 'fast'", "reference")),
        (("--device", "tpu"), ("unknown device 'tpu'", "cpu")),
        (("--dtype", "int8"), ("unknown dtype 'int8'", "float32")),
        (("--steps", "0"), ("max_steps is 0",)),
        (("--context", "4096"), ("context is 4096",)),
        (("--learning-rate", "-1"), ("learning_rate is -1",)),
        (("--optim", "sgd"), ("optimizer is 'sgd'", "muon")),
        (("--tokens", "0"), ("tokens is 0",)),
        (("--tokens", "9", "--steps", "9"), ("--tokens 9 and --steps 9",)),
        (("--schedule", "step"), ("schedule is 'step'", "trapezoid")),
        (("--minutes", "-1"), ("budget_seconds is -60",)),
        (("--seed", "-1"), ("seed", "-1")),
        (("--seed", 10**20), ("seed is 100000000000000000000",)),
        (("--resume", "absent"), ("absent: is not a run",)),
        (("--resume", ""), ("the run is an empty string",)),
    ],
)
def test_options_refused(
    data: Path, tmp_path: Path, cli: Cli, options: tuple[str, ...], parts: tuple[str, ...], refused: Refused
) -> None:
    source = () if options[0] == "--resume" else ("--data", data, "--out", tmp_path / "run")
    refused(cli("train", *source, *options), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    for command in (("train", "--data", data, "--out", tmp_path / "run"), ("generate", tmp_path)):
        refused(cli(*command, "--device", "cuda"), "'cuda' is not available", "0 CUDA devices")


def test_truncated_shard(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    copy = shutil.copytree(data, tmp_path / "data")
    (shard,) = copy.glob("train-*.bin")
    os.truncate(shard, shard.stat().st_size - 3)
    refused(cli("train", "--data", copy, *TRAIN, "--steps", 1, "--out", tmp_path / "run"), str(shard))


def test_damaged_run(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    run = tmp_path / "run"
    assert cli("train", "--data", data, *TRAIN, "--steps", 2, "--out", run)[0] == 0
    refused(cli("train", "--data", data, *TRAIN, "--steps", 2, "--out", run), "is not empty", "--resume")
    refused(cli("train", "--resume", run, "--steps", 5, "--preset", "mini"), "leave out: max_steps, preset")
    weights = run / "best" / "step-2" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-10])
    code, _, err = cli("generate", run)
    assert code == 0 and "model.safetensors" in err.splitlines()[0] and f"taking the newest of {run}" in err
    shutil.rmtree(run / "checkpoints")
    assert cli("generate", run)[0] == 2
    weights.write_bytes(content)
    config = json.loads((run / "config.json").read_text())
    for damaged in ("{", "{}", "[]", "null", "\xff", "[" * 100_000, json.dumps(config | {"model": 3})):
        (run / "config.json").write_text(damaged, encoding="latin-1")
        refused(cli("generate", run), "config.json: is damaged")
        refused(cli("train", "--resume", run), "config.json: is damaged")
    for changes in ({"dtype": "x"}, {"eval_tokens": "x"}, {"training": 3}, {"data": 3}):
        (run / "config.json").write_text(json.dumps(config | changes))
        refused(cli("train", "--resume", run), "config.json: is damaged")
    refused(cli("generate", tmp_path), "is not a run")


def test_no_run_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, refused: Refused) -> None:
    monkeypatch.chdir(tmp_path)
    refused(cli("generate"), "no run under runs/", "llmfast train")


def test_generate_refuses_bad_sampling(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    run = tmp_path / "run"
    assert cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", run)[0] == 0
    refused(cli("generate", run, "--temperature", "-1"), "temperature is -1")
    refused(cli("generate", run, "w1 " * 500), "the model's context")
    refused(cli("generate", run, "--seed", 10**20), "seed is 100000000000000000000")
    refused(cli("generate", ""), "the run is an empty string")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_backend_that_cannot_run_leaves_nothing(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    run = tmp_path / "run"
    refused(cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", run, "--backend", "triton"), "triton")
    assert not run.exists()
    assert cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", run)[0] == 0
    result = cli("generate", run, "w1", "--backend", "triton")
    refused(result, "triton")
    assert result[1] == ""


def test_out_that_is_a_file(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    (tmp_path / "run").touch()
    refused(cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", tmp_path / "run"), "is a file; give a folder")
    refused(cli("train", "--data", "", *TRAIN, "--steps", 1, "--out", tmp_path / "r"), "the source is an empty string")
    refused(cli("data", "", "--out", tmp_path / "d"), "the source is an empty string")


def test_tokenizer_replaces_nothing_but_tokenizers(text: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    corpus = shutil.copy(text, tmp_path / "sm.txt")
    before = corpus.read_bytes()
    refused(cli("tokenizer", corpus, "--train", corpus), "is the text to train on")
    refused(cli("tokenizer", corpus, "--train", text), "not a tokenizer")
    assert corpus.read_bytes() == before
    for _ in range(2):  # a tokenizer may be trained again where it is named
        assert cli("tokenizer", tmp_path / "tokenizer.json", "--train", text, "--vocab-size", 260)[0] == 0
    refused(cli("tokenizer", tmp_path, "--train", text), "is there already")
    refused(cli("tokenizer", tmp_path, "--decode", 10**20), "is outside the vocabulary")
    refused(cli("data", text, "--out", tmp_path / "d", "--vocab-size", 10**20), "too large")
    assert not (tmp_path / "d").exists()


def test_eval_and_plot(data: Path, text: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    """Of a trained run: figures that agree with each other and with the run's own, and pictures."""
    run, picture, figures = tmp_path / "run", tmp_path / "position.png", tmp_path / "eval.json"
    assert cli("train", "--data", data, *TRAIN, "--steps", 6, "--out", run)[0] == 0
    code, out, _ = cli("eval", run, "--json", figures, "--plot", picture, "--device", "cpu")
    result = json.loads(figures.read_text())
    assert code == 0 and "trigram" in out and f"{result['bits_per_byte']:.3f}" in out and "16 to 31" in out
    record = json.loads((run / "record.json").read_text())
    assert result["bits_per_byte"] == pytest.approx(record["result"]["val_bpb"], rel=1e-3)
    assert result["ladder"] == record["ladder"] and len(result["loss_by_position"]) == 32
    assert result["nats_per_token"] == pytest.approx(sum(result["loss_by_position"]) / 32, rel=0.05)
    assert picture.read_bytes().startswith(b"\x89PNG")
    short = tmp_path / "short.txt"
    short.write_text(text.read_text()[:3000])
    code, out, _ = cli("eval", run, "--text", short, "--context", 16, "--device", "cpu")
    assert code == 0 and "short.txt" in out and "trigram" not in out and "8 to 15" in out
    short.write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\r\n")
    assert cli("eval", run, "--text", short, "--json", figures, "--device", "cpu")[0] == 0
    assert json.loads(figures.read_text())["bytes"] == 11  # as training reads it: without the mark
    for content, said in ((b"", "is empty"), (b"\xff\xfe", "is not UTF-8")):
        short.write_bytes(content)
        refused(cli("eval", run, "--text", short, "--device", "cpu"), "short.txt", said)
    for context in (0, 4096):
        refused(cli("eval", run, "--context", context, "--device", "cpu"), f"context is {context}")
    code, out, _ = cli("plot", run, run, "--out", tmp_path / "runs.png")
    assert code == 0 and "6 steps" in out and (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
    refused(cli("plot", tmp_path), "is not a run")


def test_one_process_trains_a_run(data: Path, tmp_path: Path, cli: Cli, refused: Refused) -> None:
    fcntl = pytest.importorskip("fcntl")
    run = tmp_path / "run"
    assert cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", run)[0] == 0
    with open(run / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        refused(cli("train", "--resume", run), "is being trained by another process", "--out")
    assert cli("train", "--resume", run)[0] == 0


def test_a_disk_that_is_full(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        result = cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", tmp_path / "run")
    refused(result, f"{tmp_path / 'run' / 'tokenizer.json'}: No space left on device; free space or give another")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written(data: Path, cli: Cli, refused: Refused) -> None:
    command = [sys.executable, "-m", "llmfast.cli.main", "tokenizer", str(data)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    refused((done.returncode, "", done.stderr), "No space left on device")


def test_output_in_a_narrow_encoding(data: Path) -> None:
    ids = [str(i) for i in Dataset.open(data).tokenizer.encode("é")]
    command = [sys.executable, "-m", "llmfast.cli.main", "tokenizer", str(data), "--decode", " ".join(ids)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "?\n"), done.stderr


def test_a_result_that_is_not_finite(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    import llmfast.cli.train as module

    monkeypatch.setattr(module, "bits_per_byte", lambda *arguments: float("nan"))
    result = cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", tmp_path / "run")
    refused(result, "bits per byte are not finite; lower the learning rate")


def test_the_result_does_not_depend_on_the_baselines(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    import llmfast.cli.corpus as corpus
    import llmfast.cli.train as module

    cache = tmp_path / "cache"
    monkeypatch.setenv("LLMFAST_CACHE", str(cache))
    options = ("train", "--data", data, *TRAIN, "--steps", 1, "--out")
    assert cli(*options, tmp_path / "a")[0] == 0
    (cached,) = (cache / "ladders").iterdir()
    for damaged in ("", "[]", "{", "[1]", '[{"name": "x"}]'):
        cached.write_text(damaged)
        rungs = corpus.read_ladder(Dataset.open(data), module.Console(quiet=True))
        assert "trigram" in {rung.name for rung in rungs} and "trigram" in cached.read_text()

    def broken(*arguments: object) -> None:
        raise InputError("no ladder")

    monkeypatch.setattr(module, "read_ladder", broken)
    refused(cli(*options, tmp_path / "b"), "no ladder")
    assert json.loads((tmp_path / "b" / "record.json").read_text())["result"]["val_bpb"] > 0


def test_no_time_to_train(data: Path, tmp_path: Path, cli: Cli) -> None:
    assert cli("train", "--data", data, *TRAIN, "--minutes", 1e-9, "--out", tmp_path / "run")[0] == 0
    assert cli("generate", tmp_path / "run", "--max-tokens", 1)[0] == 0


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_on_the_cpu(
    data: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception, refused: Refused
) -> None:
    import llmfast.cli.train as module

    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(module, "run_loop", fails)
    result = cli("train", "--data", data, *TRAIN, "--steps", 1, "--out", tmp_path / "run")
    refused(result, "ran out of memory; give a smaller --batch-size")
    assert not (tmp_path / "run").exists()
