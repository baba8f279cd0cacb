"""Cases of attention."""

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
        return f"B{self.batch} T{lengths} H{heads} D{self.head_dim} {'causal' if self.causal else 'full'}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        kv = (self.batch, self.n_keys, self.kv_heads, self.head_dim)
        return {"q": (self.batch, self.n_queries, self.heads, self.head_dim), "k": kv, "v": kv}

    @property
    def output(self) -> tuple[int, ...]:
        return self.inputs["q"]

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return ops.attention(*tensors, causal=self.causal, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.scaled_dot_product_attention at the tensors' dtype, its mask aligned bottom right where lengths differ."""
        if tensors[0].numel() == 0:  # which some of its kernels return None for
            return tensors[0] + 0 * (tensors[1].sum() + tensors[2].sum())
        q, k, v = (t.transpose(1, 2) for t in tensors)
        mask = None
        if self.causal and self.n_queries != self.n_keys:
            visible = torch.ones(self.n_queries, self.n_keys, dtype=torch.bool, device=q.device)
            mask = visible.tril(self.n_keys - self.n_queries)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, enable_gqa=self.heads != self.kv_heads
        )
        if (
            mask is not None
        ):  # a query that sees no key: zeros by definition, NaN or an average by some of SDPA's kernels
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
