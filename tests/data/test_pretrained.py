"""Data of a tokenizer that came with another library's model."""

import json
import unicodedata

import numpy as np
import pytest
import tokenizers as hf

from llmfast.data import Dataset, prepare
from llmfast.errors import InputError
from llmfast.tokenizers import PretrainedTokenizer

TEXTS = [f"Grüße {n} </s><s> 🎉 hello\n" for n in range(40)] + ["  indented e\u0301\u2581", "hello " * 30]


def byte_level(adds_bos):
    """As Qwen's, which normalises, or as Llama 3's, which begins a text."""
    made = hf.Tokenizer(hf.models.BPE())
    made.pre_tokenizer, made.decoder = hf.pre_tokenizers.ByteLevel(add_prefix_space=False), hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(["hello there"] * 3, trainer)
    if adds_bos:
        made.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    else:
        made.normalizer = hf.normalizers.NFC()
    return made


def sentence_piece():
    """As Mistral's: bytes where there is no token, and a space before a text unless it begins with one."""
    known = ["<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁helo"]
    made = hf.Tokenizer(hf.models.BPE({token: i for i, token in enumerate(known)}, [], byte_fallback=True))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer = hf.pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    decoders = [hf.decoders.Replace("▁", " "), hf.decoders.ByteFallback(), hf.decoders.Fuse()]
    made.decoder = hf.decoders.Sequence([*decoders, hf.decoders.Strip(" ", 1, 0)])
    made.post_processor = hf.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


MADE = {"qwen": lambda: byte_level(False), "llama": lambda: byte_level(True), "mistral": sentence_piece}


def tokenizer_of(folder, made, **config):
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    values = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(values | config))
    return PretrainedTokenizer.load(folder)


def as_read(kind, text):
    if kind == "qwen":
        return unicodedata.normalize("NFC", text)
    return text.replace("\u2581", " ").removeprefix(" ") if kind == "mistral" else text


@pytest.mark.parametrize("kind", MADE)
def test_documents_become_tokens_and_come_back(tmp_path, kind):
    """Between the model's start and end, special tokens in it spelled out; bytes are of what the model sees."""
    tokenizer = tokenizer_of(tmp_path / "model", MADE[kind]())
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (tmp_path / "text.jsonl").write_text("".join(lines))
    manifest = prepare(str(tmp_path / "text.jsonl"), tmp_path / "out", tokenizer=tokenizer)
    data = Dataset.open(tmp_path / "out")
    assert manifest.tokenizer_fingerprint == data.tokenizer.fingerprint == tokenizer.fingerprint
    assert data.tokenizer.eot_id == 1 and data.tokenizer.start_ids == (() if kind == "qwen" else (0,))
    assert data.tokenizer.stop_ids == tokenizer.stop_ids and data.tokenizer.template == "{{ messages }}"
    chosen = {
        split: [TEXTS[int(name.split(":")[1]) - 1] for name in manifest.splits[split].documents]
        for split in data.manifest.splits
    }
    assert sorted(chosen["train"] + chosen["val"]) == sorted(TEXTS)
    for split, texts in chosen.items():
        tokens, expected = data.tokens(split), [as_read(kind, text).encode() for text in texts]
        assert data.text(split) == b"".join(expected) and data.n_bytes(split) == len(b"".join(expected))
        assert tokens[-1] == 1 and (tokens == 1).sum() == len(texts)
        assert (tokens == 0).sum() == (0 if kind == "qwen" else len(texts))
        if kind != "qwen":
            assert tokens[0] == 0 and (tokens[np.flatnonzero(tokens == 1)[:-1] + 1] == 0).all()
        first = len(tokens) // 2
        whole = len(np.split(tokens[:first], np.flatnonzero(tokens[:first] == 1) + 1)) - 1
        assert data.text(split, first).startswith(b"".join(expected[:whole]))
        assert len(data.text(split, first)) < len(data.text(split))
    prepare(str(tmp_path / "text.jsonl"), tmp_path / "out", tokenizer=tokenizer)  # its own folder is replaced


def test_what_is_refused(tmp_path):
    (tmp_path / "text.txt").write_text("hello THERE\n" * 40)
    lower = byte_level(False)
    lower.normalizer = hf.normalizers.Lowercase()
    with pytest.raises(InputError, match=r"does not reproduce its bytes, it makes 'there\\nhell' of 'THERE\\nhell'"):
        prepare(str(tmp_path / "text.txt"), tmp_path / "out", tokenizer=tokenizer_of(tmp_path / "lower", lower))
    words = hf.Tokenizer(hf.models.WordLevel({"hello": 0, "</s>": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = hf.pre_tokenizers.WhitespaceSplit()
    (tmp_path / "text.txt").write_text("hello </s> " * 40)
    with pytest.raises(InputError, match=r"text.txt\[:\d+\]: the tokenizer finds an end of text in it"):
        prepare(str(tmp_path / "text.txt"), tmp_path / "out", tokenizer=tokenizer_of(tmp_path / "words", words))
    endless = tokenizer_of(tmp_path / "endless", byte_level(True), eos_token=None)
    with pytest.raises(InputError, match="has nothing to end a text; give its eos_token in tokenizer_config.json"):
        prepare(str(tmp_path / "text.txt"), tmp_path / "out", tokenizer=endless)
    assert not (tmp_path / "out").exists()
