"""A case of each op: shapes of its inputs, our function and PyTorch's own, and the work that it must do.

`tables` lists those that tests and benchmarks walk; both compare with `llmfast.ops.reference` in float64.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

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

    joint = False
    """Whether backward is timed together with forward, which does part of its work."""

    def looseness(self, result: Tensor) -> float:
        """How many times PyTorch's error is allowed."""
        return 2.0

    def probe(self, t: Tensor) -> Tensor:
        """The part of a tensor that is compared: all of it."""
        return t

    @property
    def plain(self) -> bool:
        """Whether it asks for nothing but what every backend of the op does."""
        return True


def _torch_rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """As models without a kernel write it, at the tensors' dtype."""
    if interleaved:
        cos, sin = (t.repeat_interleave(2, -1)[:, None].to(x.dtype) for t in (cos, sin))
        return x * cos + torch.stack((-x[..., 1::2], x[..., 0::2]), -1).flatten(-2) * sin
    cos, sin = (torch.cat((t, t), -1)[:, None].to(x.dtype) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat((-second, first), -1) * sin


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def _torch_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight, 1e-6)


def _with_input(norm: Callable[..., Tensor], total: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    return norm(total, *parameters), total


# One tensor, or those of an op with several.
Result = Tensor | tuple[Tensor, ...]

# PyTorch's own function of each op over rows, at the tensors' dtype.
_TORCH: dict[str, Callable[..., Result]] = {
    "softmax": lambda x: F.softmax(x, dim=-1),
    "layer_norm": _torch_layer_norm,
    "rms_norm": _torch_rms_norm,
    "add_layer_norm": lambda x, residual, *parameters: _with_input(_torch_layer_norm, x + residual, *parameters),
    "add_rms_norm": lambda x, residual, *parameters: _with_input(_torch_rms_norm, x + residual, *parameters),
    "gelu": F.gelu,
    "bias_gelu": lambda x, bias: F.gelu(x + bias, approximate="tanh"),
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
}
# Names of each op's tensors, and whether each is a row vector.
ROW_INPUTS: dict[str, dict[str, bool]] = {
    "softmax": {"x": False},
    "layer_norm": {"x": False, "weight": True, "bias": True},
    "rms_norm": {"x": False, "weight": True},
    "add_layer_norm": {"x": False, "residual": False, "weight": True, "bias": True},
    "add_rms_norm": {"x": False, "residual": False, "weight": True},
    "gelu": {"x": False},
    "bias_gelu": {"x": False, "bias": True},
    "swiglu": {"gate": False, "up": False},
    "geglu": {"gate": False, "up": False},
}
_ROW_OPTIONS: dict[str, dict[str, Any]] = {"bias_gelu": {"approximate": "tanh"}}
# Tensors of (rows, cols) that must be read or written, forward and backward.
_ROW_PASSES: dict[str, tuple[int, int]] = {
    "add_layer_norm": (4, 4),
    "add_rms_norm": (4, 4),
    "swiglu": (3, 5),
    "geglu": (3, 5),
}
_EPS = {"layer_norm": 1e-5, "rms_norm": 1e-6, "add_layer_norm": 1e-5, "add_rms_norm": 1e-6}


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
        return {name: shape[1:] if vector else shape for name, vector in ROW_INPUTS[self.op].items()}

    @property
    def output(self) -> tuple[int, ...]:
        return self.rows, self.cols

    @property
    def amplification(self) -> float:
        """1/sqrt(eps), for the normalisation of a constant row."""
        return _EPS[self.op] ** -0.5 if self.op in _EPS else 1.0

    def ours(self, *tensors: Tensor, backend: str) -> Result:
        return getattr(ops, self.op)(*tensors, **_ROW_OPTIONS.get(self.op, {}), backend=backend)

    def torch(self, *tensors: Tensor) -> Result:
        """PyTorch's own function at the tensors' dtype."""
        return _TORCH[self.op](*tensors)

    def work(self, direction: str, itemsize: int) -> Work:
        passes = _ROW_PASSES.get(self.op, (2, 3))[direction == "bwd"]
        return Work(float(passes * self.rows * self.cols * itemsize), 0.0)


@dataclass(frozen=True)
class CrossEntropyCase(_Defaults):
    """Cross-entropy of (rows, classes) logits; every fifth target is left out."""

    rows: int
    classes: int
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    reduction: Literal["mean", "sum", "none"] = "mean"
    padding: int = 0
    """Columns at the end that are no classes."""
    in_place: bool = False
    op: str = "cross_entropy"

    @property
    def label(self) -> str:
        label = f"{self.rows}x{self.classes}"
        if self.reduction != "mean":
            label += f" {self.reduction}"
        for name in ("label_smoothing", "z_loss", "padding"):
            if getattr(self, name):
                label += f" {name} {getattr(self, name)}"
        return label + " in place" * self.in_place

    @property
    def plain(self) -> bool:
        return self == CrossEntropyCase(self.rows, self.classes)

    @property
    def output(self) -> tuple[int, ...]:
        return (self.rows,) if self.reduction == "none" else ()

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        return {"logits": (self.rows, self.classes)}

    def targets(self, device: torch.device) -> Tensor:
        row = torch.arange(self.rows, device=device)
        return torch.where(row % 5 == 4, -100, row * 7919 % (self.classes - self.padding))

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        logits = tensors[0].clone() if self.in_place else tensors[0]  # the inputs outlive it
        return ops.cross_entropy(
            logits,
            self.targets(logits.device),
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            reduction=self.reduction,
            n_classes=self.classes - self.padding,
            in_place=self.in_place,
            backend=backend,
        )

    def torch(self, *tensors: Tensor) -> Tensor:
        """F.cross_entropy at the tensors' dtype, its result widened to ours; 0 where it would be 0 / 0."""
        logits = tensors[0][:, : self.classes - self.padding]
        targets = self.targets(logits.device)
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.rows == 0:
            empty = 0 * tensors[0].sum(-1)
            return (empty if self.reduction == "none" else empty.sum()).to(wide)
        loss = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing, reduction=self.reduction)
        if self.z_loss:
            counted = targets != -100
            squares = logits.logsumexp(-1).square() * counted
            if self.reduction != "none":
                squares = squares.sum() / (counted.sum() if self.reduction == "mean" else 1)
            loss = loss + self.z_loss * squares
        return loss.to(wide)

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float((1 if direction == "fwd" else 2) * self.rows * self.classes * itemsize), 0.0)


