"""The only module that reads or sets environment variables."""

import functools
import os
from pathlib import Path


@functools.cache
def backend() -> str:
    """`LLMFAST_BACKEND`: the default kernel backend, `auto` when unset. Read once, as every call of an op asks."""
    return os.environ.get("LLMFAST_BACKEND") or "auto"


def strict() -> bool:
    """`LLMFAST_STRICT=1`: `auto` raises where it would fall back from a kernel to the reference."""
    return os.environ.get("LLMFAST_STRICT", "0") not in ("", "0")


def cpu_variant() -> str | None:
    """`LLMFAST_CPU`: the instruction set the C++ kernels use instead of the best this CPU has, for tests."""
    return os.environ.get("LLMFAST_CPU") or None


def cache_dir() -> Path:
    """`LLMFAST_CACHE`: where prepared corpora go; `$XDG_CACHE_HOME/llmfast`, else `~/.cache/llmfast`, when unset."""
    explicit = os.environ.get("LLMFAST_CACHE")
    if explicit:
        return Path(explicit)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmfast"


def make_cublas_deterministic() -> None:
    """`CUBLAS_WORKSPACE_CONFIG`: set, unless it is, to what PyTorch demands of deterministic matrix products.

    See https://docs.nvidia.com/cuda/cublas/#results-reproducibility. Works only before the process's first product.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def triton_interpreted() -> bool:
    """`TRITON_INTERPRET=1`: Triton runs kernels on the CPU, in numpy, for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
