"""Generating tokens one by one with a key-value cache."""

from collections.abc import Collection, Iterator, Sequence

import torch

from ..errors import InputError
from ..models import GPT
from .decoding import Decoder
from .sampling import check, sample


def generate(
    model: GPT | Decoder,
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop_ids: Collection[int] = (),
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new_tokens` ids that continue `prompt_ids`, ending before the first of `stop_ids`.

    A `Decoder` of a model keeps its cache, and any CUDA graph, for the next call. It continues one prompt at a time:
    where a later call has begun, the earlier one raises InputError. A model gets a Decoder of its own.

    The prompt has 1 to `context_length` ids of the vocabulary, else InputError. When the context is full, the cache is
    rebuilt from the last half of it: later tokens see between context_length / 2 and context_length tokens. The model
    is put in eval mode; sampling is as `sample` says, with its own generator made from `seed`. Where the tokenizer has
    fewer ids than the model, whose vocabulary is padded, `vocab_size` is how many: none beyond is chosen.
    """
    check(temperature, top_k, top_p)
    gpt = model.model if isinstance(model, Decoder) else model
    config = gpt.config
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
    if vocab_size is not None and vocab_size < 1:
        raise InputError(f"vocab_size is {vocab_size}; it must be at least 1, or None for all of the model's")
    if not 0 <= seed < 2**64:
        raise InputError(f"seed is {seed}; it must be 0 to 2**64 - 1")
    gpt.eval()
    return _continue(
        model, list(prompt_ids), max_new_tokens, temperature, top_k, top_p, seed, frozenset(stop_ids), vocab_size
    )


def _continue(
    model: GPT | Decoder,
    tokens: list[int],
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    seed: int,
    stop_ids: frozenset[int],
    vocab_size: int | None,
) -> Iterator[int]:
    decoder = model if isinstance(model, Decoder) else Decoder(model)
    cache, sequence, context = decoder.cache, decoder.begin(), decoder.model.config.context_length
    generator = torch.Generator(cache.keys.device).manual_seed(seed)
    unread = tokens  # ids that the cache does not hold yet
    for _ in range(max_new_tokens):
        if decoder.n_begun != sequence:
            raise InputError("another prompt was begun with this Decoder; give each that is continued at once its own")
        if cache.length + len(unread) > context:
            cache.length, unread = 0, tokens[-max(1, context // 2) :]
        logits = decoder(unread)[:, :vocab_size]
        token = int(sample(logits, temperature, top_k, top_p, generator))
        if token in stop_ids:
            return
        yield token
        tokens.append(token)
        unread = [token]
