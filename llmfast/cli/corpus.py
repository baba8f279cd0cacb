"""From what the user names as data to an open data folder, and the ladder of its baselines, both cached."""

import hashlib
import json
import platform
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from .. import environment
from ..data import Dataset, Manifest, prepare
from ..errors import InputError
from ..evals import Rung, ladder

STDLIB = "stdlib"


def open_data(source: str, vocab_size: int, console: Console) -> Dataset:
    """`source` as a data folder: itself if it is one, else prepared in the cache unless it is there already."""
    if source != STDLIB and Manifest.is_in(Path(source)):
        return Dataset.open(source)
    folder = environment.cache_dir() / "data" / _key(source, vocab_size)
    if not Manifest.is_in(folder):
        console.print(f"preparing {source} in {folder}", highlight=False, markup=False, soft_wrap=True)
        with console.status("") as status:
            prepare(
                source,
                folder,
                vocab_size=vocab_size,
                on_progress=lambda stage, fraction: status.update(f"{stage} {fraction:.0%}"),
            )
    return Dataset.open(folder)


def read_ladder(data: Dataset, console: Console) -> list[Rung]:
    """The baselines of `data`, from the cache if these texts and this tokenizer were measured before."""
    key = f"{data.manifest.corpus_hash[:16]}-{data.manifest.tokenizer_fingerprint[:16]}.json"
    path = environment.cache_dir() / "ladders" / key
    if path.is_file():
        return [Rung(**rung) for rung in json.loads(path.read_text(encoding="utf-8"))]
    with console.status("measuring the baselines"):
        rungs = ladder(
            data.tokens("train"),
            data.tokens("val"),
            data.text("train"),
            data.text("val"),
            data.tokenizer.vocab_size,
            data.tokenizer.eot_id,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps([asdict(rung) for rung in rungs], indent=1), encoding="utf-8")
    temporary.replace(path)
    return rungs


def _key(source: str, vocab_size: int) -> str:
    """A name that changes with the interpreter for its library, and with names, sizes or times of files otherwise."""
    if source == STDLIB:
        return f"stdlib-{platform.python_version()}-{vocab_size}"
    path = Path(source).resolve()
    if not path.exists():
        raise InputError(f"{source}: no such file or folder; give one, or 'stdlib'")
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        status = file.stat()
        digest.update(f"{file}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
    return f"{path.stem}-{vocab_size}-{digest.hexdigest()[:16]}"
