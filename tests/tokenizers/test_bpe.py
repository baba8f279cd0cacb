"""Tokenizer: lossless on any text, special tokens out of reach of user text, GPT-2's files, clear refusals."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmfast.errors import InputError
from llmfast.tokenizers import END_OF_TEXT, StreamDecoder, Tokenizer
from llmfast.tokenizers.bpe import _byte_of_character

TEXTS = ["the cat sat on the mat, the cat sat 1234567 times\n", "def f(x):\n    return x + 12\n", "naïve café ☕\n"] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(TEXTS, 300)


def write_gpt2_files(folder, names=("encoder.json", "vocab.bpe")):
    """Bytes 0..255 in GPT-2's order, then "He", "ll", "Hell" and "ll ", then end of text."""
    merges = [("H", "e"), ("l", "l"), ("He", "ll"), ("ll", "Ġ")]
    tokens = [*_byte_of_character(), *("".join(pair) for pair in merges), END_OF_TEXT]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / names[0]).write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / names[1]).write_text("\n".join(lines), encoding="utf-8")


@given(text=st.text())
def test_any_text_round_trips(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(0 <= index < tokenizer.vocab_size for index in ids)


@given(raw=st.binary(max_size=40))
def test_any_bytes_have_ids(tokenizer, raw):
    ids = [tokenizer._token_bytes.index(bytes([byte])) for byte in raw]
    assert tokenizer.decode_bytes(ids) == raw
    assert tokenizer.decode(ids) == raw.decode("utf-8", errors="replace")


def test_training_merges_and_is_deterministic(tokenizer):
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the cat sat on the mat")) < len("the cat sat on the mat") / 2
    again = Tokenizer.train(reversed(TEXTS), 300)
    assert again.fingerprint == tokenizer.fingerprint
    assert Tokenizer.train(TEXTS, 299).fingerprint != tokenizer.fingerprint
    assert Tokenizer.train(["ab"], 5000).vocab_size == 257


def test_numbers_split_into_pairs_of_digits():
    tokenizer = Tokenizer.train(["1234 "] * 9, 1000)
    assert [tokenizer.decode([index]) for index in tokenizer.encode("12341234")] == ["12", "34", "12", "34"]


def test_end_of_text_in_user_text_is_ordinary_text(tokenizer):
    text = f"the{END_OF_TEXT}cat"
    ids = tokenizer.encode(text)
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == text
    special = tokenizer.encode(text, allow_special=True)
    assert special == [*tokenizer.encode("the"), tokenizer.eot_id, *tokenizer.encode("cat")]
    assert tokenizer.decode(special) == text
    assert tokenizer.encode(text) == ids


def test_batch_equals_single_texts(tokenizer):
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


def test_decode_takes_arrays(tokenizer):
    ids = np.array(tokenizer.encode("café"), dtype=np.uint16)
    assert tokenizer.decode(ids) == "café"
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("bad", [-1, 300, 10**6])
def test_unknown_id_is_refused(tokenizer, bad):
    with pytest.raises(InputError, match=rf"token id {bad} .*vocabulary of 300"):
        tokenizer.decode([1, bad])


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(InputError, match=r"'x\\ud800' is not valid Unicode"):
        tokenizer.encode("x\ud800")


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(InputError, match="vocab_size 256 .* 257"):
        Tokenizer.train(TEXTS, 256)


@given(text=st.text())
def test_stream_never_breaks_a_character(tokenizer, text):
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert stream.finish() == ""


def test_stream_holds_back_and_finishes(tokenizer):
    first, *_, last = (tokenizer._token_bytes.index(bytes([byte])) for byte in "😀".encode())
    stream = StreamDecoder(tokenizer)
    assert stream.push(first) == ""
    assert stream.finish() == "\ufffd"
    stream = StreamDecoder(tokenizer)
    assert stream.push(last) == "\ufffd"


@pytest.mark.parametrize("target", ["tokenizer.json", "renamed.json", ""])
def test_save_and_load(tokenizer, tmp_path, target):
    tokenizer.save(tmp_path / target)
    loaded = Tokenizer.load(tmp_path / target)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])
    assert (loaded.vocab_size, loaded.eot_id) == (tokenizer.vocab_size, tokenizer.eot_id)
    assert [path.name for path in tmp_path.iterdir()] == [target or "tokenizer.json"]


def test_truncation_stored_in_the_file_is_off(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    fields = json.loads((tmp_path / "tokenizer.json").read_text())
    fields["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(fields))
    assert Tokenizer.load(tmp_path).encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2_files(tmp_path, names):
    write_gpt2_files(tmp_path, names)
    tokenizer = Tokenizer.load(tmp_path)
    byte_id = {character: index for index, character in enumerate(_byte_of_character())}
    assert (tokenizer.vocab_size, tokenizer.eot_id) == (261, 260)
    assert tokenizer.encode("Hello") == [258, byte_id["o"]]
    assert tokenizer.encode(" Hell") == [byte_id["Ġ"], 258]
    assert tokenizer.encode("ll o") == [257, byte_id["Ġ"], byte_id["o"]]  # words are split before the space
    assert tokenizer.encode(END_OF_TEXT, allow_special=True) == [260]
    assert 260 not in tokenizer.encode(END_OF_TEXT)
    assert tokenizer.decode(tokenizer.encode("Hé\x00\n")) == "Hé\x00\n"


def test_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(InputError, match=f"no tokenizer at {tmp_path}/absent"):
        Tokenizer.load(tmp_path / "absent")


def test_damaged_tokenizer_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(InputError, match=f"{tmp_path}: not a readable tokenizer"):
        Tokenizer.load(tmp_path)


def drop_end_of_text(tokens):
    tokens.pop(END_OF_TEXT)


def drop_a_byte(tokens):
    tokens["zz"] = tokens.pop("~")


def leave_a_gap(tokens):
    tokens["zz"] = 300


def leave_the_byte_alphabet(tokens):
    tokens["▁the"] = 261


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_end_of_text, "no <|endoftext|> token"),
        (drop_a_byte, "1 of the 256 bytes"),
        (leave_a_gap, "39 gaps"),
        (leave_the_byte_alphabet, "token '\\u2581the'"),
    ],
)
def test_unusable_vocabulary_is_explained(tmp_path, change, message):
    write_gpt2_files(tmp_path)
    path = tmp_path / "encoder.json"
    tokens = json.loads(path.read_text())
    change(tokens)
    path.write_text(json.dumps(tokens))
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    assert message in str(caught.value) and str(tmp_path) in str(caught.value)


def test_import_leaves_torch_out():
    code = "import sys, llmfast.tokenizers, llmfast.data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_huge_numbers_are_refused() -> None:
    with pytest.raises(InputError, match="vocab_size 100000000000000000000 is too large"):
        Tokenizer.train(["abc"], 10**20)
    with pytest.raises(InputError, match="token id 100000000000000000000 is outside"):
        Tokenizer.train(["abc"], 257).decode([1, 10**20])
