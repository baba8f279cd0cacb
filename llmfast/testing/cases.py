"""The table of cases: shapes of each op, their inputs, PyTorch's own function, and the work each must do.

Tests walk `TEST_CASES`, benchmarks `BENCHMARK_CASES`; both compare with `llmfast.ops.reference` in float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops


class Work(NamedTuple):
    """The fewest bytes that must move through device memory, and the floating-point operations of the definition."""

    bytes: float
    flops: float


class _Defaults:
    """What a case is unless its own class says otherwise."""

    @property
    def amplification(self) -> float:
        """How far the op can magnify a rounding error of its input."""
        return 1.0

    def looseness(self, result: Tensor) -> float:
        """How many times PyTorch's error is allowed."""
        return 2.0

    def probe(self, t: Tensor) -> Tensor:
        """The part of a tensor that is compared: all of it."""
        return t


def _torch_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As models without a kernel write it: rotate half, at the tensors' dtype."""
    cos, sin = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


# PyTorch's own function of each op over rows, at the tensors' dtype.
_TORCH: dict[str, Callable[..., Tensor]] = {
    "softmax": lambda x: F.softmax(x, dim=-1),
    "layer_norm": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    "rms_norm": lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, 1e-6),
    "gelu": F.gelu,
    "bias_gelu": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
    "swiglu": lambda gate, up: F.silu(gate) * up,
}
# Names of each op's tensors, and whether each is a row vector.
_ROW_INPUTS: dict[str, dict[str, bool]] = {
    "softmax": {"x": False},
    "layer_norm": {"x": False, "weight": True, "bias": True},
    "rms_norm": {"x": False, "weight": True},
    "gelu": {"x": False},
    "bias_gelu": {"x": False, "bias": True},
    "swiglu": {"gate": False, "up": False},
}
_ROW_OPTIONS: dict[str, dict[str, Any]] = {"bias_gelu": {"approximate": "tanh"}}
# Tensors of (rows, cols) that must be read or written, forward and backward.
_ROW_PASSES: dict[str, tuple[int, int]] = {"swiglu": (3, 5)}
_EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6}


