"""What a data folder holds and where it came from: `manifest.json`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..files import write_atomic

FORMAT = "llmfast-data"
FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"


@dataclass(frozen=True)
class Split:
    """One of "train" and "val"."""

    documents: dict[str, str]
    """Document name -> sha256 of its text, in the order of the tokens."""
    n_bytes: int
    """UTF-8 bytes of the text, as the tokens give it back: the denominator of bits per byte."""
    n_tokens: int
    """Tokens, with the tokenizer's start before and one end-of-text after each document."""
    shards: dict[str, str]
    """Shard file name -> sha256 of the file, in order."""


@dataclass(frozen=True)
class Manifest:
    """Everything needed to check a data folder and to compare two of them."""

    source: str
    python_version: str | None
    """Interpreter whose standard library was read; None for other sources."""
    vocab_size: int
    tokenizer_fingerprint: str
    splits: dict[str, Split]
    skipped: dict[str, str]
    """Name -> reason."""
    duplicates: dict[str, str]
    """Name -> name of the document with the same text."""

    @property
    def corpus_hash(self) -> str:
        """sha256 of which text is in which split: results compare only where it is equal. Tokenizer not included."""
        lines = (f"{split} {sha}" for split in sorted(self.splits) for sha in self.splits[split].documents.values())
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        """Writes `manifest.json` into `folder`, atomically."""
        head = {"format": FORMAT, "format_version": FORMAT_VERSION, "corpus_hash": self.corpus_hash}
        write_atomic(folder / MANIFEST_NAME, json.dumps(head | asdict(self), indent=1).encode())

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether `folder` is a data folder of any format version."""
        path = folder / MANIFEST_NAME
        return path.is_file() and json.dumps({"format": FORMAT})[1:-1].encode() in path.read_bytes()

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads `manifest.json` of `folder`; InputError if it is missing, damaged or of another format."""
        path = folder / MANIFEST_NAME
        if not path.is_file():
            raise InputError(f"{folder}: not a data folder, it has no {MANIFEST_NAME}; make one with prepare")
        try:
            fields = json.loads(path.read_bytes())
            found = f"{fields.pop('format')} {fields.pop('format_version')}"
            if found != f"{FORMAT} {FORMAT_VERSION}":
                raise InputError(f"{path}: format {found}, this llmfast reads {FORMAT_VERSION}; run prepare again")
            corpus_hash = fields.pop("corpus_hash")
            fields["splits"] = {name: Split(**split) for name, split in fields["splits"].items()}
            manifest = cls(**fields)
            matches = manifest.corpus_hash == corpus_hash
        except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise InputError(f"{path}: damaged ({type(error).__name__}: {error}); run prepare again") from None
        if not matches:
            raise InputError(f"{path}: corpus_hash does not match the documents listed; run prepare again")
        return manifest
