"""`llmfast train --from`: a run that begins with the weights and the tokenizer of another one."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf
import torch
from safetensors.torch import load_file

from llmfast.cli.corpus import validation_text
from llmfast.cli.defaults import DEFAULTS
from llmfast.cli.runs import load_model
from llmfast.data import Dataset
from llmfast.evals import bits_per_byte
from llmfast.files import file_sha256
from llmfast.training.metrics import read_metrics

Cli = Callable[..., tuple[int, str, str]]
Refused = Callable[..., None]

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}"
QUICK = ("--device", "cpu", "--context", "32", "--batch-size", "4")
CPU = torch.device("cpu")
KILLED = """
import os, signal, sys
from llmfast.cli.defaults import DEFAULTS
from llmfast.cli.main import main
from llmfast.data import Dataset

DEFAULTS["cpu"].training["save_every"] = 4
batch = Dataset.batch
def until_six(self, split, step, *rest):
    if step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return batch(self, split, step, *rest)
Dataset.batch = until_six
main()
"""


def make_tokenizer(folder: Path, adds_bos: bool) -> int:
    """A byte-level one, as Llama 3's or GPT-2's are; how many tokens it has."""
    made = hf.Tokenizer(hf.models.BPE())
    made.pre_tokenizer, made.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["w1 w2 w3 w12 w13 w15"] * 3, trainer)
    if adds_bos:
        made.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return made.get_vocab_size()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def foreign(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of transformers with its tokenizer, and a row more in its embedding than that has tokens."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("foreign") / request.param
    folder.mkdir()
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 1}
    ids["vocab_size"] = make_tokenizer(folder, request.param == "llama") + 1
    torch.manual_seed(0)
    if request.param == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
        config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes, **ids)
    else:
        config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, **ids)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def imported(foreign: Path, tmp_path: Path, cli: Cli) -> Path:
    assert cli("import", foreign, tmp_path / "imported")[0] == 0
    return tmp_path / "imported"


def hashes(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): file_sha256(path) for path in folder.rglob("*") if path.is_file()}


def bpb_of(run: Path, data: Dataset) -> float:
    model, _ = load_model(run, CPU, torch.float32, print)
    return bits_per_byte(model, *validation_text(data), 32, 16)


def test_an_imported_model_learns_a_text_and_goes_back(
    foreign: Path, imported: Path, text: Path, tmp_path: Path, cli: Cli
) -> None:
    """Better than it was on the validation text; what it was is untouched; every command takes the new run; and
    transformers computes the same from the export, which has the names and the other files of the original."""
    import transformers

    run, before = tmp_path / "run", hashes(imported)
    options = ("--data", text, *QUICK, "--steps", 60, "--learning-rate", "3e-3", "--dtype", "float32")
    code, out, err = cli("train", "--from", imported, *options, "--out", run)
    assert code == 0 and f"with the weights of {imported}" in " ".join(out.split()), err
    assert hashes(imported) == before
    config = json.loads((run / "config.json").read_text())
    data = Dataset.open(config["data"])
    tuned = json.loads((run / "record.json").read_text())["result"]["val_bpb"]
    assert tuned == pytest.approx(bpb_of(run, data), rel=1e-5) and tuned < 0.8 * bpb_of(imported, data)
    assert data.tokens("train")[-1] == 1 and (data.tokens("val")[0] == 0) == (foreign.name == "llama")

    greedy = ("--max-tokens", 4, "--temperature", 0, "--device", "cpu")
    assert cli("generate", run, "w1 w2", *greedy)[1].startswith("w1 w2")
    code, answer, err = cli("chat", run, "--message", "w1", *greedy)
    assert code == 0 and cli("generate", run, "user w1;", *greedy)[1] == f"user w1;{answer}", err
    code, out, err = cli("eval", run, "--device", "cpu", "--json", tmp_path / "result")
    assert code == 0 and "xz with the training set" in out, err
    assert json.loads((tmp_path / "result").read_text())["bits_per_byte"] == pytest.approx(tuned, rel=1e-3)
    assert cli("plot", run, "--out", tmp_path / "runs.png")[0] == 0

    assert cli("export", run, tmp_path / "back")[0] == 0
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == load_file(foreign / "model.safetensors").keys()
    assert {path.name for path in foreign.iterdir()} == {path.name for path in (tmp_path / "back").iterdir()}
    old, new = (json.loads((folder / "config.json").read_text()) for folder in (foreign, tmp_path / "back"))
    for name in ("model_type", "architectures", "vocab_size", "bos_token_id", "eos_token_id"):
        assert old[name] == new[name]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "back")
    ours, own = load_model(run, CPU, torch.float32, print)
    ids = torch.tensor([own.prompt_ids("w1 w2 w13")])
    assert tokenizer("w1 w2 w13").input_ids == ids[0].tolist()
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_a_killed_run_goes_on_without_its_parent(
    imported: Path, text: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kill -9 between checkpoints; what it began with is gone; every later loss has the same bits."""
    monkeypatch.setitem(DEFAULTS["cpu"].training, "save_every", 4)
    options = ("train", "--from", imported, "--data", text, *QUICK, "--steps", 10)
    assert cli(*options, "--out", tmp_path / "whole")[0] == 0
    command = [sys.executable, "-c", KILLED, *map(str, options), "--out", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run(command, capture_output=True, env=environment).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "record.json").read_text().count("result")
    shutil.rmtree(imported)
    code, out, err = cli("train", "--resume", tmp_path / "killed", "--device", "cpu")
    assert code == 0 and "resumed" in out and "step-4" in out, err
    keys = ("step", "loss", "grad_norm", "val_bpb")
    one, two = (
        [[r.get(key) for key in keys] for r in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "killed")
    )
    assert one == two and len(one) == 11
    for name in ("step-8", "step-10"):
        files = [tmp_path / kind / "checkpoints" / name / "model.safetensors" for kind in ("whole", "killed")]
        assert file_sha256(files[0]) == file_sha256(files[1])


