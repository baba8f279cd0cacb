"""Bits per byte: how well a model compresses text, comparable between tokenizers."""

import math
import warnings
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from .. import hardware
from ..errors import InputError
from ..models import GPT

T = TypeVar("T")


def bits_per_byte(
    model: GPT, tokens: np.ndarray, n_bytes: int, context: int, stride: int | None = None, batch_size: int = 8
) -> float:
    """-log2 of the probability of all `tokens` (n,) but the first, divided by `n_bytes`, the size of their text.

    Windows of `context` tokens advance by `stride` (context / 2 by default), and each token is scored once: past the
    first window every token is predicted from at least context - stride tokens before it. When the device runs out of
    memory, the number of windows computed at once, `batch_size`, is halved with a warning.
    """
    stride = max(1, context // 2) if stride is None else stride
    if len(tokens) < 2 or n_bytes < 1:
        raise InputError(f"{len(tokens)} tokens of {n_bytes} bytes cannot be scored; give a longer text")
    if not 1 <= context <= model.config.context_length:
        raise InputError(f"context is {context}; it must be 1 to {model.config.context_length}, the model's")
    if not 1 <= stride <= context:
        raise InputError(f"stride is {stride}; it must be 1 to {context}, the context")
    ids, targets = _windows(tokens, context, stride)
    was_training = model.training
    model.eval()
    try:
        return halving(batch_size, lambda size: _nats(model, ids, targets, size)) / math.log(2) / n_bytes
    finally:
        model.train(was_training)


def halving(batch_size: int, compute: Callable[[int], T]) -> T:
    """compute(batch_size), or, while that runs out of memory, with half of it, down to 1; warns of each time."""
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; it must be positive")
    while True:
        try:
            return compute(batch_size)
        except (RuntimeError, MemoryError) as error:
            if batch_size == 1 or not hardware.is_out_of_memory(error):
                raise
        batch_size //= 2
        warnings.warn(f"evaluation ran out of memory; now {batch_size} windows at once", stacklevel=3)


def _windows(tokens: np.ndarray, context: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets (W, T), T = min(context, n - 1); targets that an earlier window scores are -100.

    The last window is moved back to end with the text, so that all have one length.
    """
    last = len(tokens) - 1
    length = min(context, last)
    ends = np.minimum(np.arange(length, last + stride, stride), last)  # index of each window's last target
    positions = ends[:, None] - length + np.arange(length)
    scored_until = np.concatenate(([0], ends[:-1]))
    targets = np.where(positions + 1 > scored_until[:, None], tokens[positions + 1].astype(np.int64), -100)
    return tokens[positions].astype(np.int64), targets


@torch.inference_mode()
def _nats(model: GPT, ids: np.ndarray, targets: np.ndarray, batch_size: int) -> float:
    device = model.token_embedding.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for start in range(0, len(ids), batch_size):
        rows = slice(start, start + batch_size)
        x, y = (torch.from_numpy(a[rows]).to(device) for a in (ids, targets))
        total += model.loss(x, y).double() * int((targets[rows] != -100).sum())
    return total.item()
