"""Hugging Face's hub: a model's name becomes a local folder, downloaded once."""

import re
from pathlib import Path

from ..errors import InputError

_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_FILES = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "tokenizer.model"]
_NOT = ["consolidated*", "*/*"]  # the same weights once more, as their makers keep them


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """`name` itself where it is a folder; else the hub's model of that name, in the hub's cache."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if isinstance(name, Path) or not _NAME.fullmatch(name) or set(name.split("/")) & {".", ".."}:
        raise InputError(f"{name}: there is no such folder, and it is no name of the hub; give one like owner/model")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise InputError(f"{name}: is no folder here; for models of the hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_NOT))
    except Exception as error:  # the library raises those of its transport, too
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{name}: is no folder here and cannot be fetched from the hub ({reason})") from None
