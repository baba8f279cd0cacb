"""A converted model against transformers' own: an independent implementation of the same files."""

from pathlib import Path

import torch

from ..errors import InputError
from ..models import GPT

N_TOKENS = 64


def difference_from_transformers(model: GPT, folder: Path) -> float:
    """The largest difference of a logit, over the largest logit, from transformers' model of `folder`; in float32.

    Both get the same random ids. transformers is imported here only, and need not be installed otherwise.
    """
    try:
        from transformers import AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(
            "the check compares with transformers, which is not installed: pip install transformers"
        ) from None
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    length, generator = min(N_TOKENS, model.config.context_length), torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    with torch.no_grad():
        ours, theirs = model(ids).float(), other(ids).logits
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
