"""The table of cases: shapes of each op, their inputs, PyTorch's own function, and the work each must do.

Tests walk `TEST_CASES`, benchmarks `BENCHMARK_CASES`; both compare with `llmfast.ops.reference` in float64.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


class Work(NamedTuple):
    """The fewest bytes that must move through device memory, and the floating-point operations of the definition."""

    bytes: float
    flops: float


@dataclass(frozen=True)
class RowCase:
    """`op` over (rows, cols)."""

    op: str
    rows: int
    cols: int

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.cols}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the op's tensors, in order."""
        shapes: dict[str, tuple[int, ...]] = {"x": (self.rows, self.cols)}
        if self.op == "layer_norm":
            shapes |= {"weight": (self.cols,), "bias": (self.cols,)}
        return shapes

    @property
    def amplification(self) -> float:
        """How far the op can magnify a rounding error of its input: 1/sqrt(eps) for a constant row's normalisation."""
        return 1e-5**-0.5 if self.op == "layer_norm" else 1.0

    def looseness(self, result: Tensor) -> float:
        """How many times PyTorch's error is allowed."""
        return 2.0

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return getattr(ops, self.op)(*tensors, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """PyTorch's own function at the tensors' dtype."""
        if self.op == "softmax":
            return F.softmax(tensors[0], dim=-1)
        x, weight, bias = tensors
        return F.layer_norm(x, x.shape[-1:], weight, bias)

    def probe(self, t: Tensor) -> Tensor:
        """The part of a tensor that is compared: all of it."""
        return t

    def work(self, direction: str, itemsize: int) -> Work:
        passes = 2 if direction == "fwd" else 3
        return Work(float(passes * self.rows * self.cols * itemsize), 0.0)


@dataclass(frozen=True)
class AttentionCase:
    """Attention of (batch, n_queries, heads, head_dim) over (batch, n_keys, kv_heads, head_dim)."""

    batch: int
    n_queries: int
    n_keys: int
    heads: int
    kv_heads: int
    head_dim: int
    causal: bool
    op: str = "attention"
    amplification: float = 1.0

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


Case = RowCase | AttentionCase


def make_inputs(
    case: Case, device: str | torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Normal tensors of the case's shapes and standard deviation `scale`, each needing a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        (scale * torch.randn(shape, device=device, generator=generator)).to(dtype).requires_grad_()
        for shape in case.inputs.values()
    ]


def _rows(op: str, *shapes: tuple[int, int]) -> list[Case]:
    return [RowCase(op, *shape) for shape in shapes]


# Ragged, prime, one below and above a power of two, length one, empty; the last column counts take the long-row path.
_ROW_SHAPES = [
    (1, 1),
    (3, 1),
    (4, 7),
    (33, 64),
    (5, 127),
    (2, 1023),
    (3, 1025),
    (17, 768),
    (0, 16),
    (2, 9001),
    (2, 33000),
]

# (B, Tq, Tk, H, Hkv, D): lengths around the tile sizes, one query, one key, no query, no key, more queries than keys
# (causal rows that see nothing), grouped and single key heads, head dimensions that are no power of two.
_ATTENTION_SHAPES = [
    (1, 1, 1, 1, 1, 16),
    (2, 3, 3, 2, 2, 64),
    (1, 64, 1, 1, 1, 64),
    (1, 1, 70, 4, 2, 64),
    (1, 64, 32, 2, 1, 32),
    (2, 65, 127, 2, 2, 64),
    (1, 113, 203, 4, 1, 64),
    (1, 128, 128, 2, 2, 128),
    (1, 129, 65, 6, 3, 40),
    (1, 90, 90, 3, 1, 96),
    (1, 33, 50, 2, 2, 256),
    (2, 40, 17, 2, 2, 8),
    (0, 8, 8, 2, 2, 64),
    (1, 0, 8, 2, 2, 64),
    (2, 5, 0, 2, 1, 64),
]

TEST_CASES: dict[str, list[Case]] = {
    "softmax": _rows("softmax", *_ROW_SHAPES),
    "layer_norm": _rows("layer_norm", *_ROW_SHAPES),
    "attention": [AttentionCase(*shape, causal) for shape in _ATTENTION_SHAPES for causal in (False, True)],
}


def _attention_benchmark() -> list[Case]:
    """16k tokens a batch and hidden size 2048, as FlashAttention's papers measure."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    return [
        AttentionCase(16384 // t, t, t, 2048 // d, 2048 // d, d, causal)
        for d in (64, 128)
        for causal in (False, True)
        for t in lengths
    ]


BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows("softmax", (32768, 1024), (32768, 4096), (16384, 8192), (8192, 32768), (8192, 50304)),
    "layer_norm": _rows("layer_norm", (32768, 768), (32768, 2048), (32768, 4096), (32768, 8192), (8192, 32768)),
    "attention": _attention_benchmark(),
}

# What a machine without a GPU runs instead.
CPU_BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows("softmax", (1024, 768), (256, 50304)),
    "layer_norm": _rows("layer_norm", (4096, 768), (1024, 4096)),
    "attention": [AttentionCase(1, 512, 512, 8, 8, 64, c) for c in (False, True)],
}
