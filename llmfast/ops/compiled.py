"""How torch.compile sees an op: as one call that it does not look into, so that no choice of backend breaks its graph.

The choice is made while the graph is traced, and stays. Importing this module imports torch's compiler, which takes a
second: `functional` does so only once a compiler is tracing it.
"""

from typing import Any

import torch
from torch import Tensor

from . import autograd, registry


@torch.compiler.allow_in_graph
def run(op: str, backend: str | None, *args: Any) -> Tensor:
    """The op by the backend chosen now; the compiler follows its tensors alone."""
    return autograd.apply(op, registry.choose(op, backend, args, traced=True), args)