def test_a_run_of_ones_own_goes_on_from_its_best(data: Path, tmp_path: Path, cli: Cli) -> None:
    """With the learning rate of fine-tuning; at next to none, it stays what it was; and children have children."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    assert cli("train", "--data", data, "--preset", "tiny", *QUICK, "--steps", 30, "--out", first)[0] == 0
    still = ("--learning-rate", "1e-12", "--steps", 1)
    assert cli("train", "--from", first, "--data", data, *QUICK, *still, "--out", second)[0] == 0
    results = [json.loads((run / "record.json").read_text())["result"]["val_bpb"] for run in (first, second)]
    assert results[1] == pytest.approx(results[0], rel=1e-6)
    assert cli("train", "--from", second, "--data", data, *QUICK, "--steps", 1, "--out", third)[0] == 0
    configs = [json.loads((run / "config.json").read_text()) for run in (first, second, third)]
    assert [config.get("parent") for config in configs] == [None, str(first), str(second)]
    assert [config["preset"] for config in configs] == ["tiny"] * 3
    assert [config["training"]["learning_rate"] for config in configs] == [2e-3, 1e-12, 5e-5]
    assert "imported" not in configs[2] and cli("generate", third, "w1", "--max-tokens", 2)[0] == 0


def test_dry_run(imported: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
    before = sorted(tmp_path.iterdir())
    code, out, err = cli("train", "--from", imported, "--data", text, "--device", "cpu", "--steps", 2, "--dry-run")
    assert code == 0 and "model: imported with the weights of" in out, err
    assert "x 64 tokens)" in out  # the model's context, as it is less than the default
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_prepared_with_the_runs_tokenizer(imported: Path, text: Path, tmp_path: Path, cli: Cli) -> None:
    """By a run's name; and a model that is new can learn from it, too."""
    folder = tmp_path / "data"
    code, out, err = cli("data", text, "--out", folder, "--tokenizer", imported)
    assert code == 0, err
    assert cli("train", "--from", imported, "--data", folder, *QUICK, "--steps", 1, "--out", tmp_path / "run")[0] == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["data"] == str(folder)
    new = ("--data", folder, "--preset", "tiny", *QUICK, "--steps", 1, "--out", tmp_path / "new")
    assert cli("train", *new)[0] == 0
    model, own = load_model(tmp_path / "new", CPU, torch.bfloat16, print)
    assert own.stop_ids == {1}
    # Matrices are not left to be cast for every pass.
    assert {(p.dim(), p.dtype) for p in model.parameters()} == {(1, torch.float32), (2, torch.bfloat16)}


def test_refusals(
    foreign: Path, imported: Path, data: Path, text: Path, tmp_path: Path, cli: Cli, refused: Refused
) -> None:
    """One line each; nothing is left behind and nothing is lost."""
    before, files = hashes(imported), sorted(tmp_path.iterdir())
    start = ("train", "--from", imported, "--out", tmp_path / "run", "--device", "cpu")
    refused(cli(*start, "--data", text, "--preset", "tiny"), "--preset tiny and --from", "give one of them")
    fingerprint = Dataset.open(data).manifest.tokenizer_fingerprint[:16]
    both = (f"{data}: holds tokens of the tokenizer {fingerprint}, but {imported} has ", f"--tokenizer {imported}")
    refused(cli(*start, "--data", data), *both)
    refused(cli(*start, "--data", data, "--dry-run"), *both)
    refused(cli(*start, "--data", text, "--context", 65), "context is 65; it must be at most 64, the model's")
    refused(cli("train", "--from", tmp_path / "none", "--data", text), f"{tmp_path / 'none'}: is not a run")
    refused(cli("train", "--from", foreign, "--data", text), f"make a run of it with: llmfast import {foreign}")
    refused(cli("train", "--from", "", "--data", text), "the run is an empty string")
    refused(cli("train", "--from", imported, "--data", text, "--out", imported), "is not empty; give another --out")
    refused(cli("train", "--resume", imported, "--from", imported), "leave out: from")
    refused(
        cli("train", "--resume", imported), f"was imported, not trained; train it with: llmfast train --from {imported}"
    )
    assert hashes(imported) == before and sorted(tmp_path.iterdir()) == files
    weights = imported / "checkpoints" / "step-0" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, _, err = cli(*start, "--data", text, "--steps", 1)
    assert code == 2 and re.search(r"holds no undamaged checkpoint.*\n$", err) and not (tmp_path / "run").exists(), err


def test_a_text_of_tokens_that_the_model_lacks(
    imported: Path, text: Path, tmp_path: Path, cli: Cli, refused: Refused
) -> None:
    """A tokenizer with more tokens than its model: those in the text count."""
    path = imported / "tokenizer.json"
    made = hf.Tokenizer.from_file(str(path))
    made.add_tokens(["spare one", "spare two", "zebra"])
    made.save(str(path))
    assert json.loads((imported / "config.json").read_text())["model"]["vocab_size"] < made.get_vocab_size()
    start = ("train", "--from", imported, *QUICK, "--steps", 1)
    assert cli(*start, "--data", text, "--out", tmp_path / "run")[0] == 0
    (tmp_path / "text").write_text(text.read_text().replace("w7", "zebra"))
    largest = made.get_vocab_size() - 1
    refused(cli(*start, "--data", tmp_path / "text", "--out", tmp_path / "none"), f"holds token {largest}, the model")
    assert not (tmp_path / "none").exists()
