"""The tokenizer of a model in Hugging Face's format: any kind that `tokenizers` reads, and its chat template.

How a prompt begins and where an answer ends is the model's business: tokenizer.json says what goes before a text,
generation_config.json which tokens end one, and the chat template how a conversation is written. Documents to train on
begin as prompts do, and end in eos_token.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers.decoders import DecodeStream

from ..errors import InputError
from ..files import read_json, write_atomic
from .bpe import END_OF_TEXT, Tokenizer, fingerprint_of
from .chat import Message, render

SAVED = TOKENIZER, CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class PretrainedTokenizer:
    """Built by `load`. `stop_ids` end an answer; `template` is None where the model has none. `start_ids` begin a
    document: what tokenizer.json puts before a text, less what would also end one."""

    def __init__(
        self, backend: hf.Tokenizer, special: dict[str, str], stop_ids: frozenset[int], template: str | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._special = backend, special
        self.stop_ids, self.template = stop_ids, template
        self.start_ids = tuple(i for i in backend.encode("").ids if i not in stop_ids)
        self._bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None

    @classmethod
    def load(cls, folder: str | Path) -> "PretrainedTokenizer":
        """Reads tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json,
        generation_config.json and the chat template. Raises InputError naming the file."""
        folder = Path(folder)
        path = folder / TOKENIZER
        if not path.is_file():
            raise InputError(f"{folder}: has no tokenizer.json; load the model in transformers and save_pretrained it")
        try:
            backend = hf.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({' '.join(str(error).split())})") from None
        config, names = _read(folder / CONFIG), _read(folder / "special_tokens_map.json")
        special = {name: text for name in SPECIAL if (text := _text(config.get(name) or names.get(name)))}
        ends = _read(folder / GENERATION).get("eos_token_id")
        stop_ids = {i for i in (ends if isinstance(ends, list) else [ends]) if type(i) is int}
        if (end := _end_id(backend, special)) is not None:
            stop_ids.add(end)
        return cls(backend, special, frozenset(stop_ids), _template(folder, config))

    def save(self, folder: Path) -> None:
        """Writes into `folder` the files SAVED, which `load` makes the same tokenizer of."""
        config = self._special | ({} if self.template is None else {"chat_template": self.template})
        ends = {"eos_token_id": sorted(self.stop_ids)}
        write_atomic(folder / TOKENIZER, self._backend.to_str().encode())
        write_atomic(folder / CONFIG, json.dumps(config, indent=1).encode())
        write_atomic(folder / GENERATION, json.dumps(ends, indent=1).encode())

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, special tokens included."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def eot_id(self) -> int:
        """What ends a document: eos_token, else `<|endoftext|>`, else one of `stop_ids`, of which a model may name some
        that the tokenizer has not; InputError without any."""
        end = _end_id(self._backend, self._special)
        ends = self.stop_ids.intersection(self._backend.get_vocab().values())
        if end is None and not ends:
            raise InputError("the tokenizer has nothing to end a text; give its eos_token in tokenizer_config.json")
        return min(ends) if end is None else end

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that decides the ids of a document: equal for tokenizers that make the same of it."""
        ends = {"start_ids": self.start_ids, "eot_id": self.eot_id}
        return fingerprint_of(ends | {"tokenizer": json.loads(self._backend.to_str())})

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text to continue, behind what the tokenizer puts before one; names of special tokens in it become
        their ids. A text that has that token already does not get it twice, and an end that is added is left out."""
        ids = self._backend.encode(text).ids
        if self._bos_id is not None and ids[:2] == [self._bos_id] * 2:
            ids = ids[1:]
        plain = self._backend.encode(text, add_special_tokens=False).ids
        if ids and ids[-1] in self.stop_ids and plain[-1:] != ids[-1:]:
            ids = ids[:-1]
        if not ids:  # a new text: something must come before its first token
            ids = [i for i in (self._bos_id, *sorted(self.stop_ids)) if i is not None][:1]
        return ids

    def chat_ids(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: Any
    ) -> list[int]:
        """Ids of a conversation as the model's template writes it, ready for its answer; the template alone decides
        what it begins with. Names of special tokens in a message become their ids, as in transformers."""
        if self.template is None:
            raise InputError("the model has no chat template; it continues texts: llmfast generate")
        text = render(self.template, messages, self._special, add_generation_prompt, **variables)
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode(self, text: str) -> list[int]:
        """Ids of `text` with nothing added."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of every text with nothing added, computed on all cores. Names of special tokens are spelled out as
        ordinary text, so untrusted text cannot end a document."""
        return [encoding.ids for encoding in self._text_backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """UTF-8 of the text that `encode_batch` made `ids` of, as far as the tokenizer keeps it: some normalise
        Unicode. A character that is cut off at the end becomes U+FFFD."""
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=False).encode()

    @cached_property
    def _text_backend(self) -> hf.Tokenizer:
        # A second backend, because flipping the flag on the first would not be safe between threads.
        backend = hf.Tokenizer.from_str(self._backend.to_str())
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of `ids` without special tokens."""
        return self._backend.decode(np.asarray(ids, dtype=np.int64).tolist(), skip_special_tokens=True)

    def stream_decoder(self) -> "PretrainedStreamDecoder":
        return PretrainedStreamDecoder(self._backend)


class PretrainedStreamDecoder:
    """As StreamDecoder, of a tokenizer whose text can depend on the tokens around."""

    def __init__(self, backend: hf.Tokenizer) -> None:
        self._backend, self._stream = backend, DecodeStream(skip_special_tokens=True)

    def push(self, token_id: int) -> str:
        return self._stream.step(self._backend, token_id) or ""

    def finish(self) -> str:
        return ""


AnyTokenizer = Tokenizer | PretrainedTokenizer


def load_saved(folder: Path) -> AnyTokenizer:
    """The tokenizer whose `save` wrote into `folder`. Raises InputError naming the file."""
    kept = (folder / CONFIG).is_file()  # which our own ones do not need
    return PretrainedTokenizer.load(folder) if kept else Tokenizer.load(folder / TOKENIZER)


def _end_id(backend: hf.Tokenizer, special: dict[str, str]) -> int | None:
    """Of eos_token, or where none is named, of the token that has this name in most vocabularies without files."""
    return backend.token_to_id(special.get("eos_token", END_OF_TEXT))


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _text(token: Any) -> str | None:
    """A special token's text, which may be wrapped in its properties."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """From its own file, or from tokenizer_config.json, which may hold several by name."""
    if (path := folder / "chat_template.jinja").is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: is not UTF-8 ({error}); fetch the file again") from None
    found = _read(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
