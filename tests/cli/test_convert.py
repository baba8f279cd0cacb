"""`llmfast import` and `llmfast export`: there and back, and what they refuse."""

import filecmp
import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llmfast.models import GPT, preset
from llmfast.tokenizers import Tokenizer
from llmfast.weights import save, save_pretrained

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 in bfloat16 with a tokenizer, token ids and a chat template."""
    folder = tmp_path_factory.mktemp("foreign") / "gpt2"
    tokenizer = Tokenizer.train(["some words and some more words"] * 3, 300)
    sizes = {"context_length": 64, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "d_model": 32, "head_dim": 16}
    torch.manual_seed(0)
    save_pretrained(GPT(preset("gpt2", vocab_size=tokenizer.vocab_size, **sizes)), folder, dtype=torch.bfloat16)
    tokenizer.save(folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"eos_token_id": 256}, indent=2, sort_keys=True) + "\n")
    return folder


def test_there_and_back(foreign: Path, tmp_path: Path, cli: Cli) -> None:
    """Every file bit for bit as it was, by way of a run that can generate."""
    code, out, err = cli("import", foreign, tmp_path / "run")
    assert (code, err) == (0, "") and "gpt2, " in out and "bfloat16" in out
    code, out, err = cli("generate", tmp_path / "run", "some", "--max-tokens", "3", "--device", "cpu")
    assert code == 0 and out.startswith("some"), err
    code, out, err = cli("export", tmp_path / "run", tmp_path / "back")
    assert (code, err) == (0, "") and "bfloat16" in out
    names = sorted(path.name for path in foreign.iterdir())
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == names
    assert filecmp.cmpfiles(foreign, tmp_path / "back", names, shallow=False)[0] == names


def test_check(foreign: Path, tmp_path: Path, cli: Cli) -> None:
    pytest.importorskip("transformers")
    code, out, err = cli("import", foreign, tmp_path / "run", "--check")
    assert code == 0 and "logits equal transformers' to" in out, err
    code, out, err = cli("export", tmp_path / "run", tmp_path / "back", "--check", "--dtype", "float32")
    assert code == 0 and "logits equal transformers' to" in out and "float32" in out, err


def test_check_sees_a_difference(foreign: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(
        "llmfast.models.gpt.GPT.forward", lambda self, ids: torch.zeros(*ids.shape, self.config.vocab_size)
    )
    code, _, err = cli("import", foreign, tmp_path / "run", "--check")
    assert code == 2 and "logits differ from transformers'" in err
    assert not (tmp_path / "run").exists()


def test_a_run_of_ones_own(tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    config = preset("tiny", position="learned", bias=True)
    save(run / "checkpoints", 7, {"model": GPT(config).state_dict()}, {})
    (run / "config.json").write_text(json.dumps({"model": config.to_dict()}))
    code, out, err = cli("export", run, tmp_path / "out", "--dtype", "float16")
    assert (code, err) == (0, "") and "gpt2, " in out and "float16" in out
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gpt2"
    (run / "config.json").write_text(json.dumps({"model": preset("tiny").to_dict()}))
    code, _, err = cli("export", run, tmp_path / "none")
    assert code == 2 and err.count("\n") == 1


def test_refusals(foreign: Path, tmp_path: Path, cli: Cli) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("")
    for arguments, word in (
        (("import", foreign, full), "is there already"),
        (("import", tmp_path / "none", tmp_path / "run"), "no such folder"),
        (("export", tmp_path / "none", tmp_path / "out"), "is not a run"),
        (("export", full, tmp_path / "out", "--dtype", "int8"), "--dtype 'int8'"),
        (("export", full, full), "is there already"),
    ):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "") and word in err and err.count("\n") == 1, arguments
    assert not (tmp_path / "run").exists() and not (tmp_path / "out").exists()
    assert cli("import", foreign, tmp_path / "run")[0] == 0
    code, _, err = cli("export", tmp_path / "run", tmp_path / "out", "--family", "bert")
    assert code == 2 and "family 'bert' is not known" in err
    code, _, err = cli("export", tmp_path / "run", tmp_path / "out", "--family", "llama")
    assert code == 2 and "no family of Hugging Face's expresses this model (llama: has no" in err


def test_an_imported_model_talks_and_is_scored(
    foreign: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was said is in the next prompt; a text is scored by its bytes; what has no validation text says so."""
    run, greedy = tmp_path / "run", ("--temperature", "0", "--max-tokens", "4", "--device", "cpu")
    assert cli("import", foreign, run)[0] == 0
    (run / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}")
    code, out, err = cli("chat", run, "--message", "some words", "--system", "more", *greedy)
    assert (code, err) == (0, "")
    assert out == cli("generate", run, "system more;user some words;", *greedy)[1].split("words;", 1)[1]
    monkeypatch.setattr(sys, "stdin", io.StringIO("some words\nmore\n\nnot read\n"))
    code, both, err = cli("chat", run, "--system", "more", *greedy)
    assert (code, err) == (0, "") and both.startswith(out) and len(both) > len(out)
    said = f"system more;user some words;assistant {out[:-1]};user more;"
    assert both[len(out) :] == cli("generate", run, said, *greedy)[1].split("user more;", 1)[1]

    (tmp_path / "text").write_text("some words and some more words", encoding="utf-8")
    code, out, err = cli("eval", run, "--text", tmp_path / "text", "--json", tmp_path / "result", "--device", "cpu")
    assert code == 0, err
    result = json.loads((tmp_path / "result").read_text())
    assert result["bytes"] == 30 and 5.0 < result["bits_per_byte"] * 30 / result["tokens"] < 15.0  # of some 300 tokens
    code, _, err = cli("eval", run, "--device", "cpu")
    assert code == 2 and "was imported and has no validation text; give --text" in err
    (run / "chat_template.jinja").unlink()
    assert "the model has no chat template" in cli("chat", run, "--message", "some", *greedy)[2]
