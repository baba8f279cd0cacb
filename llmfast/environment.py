"""The only module that reads environment variables."""

import os
from pathlib import Path


def backend() -> str:
    """`LLMFAST_BACKEND`: the default kernel backend, `auto` when unset."""
    return os.environ.get("LLMFAST_BACKEND") or "auto"


def strict() -> bool:
    """`LLMFAST_STRICT=1`: `auto` raises where it would fall back from a kernel to the reference."""
    return os.environ.get("LLMFAST_STRICT", "0") not in ("", "0")


def cache_dir() -> Path:
    """`LLMFAST_CACHE`: where prepared corpora go; `$XDG_CACHE_HOME/llmfast`, else `~/.cache/llmfast`, when unset."""
    explicit = os.environ.get("LLMFAST_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast"


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton runs kernels on the CPU, in numpy, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
