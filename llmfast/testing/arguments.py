"""Small right arguments of every native op, for tests that call `torch.ops.llmfast` itself."""

from typing import Any

import torch
from torch import Tensor


def native_arguments(dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> dict[str, list[Any]]:
    """Right arguments of every native op, by name."""

    def t(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    f32 = torch.float32
    row, stats = t(6, dtype=f32), t(4, dtype=f32)
    targets = torch.tensor([0, 5, -100, 2], device=device)
    return {
        "softmax_fwd": [t(4, 6)],
        "softmax_bwd": [t(4, 6), t(4, 6)],
        "layer_norm_fwd": [t(4, 6), row, row, 1e-5],
        "layer_norm_bwd": [t(4, 6), t(4, 6), row, stats, stats],
        "rms_norm_fwd": [t(4, 6), row, 1e-6],
        "rms_norm_bwd": [t(4, 6), t(4, 6), row, stats],
        "bias_gelu_fwd": [t(4, 6), row, True],
        "bias_gelu_bwd": [t(4, 6), t(4, 6), row, False],
        "swiglu_fwd": [t(4, 6), t(4, 6)],
        "swiglu_bwd": [t(4, 6), t(4, 6), t(4, 6)],
        "rope": [t(2, 3, 2, 6), t(3, 3, dtype=f32), t(3, 3, dtype=f32), False],
        "cross_entropy_fwd": [t(4, 6), targets, -100],
        "cross_entropy_bwd": [t(dtype=f32), t(4, 6), targets, t(2, 4, dtype=f32), t(dtype=f32), -100],
        "attention_fwd": [t(2, 5, 4, 6), t(2, 7, 2, 6), t(2, 7, 2, 6), True, 0.4, True],
        "attention_bwd": [t(2, 5, 4, 6), t(2, 5, 4, 6), t(2, 7, 2, 6), t(2, 7, 2, 6), t(2, 5, 4, 6)]
        + [t(2, 2, 4, 5, dtype=f32).abs() + 9.0, True, 0.4],
        "adamw_": [t(4, 6, dtype=f32) for _ in range(3)]
        + [t(4, 6, dtype=f32).abs(), 1e-3, 0.9, 0.99, 1e-8, 0.1, 0.1, 0.1, 1.0],
    }
