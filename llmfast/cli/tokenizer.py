"""`llmfast tokenizer`: train one, encode, decode."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ..data import read_source
from ..data.manifest import TOKENIZER_NAME
from ..errors import InputError
from ..tokenizers import Tokenizer


def tokenizer(
    path: Annotated[Path, typer.Argument(help="A tokenizer.json, or a folder that holds one.")],
    train: Annotated[str | None, typer.Option(help="Train it on this source (stdlib, file or folder) first.")] = None,
    vocab_size: Annotated[int, typer.Option(help="With --train: its number of tokens.")] = 8192,
    encode: Annotated[str | None, typer.Option(help="Print the ids of this text.")] = None,
    decode: Annotated[str | None, typer.Option(help="Print the text of these ids, separated by spaces.")] = None,
) -> None:
    """Train a tokenizer, or encode and decode with one."""
    if train is not None:
        _check_replaceable(path, train)
        Tokenizer.train((document.text for document in read_source(train).documents), vocab_size).save(path)
    loaded = Tokenizer.load(path)
    if encode is not None:
        print(*loaded.encode(encode))
    if decode is not None:
        print(loaded.decode(_ids(decode)))
    if encode is None and decode is None:
        print(f"{path}: {loaded.vocab_size} tokens, end of text {loaded.eot_id}, fingerprint {loaded.fingerprint[:16]}")


def _check_replaceable(path: Path, source: str) -> None:
    """InputError where the new tokenizer would take the place of something else than a tokenizer named as a file."""
    inside = path / TOKENIZER_NAME
    if path.is_dir() and inside.exists():
        raise InputError(f"{inside}: is there already; give that path itself to replace it")
    if not path.exists() or path.is_dir():
        return
    if Path(source).exists() and path.samefile(source):
        raise InputError(f"{path}: is the text to train on; give another path for the tokenizer")
    try:
        content = json.loads(path.read_bytes())
        is_tokenizer = isinstance(content, dict) and "model" in content
    except ValueError:
        is_tokenizer = False
    if not is_tokenizer:
        raise InputError(f"{path}: is there already and not a tokenizer; give another path for the tokenizer")


def _ids(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split()]
    except ValueError:
        raise InputError(f"--decode {text!r}: give whole numbers separated by spaces") from None
