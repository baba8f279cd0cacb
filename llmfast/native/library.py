"""Finds, checks and loads the compiled libraries, llmfast/native/_cpu.so and _cuda.so.

They know nothing of Python: ctypes opens them, and they register their ops with torch under the schemas of schemas.py.
"""

import ctypes
import functools
import json
from pathlib import Path
from typing import Literal

import torch

from .. import environment
from ..errors import BackendError
from . import schemas
from .sources import source_hash

Name = Literal["cpu", "cuda"]
_FOLDER = Path(__file__).parent
_CSRC = Path(__file__).resolve().parents[2] / "csrc"  # in a checkout; a wheel has none
_REBUILD = "rebuild it with: pip install -e ."


@functools.cache
def load(name: Name) -> ctypes.CDLL:
    """Open the library and register its ops, once a process. Raises BackendError with the reason why it cannot be."""
    path = _FOLDER / f"_{name}.so"
    if not path.exists():
        raise BackendError(f"the {name} library was not built: {_reason_not_built(name)}")
    try:
        library = ctypes.CDLL(str(path))
        library.llmfast_source_hash.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise BackendError(f"{path} cannot be loaded: {error}; {_REBUILD}") from None
    built_from = library.llmfast_source_hash().decode()
    if _CSRC.is_dir() and built_from != source_hash(_CSRC, name):
        raise BackendError(f"{path} was built from other sources than are in {_CSRC} now; {_REBUILD}")
    schemas.define()
    if name == "cuda" and torch.version.cuda is None:
        raise BackendError(f"torch {torch.__version__} is a build without CUDA; install one with it")
    if library.llmfast_register() != 0:
        raise BackendError(f"torch {torch.__version__} refused to register the ops of {path}; torch 2.11 is the oldest")
    if name == "cpu":
        _select_variant(library)
    return library


def cpu_variant() -> str:
    """The instruction set whose kernels run: baseline, avx2, avx512 or avx512_bf16."""
    library = load("cpu")
    library.llmfast_cpu_variant.restype = ctypes.c_char_p
    return library.llmfast_cpu_variant().decode()


def describe(name: Name) -> str:
    """One line: the library is loaded and what it was built for, or why it is not and what to do."""
    try:
        load(name)
    except BackendError as error:
        return f"no: {error}"
    return f"yes, for {cpu_variant()}" if name == "cpu" else "yes"


def _select_variant(library: ctypes.CDLL) -> None:
    wanted = environment.cpu_variant()
    library.llmfast_cpu_select.restype = ctypes.c_bool
    if wanted and not library.llmfast_cpu_select(wanted.encode()):
        raise BackendError(
            f"LLMFAST_CPU is {wanted!r}, which this CPU or build lacks; choose baseline, avx2, avx512 or avx512_bf16"
        )


def _reason_not_built(name: Name) -> str:
    record = _FOLDER / "build.json"
    try:
        return json.loads(record.read_text(encoding="utf-8"))[name]["reason"]
    except (OSError, ValueError, KeyError):
        if _FOLDER.parents[1] == Path.cwd():
            return "this is a checkout that shadows an installed llmfast; run: pip install -e ."
        return "there is no record of a build; run: pip install -e ."
