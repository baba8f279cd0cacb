"""Named configurations. GPT-2's sizes are those of its paper and of https://github.com/openai/gpt-2."""

from typing import Any

from ..errors import InputError
from .config import Config


def _gpt2(n_layer: int, n_head: int, d_model: int) -> Config:
    return Config(
        vocab_size=50257,
        context_length=1024,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=d_model // n_head,
        d_model=d_model,
        d_mlp=4 * d_model,
    )


def _small(vocab_size: int, context_length: int, n_layer: int, n_head: int, head_dim: int, **fields: Any) -> Config:
    d_model = n_head * head_dim
    return Config(
        vocab_size=vocab_size,
        context_length=context_length,
        n_layer=n_layer,
        n_head=n_head,
        n_kv_head=n_head,
        head_dim=head_dim,
        d_model=d_model,
        d_mlp=4 * d_model,
        position="rope",
        bias=False,
        **fields,
    )


PRESETS: dict[str, Config] = {
    "gpt2": _gpt2(12, 12, 768),  # 124M
    "gpt2-medium": _gpt2(24, 16, 1024),  # 350M
    "gpt2-large": _gpt2(36, 20, 1280),  # 774M
    "gpt2-xl": _gpt2(48, 25, 1600),  # 1.5B
    "tiny": _small(512, 128, 2, 2, 32),  # 0.1M: tests
    "mini": _small(4096, 256, 4, 3, 64),  # 2.6M: minutes on a CPU
    "small": _small(8192, 1024, 8, 8, 64, dropout=0.3),  # 29M: minutes on a GPU
}


def preset(name: str, **changes: Any) -> Config:
    """The preset `name`, with fields replaced by `changes`."""
    if name not in PRESETS:
        raise InputError(f"unknown preset {name!r}; choose one of: {', '.join(PRESETS)}")
    return Config.from_dict(PRESETS[name].to_dict() | changes)
