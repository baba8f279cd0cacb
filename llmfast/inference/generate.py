"""Generating tokens one by one with a key-value cache."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from ..errors import InputError
from ..models import GPT, KVCache
from .sampling import check, sample


def generate(
    model: GPT,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt_ids`, ending before the first of `stop_ids`.

    The prompt has 1 to `context_length` ids of the vocabulary, else InputError. When the context is full, the cache is
    rebuilt from the last half of it: later tokens see between context_length / 2 and context_length tokens. The model
    is put in eval mode; sampling is as `sample` says, with its own generator made from `seed`.
    """
    check(temperature, top_k, top_p)
    config = model.config
    if not 1 <= len(prompt_ids) <= config.context_length:
        raise InputError(
            f"the prompt has {len(prompt_ids)} tokens; give 1 to {config.context_length}, the model's context"
        )
    for token in prompt_ids:
        if not 0 <= token < config.vocab_size:
            raise InputError(
                f"prompt id {token} is outside the vocabulary of {config.vocab_size}; use the model's tokenizer"
            )
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}; it must be 0 to 2**64 - 1")
    model.eval()
    return _continue(model, list(prompt_ids), max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids))


def _continue(
    model: GPT,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: frozenset[int],
) -> Iterator[int]:
    context, device = model.config.context_length, model.token_embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    cache = KVCache(model.config, 1, context, device, model.compute_dtype)
    unread = tokens  # ids that the cache does not hold yet
    for _ in range(max_new_tokens):
        if cache.length + len(unread) > context:
            cache.length, unread = 0, tokens[-max(1, context // 2) :]
        logits = _read(model, unread, cache)
        token = int(sample(logits, temperature, top_k, top_p, generator))
        if token in stop_ids:
            return
        yield token
        tokens = [*tokens[-context:], token]
        unread = [token]


@torch.inference_mode()  # here, not around the generator: its caller runs between two tokens
def _read(model: GPT, ids: list[int], cache: KVCache) -> Tensor:
    """Feed `ids` after what the cache holds; logits (1, V) of the next token."""
    return model(torch.tensor([ids], device=cache.keys.device), cache, last_only=True)[:, -1]