@dataclass(frozen=True)
class LinearCrossEntropyCase(_Defaults):
    """Cross-entropy of (rows, depth) @ (classes, depth)^T."""

    rows: int
    depth: int
    classes: int
    bias: bool = False
    reduction: Literal["mean", "sum"] = "mean"
    op: str = "linear_cross_entropy"
    output: tuple[int, ...] = ()
    joint = True

    @property
    def label(self) -> str:
        label = f"{self.rows}x{self.depth}x{self.classes}" + " bias" * self.bias
        return label if self.reduction == "mean" else f"{label} {self.reduction}"

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        shapes = {"x": (self.rows, self.depth), "weight": (self.classes, self.depth)}
        return shapes | ({"bias": (self.classes,)} if self.bias else {})

    def targets(self, device: torch.device) -> Tensor:
        return CrossEntropyCase(self.rows, self.classes).targets(device)

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        x, weight, *bias = tensors
        return ops.linear_cross_entropy(
            x, weight, self.targets(x.device), *bias, reduction=self.reduction, backend=backend
        )

    def torch(self, *tensors: Tensor) -> Tensor:
        """The logits at the tensors' dtype, and their loss in float32, as models have it."""
        loss = CrossEntropyCase(self.rows, self.classes, reduction=self.reduction)
        return loss.torch(F.linear(*tensors).to(torch.promote_types(tensors[0].dtype, torch.float32)))

    def work(self, direction: str, itemsize: int) -> Work:
        """Matrix products: one for the loss, three for it and the gradients."""
        flops = 2.0 * self.rows * self.depth * self.classes * (1 if direction == "fwd" else 3)
        return Work(0.0, flops)


@functools.cache  # a model makes its tables once
def _rope_tables(length: int, half: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.outer(torch.arange(length), 10000.0 ** -torch.linspace(0, 1, half))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


@dataclass(frozen=True)
class RopeCase(_Defaults):
    """Rotary embedding of (batch, length, heads, head_dim)."""

    batch: int
    length: int
    heads: int
    head_dim: int
    interleaved: bool = False
    op: str = "rope"

    @property
    def label(self) -> str:
        label = f"B{self.batch} T{self.length} H{self.heads} D{self.head_dim}"
        return label + " interleaved" * self.interleaved

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
        return _rope_tables(
            self.length, self.head_dim // 2, like.device, torch.promote_types(like.dtype, torch.float32)
        )

    def ours(self, *tensors: Tensor, backend: str) -> Tensor:
        (x,) = tensors
        return ops.rope(x, *self.tables(x), interleaved=self.interleaved, backend=backend)

    def torch(self, *tensors: Tensor) -> Tensor:
        (x,) = tensors
        return _torch_rope(x, *self.tables(x), self.interleaved)

    def work(self, direction: str, itemsize: int) -> Work:
        return Work(float(2 * math.prod(self.output) * itemsize), 0.0)


@dataclass(frozen=True)
class EmbeddingCase(_Defaults):
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


Case = RowCase | CrossEntropyCase | LinearCrossEntropyCase | RopeCase | EmbeddingCase | AttentionCase


def make_inputs(
    case: Case, device: str | torch.device, dtype: torch.dtype, seed: int = 0, scale: float = 1.0
) -> list[Tensor]:
    """Normal tensors of the case's shapes and standard deviation `scale`, each needing a gradient."""
    generator = torch.Generator(device).manual_seed(seed)
    return [
        (scale * torch.randn(shape, device=device, generator=generator)).to(dtype).requires_grad_()
        for shape in case.inputs.values()
    ]
