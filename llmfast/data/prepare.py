"""From a text source to a data folder: split, tokenizer, token shards and manifest."""

import hashlib
import os
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..errors import InputError
from ..files import file_sha256, staged_folder
from ..tokenizers import AnyTokenizer, PretrainedTokenizer, Tokenizer
from ..tokenizers.pretrained import SAVED
from .manifest import MANIFEST_NAME, Manifest, Split
from .shards import token_dtype, write_shard
from .sources import Document, read_source

Progress = Callable[[str, float], None]

_DOCUMENTS_PER_BATCH = 64
_NAMES = (MANIFEST_NAME, *SAVED)
_OWN_FILES = re.compile(rf"{'|'.join(map(re.escape, _NAMES))}|(train|val)-\d+-of-\d+\.bin")


def prepare(
    source: str,
    out: str | Path,
    *,
    vocab_size: int = 8192,
    tokenizer: str | Path | AnyTokenizer | None = None,
    val_fraction: float = 0.05,
    shard_tokens: int = 2**26,
    on_progress: Progress | None = None,
) -> Manifest:
    """Writes the data folder `out` from `source` (see `read_source`) and returns its manifest.

    A tokenizer of at most `vocab_size` tokens is trained on the training split, unless `tokenizer` is one or names one
    to load; each document is followed by one end-of-text token. About `val_fraction` of the bytes become the validation
    split: see `split_documents`. `on_progress` hears (stage, fraction) for the stages "read", "tokenizer", "train",
    "val".

    The folder appears whole or not at all. An older data folder at `out` is replaced; any other non-empty folder is
    refused with InputError, like text too short to split and a tokenizer that does not reproduce the text exactly, but
    for what tokenizers of models usually do to it.
    """
    out = Path(out)
    if not 0 < val_fraction < 0.5:
        raise InputError(f"val_fraction {val_fraction} is not usable; give more than 0 and less than 0.5")
    if shard_tokens < 1:
        raise InputError(f"shard_tokens {shard_tokens} is not usable; give at least 1")
    _check_replaceable(out)
    progress = on_progress or (lambda stage, fraction: None)

    progress("read", 0.0)
    corpus = read_source(source)
    parts = split_documents(corpus.documents, val_fraction)
    _check_disjoint(parts)
    progress("read", 1.0)

    progress("tokenizer", 0.0)
    if tokenizer is None:
        used = Tokenizer.train((document.text for document in parts["train"]), vocab_size)
    else:
        used = Tokenizer.load(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer
    progress("tokenizer", 1.0)

    with staged_folder(out) as folder:
        used.save(folder)
        manifest = Manifest(
            source=source,
            python_version=corpus.python_version,
            vocab_size=used.vocab_size,
            tokenizer_fingerprint=used.fingerprint,
            splits={name: _write_split(folder, name, parts[name], used, shard_tokens, progress) for name in parts},
            skipped=corpus.skipped,
            duplicates=corpus.duplicates,
        )
        manifest.save(folder)
    return manifest


def split_documents(documents: list[Document], val_fraction: float) -> dict[str, list[Document]]:
    """{"train": ..., "val": ...}, both non-empty, val close to `val_fraction` of the UTF-8 bytes.

    Whole groups go to val in the order of the sha256 of their names, each if it brings val closer to its aim. Where
    groups are too few or too large for that, documents are chosen likewise, and where these are too large, val is the
    end of the largest document from a line boundary on, or, for want of one near, from a word boundary on. InputError
    where no boundary leaves val between half and twice its aim.
    """
    sizes = [len(document.text.encode()) for document in documents]
    aim = val_fraction * sum(sizes)
    for keys in ([document.group for document in documents], [document.name for document in documents]):
        chosen = _choose(keys, sizes, aim)
        if chosen:
            marked = list(zip(keys, documents, strict=True))
            return {
                "train": [document for key, document in marked if key not in chosen],
                "val": [document for key, document in marked if key in chosen],
            }
    largest = int(np.argmax(sizes))
    start, end = _cut(documents[largest], aim)
    return {"train": [*documents[:largest], start, *documents[largest + 1 :]], "val": [end]}


def _choose(keys: list[str], sizes: list[int], aim: float) -> set[str]:
    """Keys whose sizes add up to about `aim`; empty if they reach less than half of it."""
    total_of: dict[str, int] = {}
    for key, size in zip(keys, sizes, strict=True):
        total_of[key] = total_of.get(key, 0) + size
    chosen: set[str] = set()
    total = 0
    for key in sorted(total_of, key=_hash_of_name):
        if abs(total + total_of[key] - aim) < abs(total - aim):
            chosen.add(key)
            total += total_of[key]
    return chosen if total >= aim / 2 else set()


def _hash_of_name(name: str) -> bytes:
    # File names need not be UTF-8; Python stands surrogates in for their bytes.
    return hashlib.sha256(name.encode(errors="surrogateescape")).digest()


def _cut(document: Document, aim: float) -> tuple[Document, Document]:
    """`document` in two, the second about `aim` bytes long."""
    raw = document.text.encode()
    wanted = len(raw) - round(aim)
    for boundary in (b"\n", b" "):
        cuts = (raw.rfind(boundary, 0, wanted) + 1, raw.find(boundary, wanted) + 1)
        cut = min(cuts, key=lambda cut: abs(cut - wanted))
        halves = raw[:cut].decode(), raw[cut:].decode()
        if aim / 2 <= len(raw) - cut <= 2 * aim and all(half.strip() for half in halves):
            names = f"{document.name}[:{cut}]", f"{document.name}[{cut}:]"
            return Document(names[0], document.group, halves[0]), Document(names[1], document.group, halves[1])
    raise InputError(
        f"{document.name}: {len(raw)} bytes are too short or have too few lines to set {aim:.0f} aside for validation; "
        "give more text"
    )


def _check_disjoint(parts: dict[str, list[Document]]) -> None:
    """No text of val may be in train; duplicates are gone, but a document cut in two could equal a third."""
    in_train = {document.sha256: document.name for document in parts["train"]}
    for document in parts["val"]:
        if document.sha256 in in_train:
            raise InputError(f"{document.name} of val equals {in_train[document.sha256]} of train; remove one of them")


def _check_replaceable(out: Path) -> None:
    """InputError unless `out` is absent, empty, or a data folder with nothing else in it."""
    if not out.exists():
        return
    if not out.is_dir():
        raise InputError(f"{out}: is a file; give a new folder")
    names = {path.name for path in out.iterdir()}
    if not names:
        return
    if not Manifest.is_in(out):
        raise InputError(f"{out}: not empty and not a data folder; give a new folder")
    foreign = sorted(name for name in names if not _OWN_FILES.fullmatch(name))
    if foreign:
        raise InputError(f"{out}: holds {foreign[0]}, which prepare did not write; move it or give a new folder")


def _write_split(
    folder: Path, name: str, documents: list[Document], tokenizer: AnyTokenizer, shard_tokens: int, progress: Progress
) -> Split:
    progress(name, 0.0)
    tokens, n_bytes = _encode(documents, tokenizer, lambda fraction: progress(name, fraction))
    starts = range(0, len(tokens), shard_tokens)
    shards: dict[str, str] = {}
    for index, start in enumerate(starts):
        path = folder / f"{name}-{index:05d}-of-{len(starts):05d}.bin"
        write_shard(path, tokens[start : start + shard_tokens], tokenizer.vocab_size)
        shards[path.name] = file_sha256(path)
    return Split(
        documents={document.name: document.sha256 for document in documents},
        n_bytes=n_bytes,
        n_tokens=len(tokens),
        shards=shards,
    )


def _encode(
    documents: list[Document], tokenizer: AnyTokenizer, on_fraction: Callable[[float], None]
) -> tuple[np.ndarray, int]:
    """Ids of the documents, each between the tokenizer's start and end-of-text, and how many bytes of text they are."""
    pieces: list[np.ndarray] = []
    n_bytes = 0
    for start in range(0, len(documents), _DOCUMENTS_PER_BATCH):
        batch = documents[start : start + _DOCUMENTS_PER_BATCH]
        all_ids = tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, all_ids, strict=True):
            n_bytes += _check_reproduces(tokenizer, ids, document)
            whole = [*tokenizer.start_ids, *ids, tokenizer.eot_id]
            pieces.append(np.array(whole, dtype=token_dtype(tokenizer.vocab_size)))
        on_fraction((start + len(batch)) / len(documents))
    return np.concatenate(pieces), n_bytes


