"""A dtype for each tensor: what was loaded goes back in the ones it had, by way of a run, too."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmfast.cli.convert import export_model, import_model
from llmfast.errors import InputError
from llmfast.models import GPT, Config, preset
from llmfast.weights import from_pretrained, save_pretrained

SIZES = {"vocab_size": 61, "context_length": 16, "n_layer": 2, "n_head": 2, "n_kv_head": 2, "head_dim": 8}
SIZES |= {"d_model": 16, "d_mlp": 24}
LLAMA = Config(**SIZES, norm="rms_norm", position="rope", mlp="swiglu", bias=False, tie_embeddings=False)


def dtype_of(name: str, tensor: Tensor) -> torch.dtype:
    """Three of them; k_proj is a part of one parameter of ours."""
    if "k_proj" in name or "mlp" in name:
        return torch.float16
    return torch.bfloat16 if tensor.dim() == 2 else torch.float32


@pytest.fixture(params=[LLAMA, preset("gpt2", **SIZES)], ids=["llama", "gpt2"])
def mixed(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    save_pretrained(GPT(request.param), tmp_path / "mixed")
    path = tmp_path / "mixed" / "model.safetensors"
    tensors = {name: tensor + torch.randn_like(tensor) for name, tensor in load_file(path).items()}
    save_file({name: t.to(dtype_of(name, t)) for name, t in tensors.items()}, path, {"format": "pt"})
    return tmp_path / "mixed"


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same(folder: Path, other: Path) -> None:
    first, second = load(folder), load(other)
    assert first.keys() == second.keys() and len({tensor.dtype for tensor in first.values()}) == 3
    for name, tensor in first.items():
        assert tensor.dtype is second[name].dtype and torch.equal(tensor, second[name]), name


def test_there_and_back(mixed: Path, tmp_path: Path) -> None:
    model = from_pretrained(mixed)
    model.save_pretrained(tmp_path / "one")
    same(mixed, tmp_path / "one")
    assert (mixed / "model.safetensors").read_bytes() == (tmp_path / "one" / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path / "shards", max_shard_bytes=4000)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    same(mixed, tmp_path / "shards")
    model.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in load(tmp_path / "half").values()} == {torch.bfloat16}


def test_by_way_of_a_run(mixed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_model(str(mixed), tmp_path / "run")
    export_model(str(tmp_path / "run"), tmp_path / "back")
    same(mixed, tmp_path / "back")
    assert capsys.readouterr().out.count("mixed dtypes") == 2


def test_float64_is_not_written(tmp_path: Path) -> None:
    """Reading it back would round it."""
    with pytest.raises(InputError, match=r"dtype torch.float64: choose one of torch.float32"):
        save_pretrained(GPT(LLAMA).double(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
