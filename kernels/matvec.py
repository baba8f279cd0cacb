"""One vector through a linear layer, weight @ x + bias, bound by reading the weight once.

A program takes a few rows of the weight, whole. Sums are float32. Nothing of the weight is read, nor brought into L2,
while the kernel before still runs: it could be what writes it, and bringing it ahead made decoding slower (H200). Not
supported: float64, weights whose rows have other strides than 1.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import await_previous, cdiv, launches_early, next_power_of_2
from ._launch import Variant

ROWS = 4
BLOCK_BYTES = 4096  # of a row at a time


@triton.jit
def _matvec_kernel(
    X, W, Bias, Y, w_stride, n_out, n_in,
    HAS_BIAS: tl.constexpr, EARLY: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """X: (n_in,); W: (n_out, n_in) with a row stride; Bias, Y: (n_out,)."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < n_out
    W += row.to(tl.int64) * w_stride
    await_previous(EARLY)
    lane = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n_in, BLOCK):
        col = start + lane
        w = tl.load(W + col, mask=inside & (col < n_in), other=0.0).to(tl.float32)
        total += w * tl.load(X + col, mask=col < n_in, other=0.0).to(tl.float32)
    y = tl.sum(total, 1)[:, None]
    if HAS_BIAS:
        y += tl.load(Bias + row, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row, y.to(Y.dtype.element_ty), mask=inside)


@functools.lru_cache(maxsize=1024)
def _variant(n_in: int, element_size: int, has_bias: bool, early: bool) -> Variant:
    block = max(16, min(BLOCK_BYTES // element_size, next_power_of_2(n_in)))
    flags = {"HAS_BIAS": has_bias, "EARLY": early}
    return Variant(_matvec_kernel, **flags, ROWS=ROWS, BLOCK=block, num_warps=4)


def is_one_vector(x: Tensor, weight: Tensor) -> bool:
    """Whether `matvec` takes a layer's arguments x and weight, (M, N)."""
    return 0 < x.numel() == weight.shape[1] and weight.shape[0] > 0 and weight.stride(1) == x.stride(-1) == 1


def matvec(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x: (..., N), all of whose other dimensions are 1; weight: (M, N); bias: (M,) -> (..., M)."""
    n_out, n_in = weight.shape
    y = torch.empty((*x.shape[:-1], n_out), dtype=x.dtype, device=x.device)
    variant = _variant(n_in, x.element_size(), bias is not None, launches_early(x.device))
    bias = x if bias is None else bias.contiguous()  # any tensor will do where there is none
    variant.launch((cdiv(n_out, ROWS),), x, weight, bias, y, weight.stride(0), n_out, n_in)
    return y
