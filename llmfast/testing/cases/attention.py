"""Cases of attention, and of attention over a key-value cache."""

import functools
import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import ops
from .base import Defaults, Work


@dataclass(frozen=True)
class AttentionCase(Defaults):
    """Attention of (batch, n_queries, heads, head_dim) over (batch, n_keys, kv_heads, head_dim)."""

    batch: int
    n_queries: int
    n_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    softcap: float = 0.0
    scale: float | None = None
    op: str = "attention"

    def looseness(self, result: Tensor) -> float:
        """How many times PyTorch's error is allowed: 2, and 3 in float32 in two cases.

        A single query: PyTorch runs that as matrix-vector products, which sum in a tree, while a tile sums in a chain
        of head_dim products (its error grows with the root; 3.6 against 0.9 ulp on an H200). And in the interpreter,
        whose BLAS rounds the k q^T of the backward pass otherwise than the q k^T of the forward pass.
        """
        exact = result.dtype == torch.float32 and (self.n_queries == 1 or not result.is_cuda)
        return 3.0 if exact else 2.0

    @property
    def label(self) -> str:
        lengths = str(self.n_queries) if self.n_queries == self.n_keys else f"{self.n_queries}/{self.n_keys}"
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        label = f"B{self.batch} T{lengths} H{heads} D{self.head_dim} {'causal' if self.causal else 'full'}"
        label += f" window {self.window}" * bool(self.window) + f" softcap {self.softcap:g}" * bool(self.softcap)
        return label if self.scale is None else f"{label} scale {self.scale:g}"

    @property
    def plain(self) -> bool:
        return self.window is None and not self.softcap

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        kv = (self.batch, self.n_keys, self.kv_heads, self.head_dim)
        return {"q": (self.batch, self.n_queries, self.heads, self.head_dim), "k": kv, "v": kv}

    @property
    def output(self) -> tuple[int, ...]:
        return self.inputs["q"]

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        options = {"causal": self.causal, "window": self.window, "softcap": self.softcap, "scale": self.scale}
        return ops.attention(*tensors, backend=backend, **options)

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.scaled_dot_product_attention at the tensors' dtype, its mask aligned bottom right where lengths differ;
        with a cap, which it has not, the same written out."""
        if tensors[0].numel() == 0:  # which some of its kernels return None for
            return tensors[0] + 0 * (tensors[1].sum() + tensors[2].sum())
        q, k, v = (t.transpose(1, 2) for t in tensors)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        if scale <= 0.0:  # of which some of its kernels make NaN
            q, scale = (q * -1.0, -scale) if scale else (q * 0.0, 1.0)
        mask = None
        if self.causal and (self.n_queries != self.n_keys or self.window or self.softcap):
            visible = torch.ones(self.n_queries, self.n_keys, dtype=torch.bool, device=q.device)
            mask = visible.tril(self.n_keys - self.n_queries)
            mask = mask.triu(self.n_keys - self.n_queries - self.window + 1) if self.window else mask
        if self.softcap:
            return _capped_attention(q, k, v, mask, scale, self.softcap).transpose(1, 2)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, scale=scale,
            enable_gqa=self.heads != self.kv_heads,
        )  # fmt: skip
        if mask is not None:
            # A query that sees no key: zeros by definition, NaN or an average by some of SDPA's kernels.
            out = torch.where(mask.any(-1)[:, None], out, 0.0)
        return out.transpose(1, 2)

    def probe(self, t: Tensor) -> Tensor:
        """The last batch and key head, which depend on no other: the truth of all would not fit in memory."""
        return t[-1:, :, -(t.shape[2] // self.kv_heads) :]

    def work(self, direction: str, itemsize: int) -> Work:
        """FLOPs as FlashAttention counts them: 4 B H Tq Tk D, halved for causal, times 2.5 backward."""
        flops = 4.0 * self.batch * self.heads * self.n_queries * self.n_keys * self.head_dim
        flops *= (0.5 if self.causal else 1.0) * (1.0 if direction == "fwd" else 2.5)
        elements = sum(math.prod(shape) for shape in self.inputs.values()) + math.prod(self.inputs["q"])
        return Work(float(elements * itemsize * (1 if direction == "fwd" else 2)), flops)


def _capped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, softcap: float) -> Tensor:
    """F.scaled_dot_product_attention of capped scores, written out: (B, H, Tq, D) and (B, Hkv, Tk, D) -> as q. What the
    mask leaves without a key gives zeros."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    scores = softcap * torch.tanh(q @ k.transpose(-1, -2) * scale / softcap)
    if mask is None:
        return torch.softmax(scores, -1) @ v
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), -1).masked_fill(~mask, 0.0) @ v


@functools.cache
def starts_of(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32).to(device)


