"""llmfast: a GPT engine whose hand-written kernels plug into PyTorch.

`import llmfast` loads nothing but this file; `ops`, `GPT`, `Config` and `presets` are imported on first use, and Triton
only when a Triton kernel first runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .models import GPT as GPT
    from .models import PRESETS as PRESETS
    from .models import Config as Config

__version__ = "0.1.0"
__all__ = ["GPT", "PRESETS", "Config", "__version__", "ops"]

_HOMES = {"GPT": "llmfast.models", "PRESETS": "llmfast.models", "Config": "llmfast.models"}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("llmfast.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmfast' has no attribute {name!r}")
