"""Where text comes from: the running Python's own standard library, a text file, a folder or JSON lines."""

import hashlib
import io
import json
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import InputError

STDLIB = "stdlib"

# Not library code, or text that would swamp it: test suites, codec tables, and pydoc's topics, which are read apart.
_STDLIB_EXCLUDED = {"__pycache__", "dist-packages", "encodings", "idle_test", "pydoc_data", "site-packages"}
_STDLIB_EXCLUDED |= {"test", "tests"}
_SHARDS = "train-*-of-*.bin"  # what only a folder that prepare wrote holds
_STDLIB_GENERATED = "_sysconfigdata_"  # build settings of this very interpreter


@dataclass(frozen=True)
class Document:
    """One text. `name` is unique in its corpus; documents of one `group` belong to one split."""

    name: str
    group: str
    text: str

    @property
    def sha256(self) -> str:
        """Hash of the UTF-8 text, hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """The distinct documents of a source and what was left out."""

    documents: list[Document]
    skipped: dict[str, str] = field(default_factory=dict)
    """Name -> reason."""
    duplicates: dict[str, str] = field(default_factory=dict)
    """Name -> name of the document with the same text."""
    python_version: str | None = None
    """Version of the interpreter whose library was read; None for any other source."""


class _Unreadable(Exception):
    """Why one file cannot be a document."""


def read_source(source: str) -> Corpus:
    """Reads `source` into memory, in an order that depends on names only, dropping exact duplicates.

    - "stdlib": the standard library's modules (without tests, encodings and installed packages) and pydoc's topics;
      the group is the top-level package or module, or "pydoc_topics".
    - a text file: one document; a `.jsonl` file: one document per line, its "text" field, all in one group.
    - a folder: every text file below it that is not hidden; the group is the first path component. Binary, empty and
      undecodable files are skipped and reported.

    Text is UTF-8, for `.py` files whatever their PEP 263 cookie says. InputError names what cannot be read.
    """
    skipped: dict[str, str] = {}
    check_source(source)
    if source == STDLIB:
        found = _read_stdlib(skipped)
    elif Path(source).is_dir():
        found = _read_folder(Path(source), skipped)
    else:
        try:
            found = list(_read_file(Path(source), Path(source).name, Path(source).name))
        except _Unreadable as reason:
            raise InputError(f"{source}: {reason}; give a text file, a folder or a .jsonl file") from None
    if not found:
        raise InputError(f"{source}: no text in it ({len(skipped)} files skipped); give a source with text files")
    documents, duplicates = _drop_duplicates(found)
    return Corpus(documents, skipped, duplicates, platform.python_version() if source == STDLIB else None)


def check_source(source: str) -> None:
    """InputError unless `source` is there to be read."""
    if not source:
        raise InputError(f'the source is an empty string; give a path or "{STDLIB}"')
    if source == STDLIB:
        return
    path = Path(source)
    if not path.is_dir() and not path.is_file():
        raise InputError(f'{source}: no such file or folder; give a path or "{STDLIB}"')
    if path.is_dir() and any(path.glob(_SHARDS)):
        remedy = "train on it, or if it is damaged, prepare its text again"
        raise InputError(f"{source}: is a data folder, whose text is tokens already; {remedy}")


def _read_stdlib(skipped: dict[str, str]) -> list[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise InputError(f"{STDLIB}: this Python keeps no library sources at {root}; give a folder of text instead")
    paths = (
        path
        for path in _files(root, _STDLIB_EXCLUDED)
        if path.suffix == ".py" and not path.name.startswith(_STDLIB_GENERATED)
    )
    return _read_files(root, paths, skipped) + _read_pydoc_topics(skipped)


def _read_pydoc_topics(skipped: dict[str, str]) -> list[Document]:
    """The language reference's sections that `help()` shows; some slim installations leave them out."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        skipped["pydoc_topics"] = f"not installed ({error})"
        return []
    return [Document(f"pydoc_topics/{name}", "pydoc_topics", text) for name, text in sorted(topics.items())]


def _read_folder(root: Path, skipped: dict[str, str]) -> list[Document]:
    return _read_files(root, _files(root, set()), skipped)


def _read_files(root: Path, paths: Iterator[Path], skipped: dict[str, str]) -> list[Document]:
    documents: list[Document] = []
    for path in paths:
        name = path.relative_to(root).as_posix()
        group = name.split("/", 1)[0].removesuffix(".py")
        try:
            documents.extend(_read_file(path, name, group))
        except _Unreadable as reason:
            skipped[name] = str(reason)
    return documents


def _files(root: Path, excluded: set[str]) -> Iterator[Path]:
    """Files below `root` in sorted order, without hidden files and folders and the folders named in `excluded`."""

    def refuse(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be listed ({error.strerror}); make it readable") from error

    for folder, subfolders, names in os.walk(root, onerror=refuse):
        subfolders[:] = sorted(name for name in subfolders if name not in excluded and not name.startswith("."))
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _read_file(path: Path, name: str, group: str) -> Iterator[Document]:
    """The documents of one file; _Unreadable unless it is text, InputError for a broken line of a `.jsonl`."""
    if not path.is_file():
        raise _Unreadable("not a regular file")  # a broken link, or a pipe that would block
    try:
        text = _decode(path.read_bytes(), is_python=path.suffix == ".py")
    except OSError as error:
        raise _Unreadable(f"cannot be opened ({error.strerror})") from None
    if not text.strip():
        raise _Unreadable("empty")
    if path.suffix != ".jsonl":
        yield Document(name, group, text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield Document(f"{name}:{number}", group, _text_field(line, f"{path}:{number}"))


def _decode(raw: bytes, is_python: bool) -> str:
    if b"\0" in raw:
        raise _Unreadable("binary, holds NUL bytes")
    try:
        encoding = tokenize.detect_encoding(io.BytesIO(raw).readline)[0] if is_python else "utf-8-sig"
        return raw.decode(encoding)
    except SyntaxError as error:
        raise _Unreadable(f"no usable encoding ({error})") from None
    except UnicodeDecodeError as error:
        raise _Unreadable(f"not {error.encoding} text (byte {error.start})") from None


def _text_field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f'{place}: "text" holds a lone surrogate; remove it') from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise InputError(f'{place}: not a JSON object with a "text" string; repair or remove the line') from None
    if not text.strip():
        raise InputError(f'{place}: "text" is empty; remove the line')
    return text


def _drop_duplicates(found: list[Document]) -> tuple[list[Document], dict[str, str]]:
    first: dict[str, Document] = {}
    duplicates: dict[str, str] = {}
    for document in found:
        original = first.setdefault(document.sha256, document)
        if original is not document:
            duplicates[document.name] = original.name
    return list(first.values()), duplicates