@dataclass(frozen=True)
class VarlenAttentionCase(Defaults):
    """Attention of sequences of these (queries, keys) one after another."""

    lengths: tuple[tuple[int, int], ...]
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    window: int | None = None
    softcap: float = 0.0
    op: str = "attention_varlen"

    @property
    def label(self) -> str:
        lengths = "+".join(str(q) if q == k else f"{q}/{k}" for q, k in self.lengths) or "nothing"
        if len(self.lengths) > 2 and len(set(self.lengths)) == 1:
            lengths = f"{len(self.lengths)}x{lengths.split('+')[0]}"
        label = f"T{lengths} H{self.heads}/{self.kv_heads} D{self.head_dim} {'causal' if self.causal else 'full'}"
        return label + f" window {self.window}" * bool(self.window) + f" softcap {self.softcap:g}" * bool(self.softcap)

    def looseness(self, result: Tensor) -> float:
        """As AttentionCase's, of which these are many; 4 in the interpreter, whose BLAS decides: on one processor
        dv of sequences of a few tokens was 2.24e-6 off beside PyTorch's 0.51e-6, on others and on a GPU within 3."""
        if result.dtype != torch.float32:
            return 2.0
        return 3.0 if result.is_cuda else 4.0

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        queries, keys = (sum(n) for n in zip(*self.lengths, strict=True)) if self.lengths else (0, 0)
        kv = (keys, self.kv_heads, self.head_dim)
        return {"q": (queries, self.heads, self.head_dim), "k": kv, "v": kv}

    @property
    def output(self) -> tuple[int, ...]:
        return self.inputs["q"]

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        queries, keys = zip(*self.lengths, strict=True) if self.lengths else ((), ())
        q, k, v = tensors
        starts = [starts_of(tuple(n), q.device) for n in (queries, keys)]
        options = {"causal": self.causal, "window": self.window, "softcap": self.softcap}
        return ops.attention_varlen(
            q, k, v, starts[0], starts[1], max((0, *queries)), max((0, *keys)), backend=backend, **options
        )

    def torch(self, *tensors: Tensor) -> Tensor:
        """Sequence after sequence."""
        outs, first_q, first_k = [0 * sum(t.sum() for t in tensors) + tensors[0][:0]], 0, 0
        for n_queries, n_keys in self.lengths:
            case = AttentionCase(
                1, n_queries, n_keys, self.heads, self.kv_heads, self.head_dim, self.causal, self.window, self.softcap
            )
            q = tensors[0][first_q : first_q + n_queries]
            k, v = (t[first_k : first_k + n_keys] for t in tensors[1:])
            outs.append(case.torch(q[None], k[None], v[None])[0] if n_keys else 0 * q)
            first_q, first_k = first_q + n_queries, first_k + n_keys
        return torch.cat(outs)

    def work(self, direction: str, itemsize: int) -> Work:
        """As AttentionCase's."""
        pairs = sum(q * k for q, k in self.lengths) * (0.5 if self.causal else 1.0)
        flops = 4.0 * self.heads * pairs * self.head_dim * (1.0 if direction == "fwd" else 2.5)
        elements = sum(math.prod(shape) for shape in self.inputs.values()) + math.prod(self.output)
        return Work(float(elements * itemsize * (1 if direction == "fwd" else 2)), flops)


@functools.cache  # a cache makes its tables once
def _lengths(batch: int, capacity: int, ragged: bool, device: torch.device) -> Tensor:
    """Full, or a full one, then an empty one, and others spread between."""
    sequence = torch.arange(batch)
    spread = torch.where(sequence == 0, capacity, (sequence - 1) * 7919 % (capacity + 1))
    return (spread if ragged else torch.full((batch,), capacity)).to(device, torch.int32)


@functools.cache
def _block_table(batch: int, max_pages: int, page_size: int, ragged: bool, device: torch.device) -> Tensor:
    """(batch, max_pages) in disorder, that of multiples of the golden ratio; -1, no page, where a sequence has none."""
    scattered = torch.arange(batch * max_pages, dtype=torch.float64) * (5**0.5 - 1) / 2 % 1.0
    pages = scattered.argsort().view(batch, max_pages)
    lengths = _lengths(batch, max_pages * page_size, ragged, torch.device("cpu"))
    used = torch.arange(max_pages) * page_size < lengths[:, None]
    return torch.where(used, pages, -1).to(device, torch.int32)