def _check_reproduces(tokenizer: AnyTokenizer, ids: list[int], document: Document) -> int:
    """How many bytes of text `ids` stand for; InputError where that is not the document's text.

    A tokenizer that changes text would make bits per byte count bytes it never has to predict. A model that came
    with its own has no other, so that may do what is usual (`_model_reads`): the bytes of what it makes of text count.
    """
    reproduced = tokenizer.decode_bytes(ids)
    if tokenizer.eot_id in ids:
        raise InputError(f"{document.name}: the tokenizer finds an end of text in it; remove its name from the text")
    found, given = reproduced.decode(errors="replace"), document.text
    if isinstance(tokenizer, PretrainedTokenizer) and found != given:
        found, given = _model_reads(found), _model_reads(given)
    if found != given:
        at = len(os.path.commonprefix((found, given)))
        what = f"it makes {found[at : at + 10]!a} of {given[at : at + 10]!a}"
        remedy = "use a lossless one or change the text"
        raise InputError(f"{document.name}: the tokenizer does not reproduce its bytes, {what}; {remedy}")
    return len(reproduced)


def _model_reads(text: str) -> str:
    """`text` without what the usual tokenizers of models do not tell apart: Qwen's normalise Unicode, and those made
    with SentencePiece write a space as U+2581 and may swallow one that begins a text."""
    return unicodedata.normalize("NFC", text).replace("\u2581", " ").lstrip(" ")
