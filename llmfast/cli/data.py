"""`llmfast data`: prepare a text for training."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..data import Manifest, prepare
from .runs import CHECKPOINTS, load_tokenizer


def data(
    source: Annotated[str, typer.Argument(help="stdlib, a text file, a .jsonl file or a folder.")],
    out: Annotated[Path, typer.Option(help="The data folder to write.")],
    vocab_size: Annotated[int, typer.Option(help="Tokens of the tokenizer trained on the text.")] = 8192,
    val_fraction: Annotated[float, typer.Option(help="Share of the bytes held back for validation.")] = 0.05,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Use this tokenizer.json, or a run's, instead of training one.")
    ] = None,
) -> None:
    """Prepare a text for training: tokenizer, token shards and manifest."""
    console = Console()
    used = load_tokenizer(tokenizer) if tokenizer and (tokenizer / CHECKPOINTS).is_dir() else tokenizer
    with console.status("") as status:
        manifest = prepare(
            source,
            out,
            vocab_size=vocab_size,
            tokenizer=used,
            val_fraction=val_fraction,
            on_progress=lambda stage, fraction: status.update(f"{stage} {fraction:.0%}"),
        )
    console.print(_summary(manifest, out))


def _summary(manifest: Manifest, out: Path) -> Table:
    table = Table("split", "documents", "bytes", "tokens", "bytes/token", title=f"{manifest.source} in {out}")
    for name, split in manifest.splits.items():
        counts = (len(split.documents), split.n_bytes, split.n_tokens)
        table.add_row(name, *(f"{n:,}" for n in counts), f"{split.n_bytes / split.n_tokens:.2f}")
    left_out = f"{len(manifest.duplicates)} duplicates and {len(manifest.skipped)} unreadable files left out"
    table.caption = f"vocabulary {manifest.vocab_size:,}; {left_out}; corpus {manifest.corpus_hash[:16]}"
    return table