@dataclass(frozen=True)
class RowCase(_Defaults):
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
        shape = (self.rows, self.cols)
        return {name: shape[1:] if vector else shape for name, vector in _ROW_INPUTS[self.op].items()}

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.cols

    @property
    def amplification(self) -> float:
        """1/sqrt(eps), for the normalisation of a constant row."""
        return _EPS[self.op] ** -0.5 if self.op in _EPS else 1.0

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        return getattr(ops, self.op)(*tensors, **_ROW_OPTIONS.get(self.op, {}), backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """PyTorch's own function at the tensors' dtype."""
        return _TORCH[self.op](*tensors)

    def work(self, direction: str, itemsize: int) -> Work:
        passes = _ROW_PASSES.get(self.op, (2, 3))[direction == "bwd"]
        return Work(float(passes * self.rows * self.cols * itemsize), 0.0)


@dataclass(frozen=True)
class CrossEntropyCase(_Defaults):
    """Mean cross-entropy of (rows, classes) logits; every fifth target is left out."""

    rows: int
    classes: int
    op: str = "cross_entropy"
    output: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        return f"{self.rows}x{self.classes}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"logits": (self.rows, self.classes)}

    def targets(self, device: torch.device) -> Tensor:
        row = torch.arange(self.rows, device=device)
        return torch.where(row % 5 == 4, -100, row * 7919 % self.classes)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        (logits,) = tensors
        return ops.cross_entropy(logits, self.targets(logits.device), backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.cross_entropy at the tensors' dtype, its result widened to ours; 0 where it would be 0 / 0."""
        targets = self.targets(tensors[0].device)
        if self.rows == 0:
            return (0 * tensors[0].sum()).to(torch.promote_types(tensors[0].dtype, torch.float32))
        loss = F.cross_entropy(tensors[0], targets)
        return loss.to(torch.promote_types(loss.dtype, torch.float32))

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float((1 if direction == "fwd" else 2) * self.rows * self.classes * itemsize), 0.0)


@dataclass(frozen=True)
class RopeCase(_Defaults):
    """Rotary embedding of (batch, length, heads, head_dim)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    op: str = "rope"

    @property
    def label(self) -> str:
        return f"B{self.batch} T{self.length} H{self.heads} D{self.head_dim}"

    @property
    def output(self) -> tuple[int, ...]:
        return self.batch, self.length, self.heads, self.head_dim

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"x": self.output}

    def tables(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 as a model keeps them (float64 for the truth, of the same values)."""
        angles = torch.outer(torch.arange(self.length), 10000.0 ** -torch.linspace(0, 1, self.head_dim // 2))
        dtype = torch.promote_types(like.dtype, torch.float32)
        return angles.cos().to(like.device, dtype), angles.sin().to(like.device, dtype)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        (x,) = tensors
        return ops.rope(x, *self.tables(x), backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return _torch_rope(x, *self.tables(x))

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float(2 * math.prod(self.output) * itemsize), 0.0)


@dataclass(frozen=True)
class AttentionCase(_Defaults):
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


Case = RowCase | CrossEntropyCase | RopeCase | AttentionCase


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

_ROPE_SHAPES = [(1, 1, 1, 2), (2, 7, 3, 6), (1, 33, 2, 64), (3, 5, 1, 128), (0, 4, 2, 8), (2, 0, 2, 8)]

TEST_CASES: dict[str, list[Case]] = {
    **{op: _rows(op, *_ROW_SHAPES) for op in _ROW_INPUTS},
    "cross_entropy": [CrossEntropyCase(*shape) for shape in _ROW_SHAPES],
    "rope": [RopeCase(*shape) for shape in _ROPE_SHAPES],
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


_NORM_SHAPES = ((32768, 768), (32768, 2048), (32768, 4096), (32768, 8192), (8192, 32768))
_VERY_LONG_ROWS = ((4096, 65536), (2048, 131072))

BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows(
        "softmax", (32768, 1024), (32768, 4096), (16384, 8192), (8192, 32768), (8192, 50304), *_VERY_LONG_ROWS
    ),
    "layer_norm": _rows("layer_norm", *_NORM_SHAPES, *_VERY_LONG_ROWS),
    "rms_norm": _rows("rms_norm", *_NORM_SHAPES, *_VERY_LONG_ROWS),
    "gelu": _rows("gelu", (32768, 3072)),
    "bias_gelu": _rows("bias_gelu", (32768, 3072), (16384, 8192)),
    "swiglu": _rows("swiglu", (32768, 3072), (16384, 8192)),
    "cross_entropy": [CrossEntropyCase(32768, 4096), CrossEntropyCase(16384, 50304), CrossEntropyCase(4096, 131072)],
    "rope": [RopeCase(16, 1024, 12, 64), RopeCase(4, 4096, 16, 128)],
    "attention": _attention_benchmark(),
}

# What a machine without a GPU runs instead.
_CPU_SHAPES = ((4096, 768), (1024, 4096))
CPU_BENCHMARK_CASES: dict[str, list[Case]] = {
    "softmax": _rows("softmax", (1024, 768), (256, 50304)),
    **{op: _rows(op, *_CPU_SHAPES) for op in _ROW_INPUTS if op != "softmax"},
    "cross_entropy": [CrossEntropyCase(4096, 768), CrossEntropyCase(1024, 4096), CrossEntropyCase(256, 50304)],
    "rope": [RopeCase(4, 512, 12, 64)],
    "attention": [
        *(AttentionCase(1, 1024, 1024, 12, 12, 64, c) for c in (False, True)),
        AttentionCase(8, 128, 128, 3, 3, 64, True),
    ],
}
