"""The key-value cache of a model being decoded."""

import torch
from torch import Tensor

from ..errors import InputError
from .config import Config


class KVCache:
    """Keys and values of every layer for up to `capacity` tokens: two tensors (n_layer, B, capacity, Hkv, D).

    A forward pass writes each layer's new keys with `append` and then counts them once with `advance`.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.shape[2]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, T, Hkv, D) after the tokens held; return all keys and values so far, (B, length + T, Hkv, D)."""
        end = self.length + k.shape[1]
        if end > self.capacity:
            raise InputError(f"the KV cache holds {self.capacity} tokens, and {end} are needed; make a larger one")
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens
