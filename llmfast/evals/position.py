"""Loss by position: how much each further token of context helps, and where it stops."""

import numpy as np
import torch
import torch.nn.functional as F

from ..errors import InputError
from ..models import GPT
from .loss import halving


def loss_by_position(model: GPT, tokens: np.ndarray, context: int, batch_size: int = 8) -> np.ndarray:
    """Mean loss in nats of predicting a token from the p + 1 tokens before it, at p = 0 .. context - 1: (context,).

    `tokens` (n,) are cut into windows of `context` that share no target; a rest shorter than one is left out. As in
    `bits_per_byte`, `batch_size` windows are computed at once, or fewer where memory is short.
    """
    if not 1 <= context <= model.config.context_length:
        raise InputError(f"context is {context}; it must be 1 to {model.config.context_length}, the model's")
    n_windows = (len(tokens) - 1) // context
    if n_windows < 1:
        raise InputError(f"{len(tokens)} tokens fill no window of {context}; give a longer text or a shorter context")
    ids = tokens[: n_windows * context + 1].astype(np.int64)
    inputs, targets = ids[:-1].reshape(n_windows, context), ids[1:].reshape(n_windows, context)
    was_training = model.training
    model.eval()
    try:
        return halving(batch_size, lambda size: _sums(model, inputs, targets, size)) / n_windows
    finally:
        model.train(was_training)


@torch.inference_mode()
def _sums(model: GPT, inputs: np.ndarray, targets: np.ndarray, batch_size: int) -> np.ndarray:
    """Losses by position, added up over the windows: (context,) float64."""
    device = model.token_embedding.weight.device
    total = torch.zeros(inputs.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(inputs), batch_size):
        x, y = (torch.from_numpy(a[start : start + batch_size]).to(device) for a in (inputs, targets))
        losses = F.cross_entropy(model(x).flatten(0, 1).float(), y.flatten(), reduction="none")
        total += losses.view(y.shape).sum(0, dtype=torch.float64)
    return total.cpu().numpy()
