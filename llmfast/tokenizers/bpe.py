"""Byte-level BPE on the Hugging Face `tokenizers` library: every byte string has ids and every id has exact bytes."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf

from ..errors import InputError
from ..files import write_atomic

END_OF_TEXT = "<|endoftext|>"

# GPT-4's pattern (https://github.com/openai/tiktoken/blob/main/tiktoken_ext/openai_public.py, cl100k_base) with numbers
# cut into at most two digits instead of three, which costs a small vocabulary 110 tokens rather than 1110.
SPLIT_PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
)

SMALLEST_VOCAB = 256 + 1  # every byte and <|endoftext|>
LARGEST_VOCAB = 2**24  # far beyond any in use; the trainer sets memory aside for all of it before it starts


class Tokenizer:
    """A byte-level BPE vocabulary; build one with `train` or `load`. `start_ids` begin a document, `eot_id` ends it."""

    start_ids: tuple[int, ...] = ()

    def __init__(self, backend: hf.Tokenizer) -> None:
        """Wraps `backend`; raises InputError unless it is byte-level, complete and knows `<|endoftext|>`."""
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # user text never turns into a special id
        self._backend = backend
        self._token_bytes = _token_bytes(backend)
        eot_id = backend.token_to_id(END_OF_TEXT)
        if eot_id is None:
            raise InputError(f"the tokenizer has no {END_OF_TEXT} token; add it to its vocabulary")
        self.eot_id: int = eot_id

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learns a vocabulary from `texts`: the same texts give the same tokenizer.

        The result has at most `vocab_size` tokens: fewer when no pair of tokens is left that occurs twice.
        """
        if vocab_size < SMALLEST_VOCAB:
            raise InputError(f"vocab_size {vocab_size} is too small; the bytes and {END_OF_TEXT} need {SMALLEST_VOCAB}")
        if vocab_size > LARGEST_VOCAB:
            raise InputError(f"vocab_size {vocab_size} is too large; give at most {LARGEST_VOCAB}")
        backend = hf.Tokenizer(hf.models.BPE())
        backend.pre_tokenizer = hf.pre_tokenizers.Sequence(
            [
                hf.pre_tokenizers.Split(hf.Regex(SPLIT_PATTERN), behavior="isolated"),
                hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = hf.decoders.ByteLevel()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(_byte_of_character()),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a `tokenizer.json`, a folder that holds one, or a folder with GPT-2's `encoder.json` and `vocab.bpe`.

        GPT-2's two files may also be named `vocab.json` and `merges.txt`. Raises InputError naming the path.
        """
        path = Path(path)
        files = [path] if path.is_file() else _find_files(path)
        try:
            backend = hf.Tokenizer.from_file(str(files[0])) if len(files) == 1 else _gpt2(*files)
            return cls(backend)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except Exception as error:  # the Rust library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({_one_line(error)}); fetch the file again") from error

    def save(self, path: str | Path) -> None:
        """Writes `tokenizer.json`, atomically, to `path` or into it when it is a folder."""
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        write_atomic(path, self._backend.to_str().encode())

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included; ids are 0 .. vocab_size - 1."""
        return len(self._token_bytes)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the tokenizer as JSON with sorted keys: equal for tokenizers that behave alike."""
        return fingerprint_of(json.loads(self._backend.to_str()))

    @property
    def stop_ids(self) -> frozenset[int]:
        """What ends a document."""
        return frozenset((self.eot_id,))

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text to continue: like every document in training it begins after an end-of-text token."""
        return [self.eot_id, *self.encode(text)]

    def stream_decoder(self) -> "StreamDecoder":
        return StreamDecoder(self)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of `text`; see `encode_batch`."""
        return self.encode_batch([text], allow_special=allow_special)[0]

    def encode_batch(self, texts: Sequence[str], *, allow_special: bool = False) -> list[list[int]]:
        """Ids of every text, computed on all cores.

        `<|endoftext|>` and other special tokens inside a text are spelled out as ordinary text, so untrusted text
        cannot end a document; with `allow_special` they become their own ids. No id is added at either end.
        """
        backend = self._special_backend if allow_special else self._backend
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        except TypeError as error:  # how the Rust library reports a surrogate
            bad = next((text for text in texts if isinstance(text, str) and not _is_unicode(text)), None)
            if bad is None:
                raise
            raise InputError(f"text {_excerpt(bad)} is not valid Unicode text; remove lone surrogates") from error

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD. Special tokens appear by name."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Bytes of `ids`: exactly the UTF-8 of the text that was encoded. InputError for an id that does not exist."""
        try:
            array = np.asarray(ids, dtype=np.int64)
            outside = array[(array < 0) | (array >= self.vocab_size)].tolist()
        except OverflowError:  # numpy's word for an id beyond 64 bits
            outside = [max(ids, key=abs)]
            array = np.empty(0, np.int64)
        if outside:
            raise InputError(
                f"token id {outside[0]} is outside the vocabulary of {self.vocab_size}; "
                "decode with the tokenizer that made the ids"
            )
        table = self._token_bytes
        return b"".join([table[i] for i in array.tolist()])

    @cached_property
    def _special_backend(self) -> hf.Tokenizer:
        # A second backend, because flipping the flag on the first would not be safe between threads.
        return hf.Tokenizer.from_str(self._backend.to_str())


class StreamDecoder:
    """Turns ids that arrive one by one into text, holding back bytes until their UTF-8 character is complete."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Text that `token_id` completes; empty in the middle of a character."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token_id]))

    def finish(self) -> str:
        """U+FFFD if the stream stopped in the middle of a character, else nothing."""
        return self._utf8.decode(b"", final=True)


def fingerprint_of(values: Any) -> str:
    """sha256 (hex) of `values` as JSON with sorted keys."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _find_files(folder: Path) -> list[Path]:
    """The one or two files of the tokenizer in `folder`."""
    for names in (["tokenizer.json"], ["encoder.json", "vocab.bpe"], ["vocab.json", "merges.txt"]):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            return files
    raise InputError(
        f"no tokenizer at {folder}; give a tokenizer.json or a folder with tokenizer.json or encoder.json + vocab.bpe"
    )


def _gpt2(vocab: Path, merges: Path) -> hf.Tokenizer:
    """GPT-2's tokenizer from its own files; https://github.com/openai/gpt-2/blob/master/src/encoder.py."""
    backend = hf.Tokenizer(hf.models.BPE.from_file(str(vocab), str(merges)))
    backend.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = hf.decoders.ByteLevel()
    # Adding a token that the files lack would give it a new id, which no model of this vocabulary knows.
    if backend.token_to_id(END_OF_TEXT) is not None:
        backend.add_special_tokens([hf.AddedToken(END_OF_TEXT, special=True)])
    return backend


def _byte_of_character() -> dict[str, int]:
    """The printable character that stands for each byte -> the byte.

    `bytes_to_unicode` of https://github.com/openai/gpt-2/blob/master/src/encoder.py, inverted.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_bytes(backend: hf.Tokenizer) -> list[bytes]:
    """The bytes of every id; InputError unless all 256 bytes have a token and the ids have no gap."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    byte_of = _byte_of_character()
    missing = sum(character not in vocabulary for character in byte_of)
    if missing:
        raise InputError(f"{missing} of the 256 bytes have no token; use a complete byte-level BPE")
    by_id: dict[int, bytes] = {}
    for token, index in vocabulary.items():
        if token in added:
            by_id[index] = token.encode()
        elif all(character in byte_of for character in token):
            by_id[index] = bytes(byte_of[character] for character in token)
        else:
            raise InputError(f"token {_excerpt(token)} is not written in GPT-2's byte alphabet; use a byte-level BPE")
    if len(by_id) != max(by_id) + 1:
        raise InputError(f"the ids 0 .. {max(by_id)} have {max(by_id) + 1 - len(by_id)} gaps; number the tokens anew")
    return [by_id[index] for index in range(len(by_id))]


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _excerpt(text: str) -> str:
    return ascii(text if len(text) <= 40 else text[:40] + "...")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
