"""From what the user names as data to an open data folder, and the ladder of its baselines, both cached."""

import hashlib
import json
import platform
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console

from .. import environment
from ..data import Dataset, Manifest, prepare
from ..data.sources import STDLIB, check_source
from ..errors import InputError
from ..evals import Rung, ladder
from ..files import exclusive, write_atomic
from ..tokenizers import AnyTokenizer


def validation_text(data: Dataset, n_tokens: int | None = None) -> tuple[np.ndarray, int]:
    """The first `n_tokens` of the validation text, or all of it, and how many bytes they are. They stand behind an end
    of text, so that the first one is scored too, as the baselines do."""
    tokens = np.concatenate(([data.tokenizer.eot_id], data.tokens("val")[:n_tokens]))
    return tokens, len(data.text("val", n_tokens))


def is_data_folder(source: str) -> bool:
    """Whether `source` names a prepared data folder."""
    return source not in ("", STDLIB) and Manifest.is_in(Path(source))


def check_tokenizer(source: str, tokenizer: AnyTokenizer, run_dir: Path) -> None:
    """InputError where `source` is a data folder whose tokens are not of the run's `tokenizer`."""
    if not is_data_folder(source):
        return
    found = Manifest.load(Path(source)).tokenizer_fingerprint
    if found != tokenizer.fingerprint:
        raise InputError(
            f"{source}: holds tokens of the tokenizer {found[:16]}, but {run_dir} has {tokenizer.fingerprint[:16]};"
            f" give the text itself, or prepare it with: llmfast data TEXT --out FOLDER --tokenizer {run_dir}"
        )


def open_data(source: str, vocabulary: int | AnyTokenizer, console: Console) -> Dataset:
    """`source` as a data folder: itself if it is one, else prepared in the cache unless it is there already, with the
    tokenizer `vocabulary`, or with a new one of that size."""
    if is_data_folder(source):
        return Dataset.open(source)
    check_source(source)
    new = isinstance(vocabulary, int)
    make = partial(prepare, vocab_size=vocabulary) if new else partial(prepare, tokenizer=vocabulary)
    folder = environment.cache_dir() / "data" / _key(source, vocabulary)
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f".{folder.name}.lock"), wait=True):  # of runs started together, one prepares
            if not folder.exists():
                console.print(f"preparing {source} in {folder}", highlight=False, markup=False, soft_wrap=True)
                with console.status("") as status:
                    make(
                        source,
                        folder,
                        on_progress=lambda stage, fraction: status.update(f"{stage} {fraction:.0%}"),
                    )
    try:
        return Dataset.open(folder)
    except InputError as error:
        raise InputError(f"{error}: remove {folder}, it is only a cache") from None


def read_ladder(data: Dataset, console: Console) -> list[Rung]:
    """The baselines of `data`, from the cache if these texts and this tokenizer were measured before."""
    key = f"{data.manifest.corpus_hash[:16]}-{data.manifest.tokenizer_fingerprint[:16]}.json"
    path = environment.cache_dir() / "ladders" / key
    if cached := _read_rungs(path):
        return cached
    with console.status("measuring the baselines"):
        rungs = ladder(
            data.tokens("train"),
            data.tokens("val"),
            data.text("train"),
            data.text("val"),
            data.tokenizer.vocab_size,
            data.tokenizer.eot_id,
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps([asdict(rung) for rung in rungs], indent=1).encode())
    except OSError as error:
        console.print(f"the baselines are not cached: {error}", highlight=False, markup=False, soft_wrap=True)
    return rungs


def _read_rungs(path: Path) -> list[Rung]:
    """The rungs in the file; none if there is no such file or it is damaged."""
    try:
        rows = json.loads(path.read_bytes())
        return [Rung(str(row["name"]), float(row["bits_per_byte"]), float(row["seconds"])) for row in rows]
    except (OSError, ValueError, TypeError, KeyError):
        return []


def _key(source: str, vocabulary: int | AnyTokenizer) -> str:
    """A name that changes with the tokenizer, and with the interpreter for its library or with names, sizes or times of
    files."""
    tokens = str(vocabulary) if isinstance(vocabulary, int) else vocabulary.fingerprint[:16]
    if source == STDLIB:
        return f"stdlib-{platform.python_version()}-{tokens}"
    path = Path(source).resolve()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return f"{path.stem}-{tokens}-{digest.hexdigest()[:16]}"
