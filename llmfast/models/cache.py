"""The key-value cache of a model being decoded."""

from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..errors import InputError
from .config import Config

# More new tokens than these are a prompt, which attention computes faster.
MAX_DECODED = 16


class KVCache:
    """Keys and values of every layer for up to `capacity` tokens: two tensors (n_layer, B, capacity, Hkv, D).

    A forward pass gives each layer's new keys to `attend` or `append` and then counts them once with `advance`.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.n_layer, batch, capacity, config.n_kv_head, config.head_dim)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0
        self._lengths = torch.zeros(batch, device=device, dtype=torch.int32)
        self._lengths_hold = 0

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

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append (B, T, Hkv, D) and let q, (B, T, H, D), see all keys up to each token's own; -> (B, T, H, D).

        `options` are those of `attention`. On a GPU a few tokens take the kernel that shares a sequence's keys out, if
        it has the options; on a CPU `attention` does so itself.
        """
        keys, values = self.append(layer, k, v)
        trained = torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)
        if not q.is_cuda or q.shape[1] > MAX_DECODED or trained or options.keys() - {"scale"}:
            return ops.attention(q, keys, values, causal=True, **options)
        lengths = self._device_lengths(keys.shape[1])
        return ops.decode_attention(q, self.keys[layer], self.values[layer], lengths, **options)

    def _device_lengths(self, length: int) -> Tensor:
        """(B,) of `length`, made by the first layer of a forward pass."""
        if self._lengths_hold != length:
            self._lengths.fill_(length)
            self._lengths_hold = length
        return self._lengths

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens
