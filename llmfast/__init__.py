"""llmfast: a GPT engine whose hand-written kernels plug into PyTorch.

`import llmfast` loads nothing but this file; the names of `__all__` are imported on first use, and Triton only when a
Triton kernel first runs.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import ops as ops
    from .models import GPT as GPT
    from .models import PRESETS as PRESETS
    from .models import Config as Config
    from .weights import from_pretrained as from_pretrained
    from .weights import save_pretrained as save_pretrained

__version__ = "0.1.0"
__all__ = ["GPT", "PRESETS", "Config", "__version__", "from_pretrained", "ops", "save_pretrained"]

_HOMES = {
    "GPT": "llmfast.models",
    "PRESETS": "llmfast.models",
    "Config": "llmfast.models",
    "from_pretrained": "llmfast.weights",
    "save_pretrained": "llmfast.weights",
}


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("llmfast.ops")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'llmfast' has no attribute {name!r}")
