"""Foreign folders that are damaged, hostile or of a kind not supported: refused by name, before memory is taken."""

import json
import os
import shutil
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llmfast
from llmfast.errors import InputError
from llmfast.models import GPT, Config
from llmfast.weights import from_pretrained, save_pretrained

LLAMA = Config(
    vocab_size=32,
    context_length=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    head_dim=6,
    d_model=16,
    d_mlp=24,
    norm="rms_norm",
    norm_eps=1e-6,
    position="rope",
    mlp="swiglu",
    bias=False,
    tie_embeddings=False,
)
SHARDS = "model.safetensors.index.json"
HUGE = 10**400  # which JSON can hold, and no float


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    save_pretrained(GPT(LLAMA), folder)
    save_pretrained(GPT(LLAMA), folder.with_name("shards"), max_shard_bytes=4000)
    return folder


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to be spoiled."""
    return shutil.copytree(good, tmp_path / "model")


def configure(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def store(folder: Path, changes: dict[str, Tensor | None]) -> None:
    tensors = {**load_file(folder / "model.safetensors"), **changes}
    save_file({k: t for k, t in tensors.items() if t is not None}, folder / "model.safetensors", {"format": "pt"})


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(InputError) as raised:
        from_pretrained(folder)
    message = str(raised.value)
    assert str(folder) in message and "\n" not in message and len(message) < 500 + len(str(folder))
    for word in words:
        assert word in message


def rope(theta: float = 1e4, **parameters: Any) -> dict[str, Any]:
    """As a file has them that transformers 5 wrote."""
    return {"rope_parameters": {"rope_theta": theta, **parameters}, "rope_theta": theta, "rope_scaling": None}


def test_the_good_folder_is_good(good: Path) -> None:
    assert llmfast.from_pretrained(good).config == LLAMA
    assert from_pretrained(str(good.with_name("shards"))).config == LLAMA


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model_type": "mamba"}, "model_type 'mamba' is not supported; known: gpt2, llama"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": []}, "model_type []"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
        ({"new_feature": 3}, "new_feature = 3 is not supported"),
        ({"rope_interleaved": True}, "rope_interleaved = True"),
        ({"rope_parameters": {"rope_type": "longrope"}, "rope_scaling": None}, "rope_type 'longrope'"),
        ({"rope_parameters": {"rope_type": "linear"}, "rope_scaling": None}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -2}}, "factor is -2"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2, "mscale": 0.7}}, "mscale = 0.7"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, "factor is '4'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": 3}, "rope_parameters is 3"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_theta": 123.0}, "rope_parameters contradicts"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"num_attention_heads": 3}, "n_head 3 is not a multiple of n_kv_head 2"),
        ({"num_hidden_layers": 3}, "misses model.layers.2."),
        ({"num_hidden_layers": 1}, "has unexpected model.layers.1."),
        ({"num_hidden_layers": 1000}, "1000 layers"),
        ({"vocab_size": 33}, "model.embed_tokens.weight has shape (32, 16); config.json asks for (33, 16)"),
        ({"attention_bias": True}, "misses model.layers.0.self_attn.k_proj.bias"),
        ({"is_causal": False}, "is_causal = False is not supported"),
        ({"is_causal": None}, "is_causal = None is not supported"),
        ({"new_feature": False}, "new_feature = False is not supported"),
        (rope(rope_type="linear", factor=2.0, new_feature=False), "new_feature = False is not supported"),
        ({"rms_norm_eps": HUGE}, "rms_norm_eps is 1000"),
        (rope(rope_type="linear", factor=HUGE), "factor is 1000"),
        (rope(rope_type="linear", factor=5e-324), "factor is 5e-324; it must be 1 to 1e+06"),
        (rope(rope_type="yarn", factor=2.0, beta_slow=5e-324), "beta_slow is 5e-324"),
        (rope(rope_type="yarn", factor=2.0, original_max_position_embeddings=HUGE), "original_context is 1000"),
        (rope(rope_type="yarn", factor=2.0, theta=1.0), "rope_theta is 1.0; it must be at least 2"),
        (rope(rope_type="default", theta=1e-320), "rope_theta is 1e-320; it must be at least 2"),
        (rope(rope_type="yarn", factor=2.0, type="linear"), "rope_type 'yarn' and type 'linear' differ"),
        ({"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}}, "'linear' and type 'yarn' differ"),
        ({"num_attention_heads": 2**24, "num_key_value_heads": 2**24, "head_dim": 2**24}, "n_head 16777216 times"),
        ({"max_position_embeddings": 2**21, "head_dim": 1024}, "context_length 2097152 times head_dim 1024"),
    ],
    ids=lambda value: str(value)[:99],
)
def test_configurations(model: Path, changes: dict[str, Any], word: str) -> None:
    configure(model, **changes)
    refused(model, word)


@pytest.mark.parametrize("value", [-1, 0, 10**12, 2.5, "64", True, None, [], 1e400], ids=str)
@pytest.mark.parametrize(
    "field", ["hidden_size", "vocab_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
)
def test_sizes(model: Path, field: str, value: Any) -> None:
    """Whatever they are, and in next to no memory."""
    configure(model, **{field: value})
    tracemalloc.start()
    try:
        refused(model, field)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_large_sizes_meet_the_files_before_memory(model: Path) -> None:
    """A head of 2^24 by 2^24 would be a petabyte."""
    configure(model, vocab_size=2**24, hidden_size=2**24, intermediate_size=2**24)
    refused(model, "has shape")


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"[" * 100_000, b"\xff\xfe"], ids=lambda b: str(b[:4]))
def test_damaged_configurations(model: Path, content: bytes) -> None:
    (model / "config.json").write_bytes(content)
    refused(model, "config.json")


def test_configurations_that_never_end(model: Path) -> None:
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (model / "config.json").unlink()
        make(model / "config.json")
        refused(model, "config.json: is no regular file")


def test_names_that_occur_twice(good: Path, tmp_path: Path) -> None:
    """Whoever takes the first and whoever takes the last would have different models."""
    folder = shutil.copytree(good.with_name("shards"), tmp_path / "shards")
    for file in ("config.json", SHARDS):
        text = (folder / file).read_text()
        name = "rms_norm_eps" if file == "config.json" else "model.norm.weight"
        (folder / file).write_text(text.replace(f'"{name}":', f'"{name}": 0.5, "{name}":'))
        refused(folder, f"{file}: is not readable JSON ('{name}' is given twice)")
        (folder / file).write_text(text)
    path = sorted(folder.glob("*.safetensors"))[0]
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    name, entry = next((n, e) for n, e in json.loads(data[8 : 8 + size]).items() if n != "__metadata__")
    header = f'{{"{name}":{json.dumps(entry)},'.encode() + data[9 : 8 + size]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + size :])
    refused(folder, f"{path.name}: its header is not readable JSON ('{name}' is given twice)")


def test_one_file_and_an_index_of_others(good: Path, model: Path) -> None:
    shutil.copy(good.with_name("shards") / SHARDS, model)
    refused(model, f"has model.safetensors, and {SHARDS} that lists other files; remove one of them")
    names = dict.fromkeys(load_file(model / "model.safetensors"), "model.safetensors")
    (model / SHARDS).write_text(json.dumps({"weight_map": names}))
    assert from_pretrained(model).config == LLAMA


def test_missing_files(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(model, "has no model.safetensors")
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(model, "pickled", "save_pretrained")
    (model / "config.json").unlink()
    refused(model, "config.json: is missing")
    with pytest.raises(InputError, match="there is no such folder, and it is no name of the hub"):
        from_pretrained(tmp_path / "nothing")
    for name in ("../x", "..", "a/b/c", "a b", "", "./x/.."):
        with pytest.raises(InputError, match=r"no name of the hub|config\.json: is missing"):
            from_pretrained(name)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"model.norm.weight": None}, "misses model.norm.weight"),
        ({"lm_head.weight": None}, "misses lm_head.weight"),
        ({"model.extra": torch.zeros(2)}, "has unexpected model.extra"),
        ({"model.norm.weight": torch.ones(17)}, "model.norm.weight has shape (17,); config.json asks for (16,)"),
        ({"model.norm.weight": torch.ones(16, 1)}, "model.norm.weight has shape (16, 1)"),
        ({"model.norm.weight": torch.ones(16, dtype=torch.int8)}, "model.norm.weight is I8; only F32"),
        (
            {"model.norm.weight": torch.ones(16, dtype=torch.float64)},
            "model.norm.weight is F64; only F32, BF16, F16 are supported; convert it",
        ),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(24, 16)}, "config.json asks for (12, 16)"),
    ],
    ids=str,
)
def test_tensors(model: Path, changes: dict[str, Tensor | None], word: str) -> None:
    store(model, changes)
    refused(model, word)


def test_a_tied_head_must_be_the_embedding(model: Path) -> None:
    configure(model, tie_word_embeddings=True)
    refused(model, "lm_head.weight differs from model.embed_tokens.weight")
    store(model, {"lm_head.weight": load_file(model / "model.safetensors")["model.embed_tokens.weight"]})
    assert from_pretrained(model).head is None


def test_damaged_weights(model: Path) -> None:
    path = model / "model.safetensors"
    data = path.read_bytes()
    for spoiled in (b"", data[:100], data[:-1], b"\xff" * 8 + data[8:], data + b"x"):
        path.write_bytes(spoiled)
        refused(model, "model.safetensors: is not a readable safetensors file")


@pytest.mark.parametrize("file", ["../good/a.safetensors", "/etc/a.safetensors", "..\\a.safetensors", "a.bin", 3, ""])
def test_paths_in_the_index(good: Path, tmp_path: Path, file: Any) -> None:
    folder = shutil.copytree(good.with_name("shards"), tmp_path / "shards")
    index = json.loads((folder / SHARDS).read_text())
    index["weight_map"]["model.norm.weight"] = file
    (folder / SHARDS).write_text(json.dumps(index))
    refused(folder, "model.norm.weight", "no name of a .safetensors file")


def test_the_index_must_fit_its_shards(good: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(good.with_name("shards"), tmp_path / "shards")
    index = json.loads((folder / SHARDS).read_text())
    names = sorted(set(index["weight_map"].values()))
    for changes, word in (
        ({"model.norm.weight": names[0]}, "places model.norm.weight in"),
        ({"model.new.weight": names[0]}, "no shard holds it"),
        ({"model.norm.weight": "absent.safetensors"}, "absent.safetensors: is missing"),
    ):
        (folder / SHARDS).write_text(json.dumps({"weight_map": index["weight_map"] | changes}))
        refused(folder, word)
    del index["weight_map"]["model.norm.weight"]
    (folder / SHARDS).write_text(json.dumps(index))
    refused(folder, "model.norm.weight")
    (folder / SHARDS).write_text('{"weight_map": []}')
    refused(folder, "has no weight_map")


def test_hub_names(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They go through huggingface_hub, whose failure is one line."""
    import huggingface_hub

    asked = []

    def download(name: str, revision: str | None, **_: object) -> str:
        asked.append((name, revision))
        if revision == "gone":
            raise ConnectionError("no\nnetwork")
        return str(good)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert from_pretrained("someone/a-model.1", revision="v2").config == LLAMA
    assert asked == [("someone/a-model.1", "v2")]
    with pytest.raises(InputError, match=r"someone/a: is no folder here and cannot be fetched .*\(no network\)"):
        from_pretrained("someone/a", revision="gone")
