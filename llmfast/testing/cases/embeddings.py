"""Cases of the embeddings: of tokens, and of positions (rotary)."""

import functools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .base import Defaults, Work


def _torch_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As models without a kernel write it, at the tensors' dtype."""
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1)[..., None, :].to(x.dtype) for t in (cos, sin))
        return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin
    cos, sin = (torch.cat((t, t), -1)[..., None, :].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


@functools.cache  # a model makes its tables once
def _rope_tables(length: int, half: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), 10000.0 ** -torch.linspace(0, 1, half))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@dataclass(frozen=True)
class RopeCase(Defaults):
    """Rotary embedding of (batch, length, heads, head_dim)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    interleaved: bool = False
    by_row: bool = False
    """Whether rows have positions of their own."""
    op: str = "rope"

    @property
    def label(self) -> str:
        label = f"B{self.batch} T{self.length} H{self.heads} D{self.head_dim}"
        return label + " interleaved" * self.interleaved + " by row" * self.by_row

    @property
    def plain(self) -> bool:
        return not self.interleaved

    @property
    def output(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"x": self.output}

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 as a model keeps them (float64 for the truth, of the same values)."""
        rows = self.batch if self.by_row else 1
        dtype = torch.promote_types(like.dtype, torch.float32)
        half = self.head_dim // 2
        cos, sin = _rope_tables(rows * self.length, half, like.device, dtype)
        shape = (self.batch, self.length, half) if self.by_row else (self.length, half)
        return cos.view(shape), sin.view(shape)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        (x,) = tensors
        return ops.rope(x, *self.tables(x), interleaved=self.interleaved, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return _torch_rope(x, *self.tables(x), self.interleaved)

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float(2 * math.prod(self.output) * itemsize), 0.0)


@dataclass(frozen=True)
class EmbeddingCase(Defaults):
    """(tokens,) of a table (rows, cols), some far more frequent than others."""

    tokens: int
    rows: int
    cols: int
    op: str = "embedding"

    @property
    def label(self) -> str:
        return f"{self.tokens} of {self.rows}x{self.cols}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.rows, self.cols)}

    @property
    def output(self) -> tuple[int, ...]:
        return self.tokens, self.cols

    def ids(self, device: torch.device) -> Tensor:
        return _token_ids(self.tokens, self.rows, device)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return ops.embedding(tensors[0], self.ids(tensors[0].device), backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        return F.embedding(self.ids(tensors[0].device), tensors[0])

    def work(self, direction: str, itemsize: int) -> Work:
        """Forward a row is read and written for each token; backward one is read, and the table's gradient written."""
        passes = 2 * self.tokens if direction == "fwd" else self.tokens + self.rows
        return Work(float(passes * self.cols * itemsize), 0.0)


@functools.cache
def _token_ids(tokens: int, rows: int, device: torch.device) -> Tensor:
    """By Zipf's law, as words are: token k about 1 / k as often as the most frequent. In the order of a sequence that
    fills (0, 1) evenly, the multiples of the golden ratio."""
    cumulative = (1.0 / torch.arange(1, rows + 1, dtype=torch.float64)).cumsum(0)
    even = (torch.arange(1, tokens + 1, dtype=torch.float64) * (5**0.5 - 1) / 2) % 1.0
    return torch.searchsorted(cumulative, even * cumulative[-1]).to(device)
