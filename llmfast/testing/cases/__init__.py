"""A case of each op: shapes of its inputs, our function and PyTorch's own, and the work that it must do.

`tables` lists those that tests and benchmarks walk; both compare with `llmfast.ops.reference` in float64.
"""

import torch
from torch import Tensor

from .attention import AttentionCase, DecodeAttentionCase, VarlenAttentionCase
from .base import Result, Work
from .embeddings import EmbeddingCase, RopeCase
from .losses import CrossEntropyCase, Fp8LinearCrossEntropyCase, LinearCrossEntropyCase
from .rows import ROW_INPUTS, ActivationLinearCase, Fp8LinearCase, Fp8MLPCase, LinearCase, MLPCase, RowCase

__all__ = [
    "ROW_INPUTS",
    "AttentionCase",
    "Case",
    "CrossEntropyCase",
    "DecodeAttentionCase",
    "EmbeddingCase",
    "Fp8LinearCase",
    "Fp8LinearCrossEntropyCase",
    "Fp8MLPCase",
    "ActivationLinearCase",
    "LinearCase",
    "LinearCrossEntropyCase",
    "MLPCase",
    "Result",
    "RopeCase",
    "RowCase",
    "VarlenAttentionCase",
    "Work",
    "make_inputs",
]

Case = (
    RowCase
    | LinearCase
    | ActivationLinearCase
    | MLPCase
    | CrossEntropyCase
    | LinearCrossEntropyCase
    | RopeCase
    | EmbeddingCase
    | AttentionCase
    | VarlenAttentionCase
    | DecodeAttentionCase
)


def make_inputs(
    case: Case, device: str | torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Normal tensors of the case's shapes and standard deviation `scale`, needing a gradient where the op has one."""
    generator = torch.Generator(device).manual_seed(seed)
    tensors = [
        (scale * torch.randn(shape, device=device, generator=generator)).to(dtype) for shape in case.inputs.values()
    ]
    case.prepare(tensors)
    return [t.requires_grad_(case.differentiable) for t in tensors]