@dataclass(frozen=True)
class DecodeAttentionCase(Defaults):
    """Attention of (batch, n_queries, heads, head_dim) over a cache (batch, capacity, kv_heads, head_dim), or pages."""

    batch: int
    n_queries: int
    capacity: int
    heads: int
    kv_heads: int
    head_dim: int
    page_size: int = 0
    """Keys in a page; 0 for a cache without pages."""
    ragged: bool = False
    """Whether lengths differ, and NaN lies past them."""
    counted: bool = True
    """Whether lengths are given at all."""
    window: int | None = None
    softcap: float = 0.0
    op: str = "decode_attention"
    differentiable = False

    def looseness(self, result: Tensor) -> float:
        """As AttentionCase's of a single query, but that PyTorch's own product of matrices, which the reference takes,
        needed 3.2 on an H200."""
        return 4.0 if result.dtype == torch.float32 else 2.0

    @property
    def label(self) -> str:
        heads = str(self.heads) if self.heads == self.kv_heads else f"{self.heads}/{self.kv_heads}"
        label = f"B{self.batch} T{self.n_queries}/{self.capacity} H{heads} D{self.head_dim}"
        label += f" pages of {self.page_size}" * bool(self.page_size) + " ragged" * self.ragged
        label += "" if self.window is None else f" window {self.window}"
        return label + f" cap {self.softcap:g}" * bool(self.softcap) + " whole" * (not self.counted)

    @property
    def plain(self) -> bool:
        return not self.page_size and self.window is None and not self.softcap

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        slots = (self.batch, self.capacity)
        if self.page_size:
            slots = (self.batch * (self.capacity // self.page_size), self.page_size)
        cache = (*slots, self.kv_heads, self.head_dim)
        return {"q": self.output, "k_cache": cache, "v_cache": cache}

    @property
    def output(self) -> tuple[int, ...]:
        return self.batch, self.n_queries, self.heads, self.head_dim

    def lengths(self, device: torch.device) -> Tensor:
        return _lengths(self.batch, self.capacity, self.ragged, device)

    def block_table(self, device: torch.device) -> Tensor | None:
        if not self.page_size:
            return None
        return _block_table(self.batch, self.capacity // self.page_size, self.page_size, self.ragged, device)

    def prepare(self, tensors: list[Tensor]) -> None:
        """NaN past the lengths: in the pages of no sequence, and in the rest of each last page."""
        written = torch.arange(self.capacity) < self.lengths(torch.device("cpu"))[:, None]
        table = self.block_table(torch.device("cpu"))
        if table is not None:
            slots = torch.zeros(self.inputs["k_cache"][:2], dtype=torch.bool)
            slots[table[table >= 0].long()] = written.unflatten(1, (-1, self.page_size))[table >= 0]
            written = slots
        for cache in tensors[1:]:
            cache[~written.to(cache.device)] = float("nan")

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        q, k_cache, v_cache = tensors
        lengths = self.lengths(q.device)[-q.shape[0] :] if self.counted else None
        options = {"block_table": self.block_table(q.device), "window": self.window, "softcap": self.softcap}
        return ops.decode_attention(q, k_cache, v_cache, lengths, backend=backend, **options)

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.scaled_dot_product_attention over what the caches hold, with a mask where that is needed; with a cap, which
        it has not, the same written out."""
        q, *caches = tensors
        if q.numel() == 0 or caches[0].numel() == 0:  # which some of its kernels return None for
            return torch.zeros_like(q)
        table = self.block_table(q.device)
        if table is not None:
            caches = [cache[table.long()].flatten(1, 2) for cache in caches]
        key, query = (torch.arange(n, device=q.device) for n in (self.capacity, self.n_queries))
        lengths, mask = self.lengths(q.device)[:, None], None
        if self.ragged or self.n_queries > 1 or self.window or self.softcap:
            seen = (lengths - self.n_queries + 1 + query)[..., None]
            mask = (key < seen if self.window is None else (key < seen) & (key >= seen - self.window))[:, None]
        if self.ragged:
            caches = [cache.masked_fill((key >= lengths)[..., None, None], 0.0) for cache in caches]
        qh, kh, vh = (t.transpose(1, 2) for t in (q, *caches))
        if self.softcap:
            return _capped_attention(qh, kh, vh, mask, self.head_dim**-0.5, self.softcap).transpose(1, 2)
        out = F.scaled_dot_product_attention(qh, kh, vh, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        return (out if mask is None else out.where(mask.any(-1, keepdim=True), 0.0)).transpose(1, 2)

    def probe(self, t: Tensor) -> Tensor:
        """Of a large one the last batch and key head, as AttentionCase."""
        return t if self.ragged or self.page_size else t[-1:, :, -(t.shape[2] // self.kv_heads) :]

    def work(self, direction: str, itemsize: int) -> Work:
        """The keys and values held, once; queries and results."""
        held = 2 * int(self.lengths(torch.device("cpu")).sum()) * self.kv_heads * self.head_dim
        return Work(float((held + 2 * math.prod(self.output)) * itemsize), 0.0)
