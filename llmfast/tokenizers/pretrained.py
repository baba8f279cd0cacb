"""The tokenizer of a model in Hugging Face's format: any kind that `tokenizers` reads, and its chat template.

How a prompt begins and where an answer ends is the model's business: tokenizer.json says what goes before a text,
generation_config.json which tokens end one, and the chat template how a conversation is written.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers as hf
from tokenizers.decoders import DecodeStream

from ..errors import InputError
from .chat import Message, render

SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


class PretrainedTokenizer:
    """Built by `load`. `stop_ids` end an answer; `template` is None where the model has none."""

    def __init__(
        self, backend: hf.Tokenizer, special: dict[str, str], stop_ids: frozenset[int], template: str | None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend, self._special = backend, special
        self.stop_ids, self.template = stop_ids, template
        self._bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None

    @classmethod
    def load(cls, folder: str | Path) -> "PretrainedTokenizer":
        """Reads tokenizer.json and, where they are, tokenizer_config.json, special_tokens_map.json,
        generation_config.json and the chat template. Raises InputError naming the file."""
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{folder}: has no tokenizer.json; load the model in transformers and save_pretrained it")
        try:
            backend = hf.Tokenizer.from_file(str(path))
        except Exception as error:  # the Rust library raises bare Exception
            raise InputError(f"{path}: not a readable tokenizer ({' '.join(str(error).split())})") from None
        config, names = _read(folder / "tokenizer_config.json"), _read(folder / "special_tokens_map.json")
        special = {name: text for name in SPECIAL if (text := _text(config.get(name) or names.get(name)))}
        ends = _read(folder / "generation_config.json").get("eos_token_id")
        stop_ids = {i for i in (ends if isinstance(ends, list) else [ends]) if isinstance(i, int)}
        if "eos_token" in special and (end := backend.token_to_id(special["eos_token"])) is not None:
            stop_ids.add(end)
        return cls(backend, special, frozenset(stop_ids), _template(folder, config))

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._backend.get_vocab_size()

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


def _read(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}); fetch the file again") from None
    if not isinstance(values, dict):
        raise InputError(f"{path}: is not a JSON object; fetch the file again")
    return values


def _text(token: Any) -> str | None:
    """A special token's text, which may be wrapped in its properties."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    """From its own file, or from tokenizer_config.json, which may hold several by name."""
    if (path := folder / "chat_template.jinja").is_file():
        return path.read_text(encoding="utf-8")
    found = _read(folder / "chat_template.json").get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
