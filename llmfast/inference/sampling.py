"""Choosing the next token from logits."""

import math

import torch
from torch import Tensor

from ..errors import InputError, LLMFastError


def check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise InputError for values that `sample` cannot use."""
    if not math.isfinite(temperature) or temperature < 0:
        raise InputError(f"temperature is {temperature}; it must be 0 (the likeliest token) or a positive number")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}; it must be at least 1, or None for no limit")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p is {top_p}; it must be in (0, 1]")


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """logits (B, V) -> one token id a row, (B,) int64.

    softmax(logits / temperature), cut to the `top_k` likeliest tokens and then to the fewest whose probabilities reach
    `top_p` (nucleus sampling, https://arxiv.org/abs/1904.09751). Temperature 0 takes the likeliest, the lowest id of
    equals. `generator` is on the logits' device. LLMFastError for a row whose largest logit is not a finite number.
    """
    check(temperature, top_k, top_p)
    likeliest = logits.argmax(-1)
    if not logits.gather(-1, likeliest[:, None]).isfinite().all():  # the host waits here, so what it asks for is made
        raise LLMFastError("the model's logits are not finite; use weights of an earlier step or train again")
    if temperature == 0.0:
        return likeliest
    scores, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    # Less the largest first: dividing large logits by a small temperature would overflow.
    scores = (scores - scores[:, :1]) / max(temperature, torch.finfo(torch.float32).tiny)
    if top_k is not None and top_k < scores.shape[-1]:
        scores[:, top_k:] = float("-inf")
    probabilities = scores.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # of all likelier tokens; 0 for the first, which always stays
        probabilities[before >= top_p] = 0.0
    return ids.gather(-1, torch.multinomial(probabilities, 1, generator=generator)).squeeze(-1)
