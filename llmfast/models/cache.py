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

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens, in other memory; what is held is copied there."""
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = old.new_empty((*old.shape[:2], capacity, *old.shape[3:]))
            new[:, :, : self.length] = old[:, :, : self.length]
            setattr(self, name, new)

    def positions(self, n_tokens: int) -> slice | Tensor:
        """Of the next tokens: an index into the cache and into tables by position. InputError if they do not fit."""
        end = self.length + n_tokens
        if end > self.capacity:
            raise InputError(f"the KV cache holds {self.capacity} tokens, and {end} are needed; make a larger one")
        return slice(self.length, end)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, T, Hkv, D) after the tokens held; return all keys and values so far, (B, length + T, Hkv, D)."""
        positions, end = self.positions(k.shape[1]), self.length + k.shape[1]
        self.keys[layer][:, positions] = k
        self.values[layer][:, positions] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Append (B, T, Hkv, D) and let q, (B, T, H, D), see all keys up to each token's own; -> (B, T, H, D).

        `options` are those of `attention`. On a GPU a few tokens take the kernel that shares a sequence's keys out; on
        a CPU `attention` does so itself.
        """
        keys, values = self.append(layer, k, v)
        trained = torch.is_grad_enabled() and (q.requires_grad or keys.requires_grad)
        if not q.is_cuda or q.shape[1] > MAX_DECODED or trained:
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


class DeviceKVCache(KVCache):
    """A KVCache in which a forward pass of one token reads its position on the device, where `place` has written it.

    Such a pass launches the same kernels on the same memory at every position, so that a CUDA graph of it replays for
    all; nobody asks for its gradient. Other passes are a KVCache's.
    """

    def __init__(self, config: Config, batch: int, capacity: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(config, batch, capacity, device, dtype)
        self._position = torch.zeros(1, device=device, dtype=torch.int64)

    def place(self) -> None:
        """Tell the device where the next token goes: before its forward pass, and before every replay of one."""
        super().positions(1)  # is there room?
        self._position.fill_(self.length)
        self._device_lengths(self.length + 1)

    def positions(self, n_tokens: int) -> slice | Tensor:
        return self._position if n_tokens == 1 else super().positions(n_tokens)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        if q.shape[1] > 1:
            return super().attend(layer, q, k, v, **options)
        ops.append_kv_(self.keys[layer], self.values[layer], k, v, self._lengths)
        return ops.decode_attention(q, self.keys[layer], self.values[layer], self._lengths, **options)
