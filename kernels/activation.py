"""GELU (https://arxiv.org/abs/1606.08415), alone and with the bias before it, and the gated pairs SwiGLU and GEGLU
(https://arxiv.org/abs/2002.05202): act(x + bias) or act(gate) * up, forward and backward, one pass each.

Element by element over tiles of rows, in float32. The bias's gradient is one float32 partial per column of tiles and
group of rows, added up in a fixed order, so that it is bitwise repeatable. Not supported: float64.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import (
    LOG2E,
    await_previous,
    cdiv,
    exponential,
    launches_early,
    multiprocessors,
    new_like,
    next_power_of_2,
    rows_apart,
)
from ._launch import Variant
from ._sums import sum_partials

MAX_BLOCK = 1024  # columns of a tile
# Elements of it, for 4 warps: 32 a thread are four 16-byte vectors of 16-bit values. Pairs take half as many of each,
# and where a program walks tiles to sum the bias's gradient, smaller ones leave registers to more programs.
TILE, GATED_TILE, SUMMED_TILE = 4096, 2048, 1024


@triton.jit
def _sigmoid(x, EXACT: tl.constexpr):
    """(s, s (1 - s)), s the sigmoid of x. EXACT: from e^-|x|, which cannot overflow, and without a difference from 1,
    whose error of 6e-8 is nothing to 16 bits."""
    if EXACT:
        e = exponential(-tl.abs(x), EXACT)
        larger = tl.div_rn(1.0, 1.0 + e)
        smaller = e * larger
        return tl.where(x >= 0, larger, smaller), larger * smaller
    s = _logistic(x * LOG2E)
    return s, s * (1.0 - s)


@triton.jit
def _logistic(x):
    """1 / (1 + 2^-x) for 16-bit results, by the square of a root: a division takes ten instructions."""
    root = tl.rsqrt(1.0 + tl.exp2(-x))
    return root * root


@triton.jit
def _normal_cdf(x):
    """Phi(x) for 16-bit results, as the sigmoid of an odd polynomial fitted (minimax on |x| < 5.7) to its logit.

    Its relative error of 1e-4 is below their rounding also where Phi is small; an erf as good in absolute error is not.
    """
    t = tl.minimum(x * x, 32.49)
    p = -2.32770811e-11 * t + 3.26981285e-9
    p = p * t - 1.88905157e-7
    p = p * t + 5.65033331e-6
    p = p * t - 8.22297903e-5
    p = p * t - 2.28392837e-4
    p = p * t + 7.30593101e-2
    p = p * t + 1.59550194
    return _logistic(x * p * LOG2E)


@triton.jit
def activation_and_slope(x, KIND: tl.constexpr, EXACT: tl.constexpr):
    """(act(x), act'(x)); KIND: "erf" and "tanh" of GELU, "silu"."""
    if KIND == "erf":
        if EXACT:
            phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        else:
            phi = _normal_cdf(x)
        density = 0.3989422804014327 * exponential(-0.5 * x * x, EXACT)
        return x * phi, phi + x * density
    if KIND == "tanh":  # (1 + tanh(z / 2)) / 2 is the sigmoid of z = sqrt(8 / pi) (x + 0.044715 x^3)
        if EXACT:
            s, slope = _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x), EXACT)
            slope = tl.where(slope == 0.0, 0.0, slope * 1.5957691216057308 * (1.0 + 0.134145 * x * x))  # no 0 times inf
            return x * s, s + x * slope
        t = tl.minimum(x * x, 1e6)  # past |x| = 1000 the sigmoid is 0 or 1, and its slope 0 is not to meet an infinity
        s = _logistic(x * (2.3022081985 + 0.1029432397 * t))  # z log2 e
        y = x * s
        return y, s + y * (1.0 - s) * (1.5957691216057308 + 0.21406444881780076 * t)
    s, slope = _sigmoid(x, EXACT)
    return x * s, s + x * slope


@triton.jit
def _activation_fwd_kernel(
    X, Bias, Up, Y, x_stride, up_stride, n_rows, n_cols,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """X, Up: (n_rows, n_cols) with row strides; Bias: (n_cols,); Y: as X, contiguous. A tile per program, those of a
    row one after another: neighbours in time are neighbours in memory."""
    await_previous(EARLY)
    columns = tl.cdiv(n_cols, BLOCK)
    row = (tl.program_id(0) // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (row < n_rows) & (col < n_cols)
    EXACT: tl.constexpr = Y.dtype.element_ty == tl.float32
    x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(Bias + col, mask=col < n_cols, other=0.0).to(tl.float32)
    y, _ = activation_and_slope(x, KIND, EXACT)
    if GATED:
        y *= tl.load(Up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * n_cols + col, y.to(Y.dtype.element_ty), mask=inside)


@triton.jit
def _activation_bwd_kernel(
    DY, X, Bias, Up, DX, DUp, Y, Partial, dy_stride, x_stride, up_stride, dx_stride, n_rows, n_cols,
    KIND: tl.constexpr, HAS_BIAS: tl.constexpr, GATED: tl.constexpr, RESULT: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = dy * up * act'(x + bias), dup = dy * act(x + bias), and sums of dx over the tiles that a program walks.

    DY, X, Up: (n_rows, n_cols) with row strides, of DX and DUp the same; Y: with RESULT, gets what the forward pass
    gave, contiguous, and may be DY; Partial: (walkers, n_cols) fp32.
    """
    columns = tl.cdiv(n_cols, BLOCK)
    # Of n_rows' type: that is int64 where rows number 2^31 or more, while elsewhere it would cost registers.
    zero = 0 * n_rows
    walker, walkers = tl.program_id(0) // columns + zero, tl.num_programs(0) // columns + zero
    column = tl.program_id(0) % columns * BLOCK + tl.arange(0, BLOCK)
    col = column[None, :]
    EXACT: tl.constexpr = DX.dtype.element_ty == tl.float32
    bias = tl.zeros([1, BLOCK], tl.float32)
    if HAS_BIAS:
        bias = tl.load(Bias + col, mask=col < n_cols, other=0.0).to(tl.float32)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in tl.range(walker * ROWS, n_rows, walkers * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS)[:, None].to(tl.int64)
        inside = (row < n_rows) & (col < n_cols)
        dy = tl.load(DY + row * dy_stride + col, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(X + row * x_stride + col, mask=inside, other=0.0).to(tl.float32) + bias
        y, slope = activation_and_slope(x, KIND, EXACT)
        if GATED:
            up = tl.load(Up + row * up_stride + col, mask=inside, other=0.0).to(tl.float32)
            tl.store(DUp + row * dx_stride + col, (dy * y).to(DX.dtype.element_ty), mask=inside)
            dy *= up
            y *= up
        if RESULT:
            tl.store(Y + row * n_cols + col, y.to(DX.dtype.element_ty), mask=inside)
        dx = dy * slope
        tl.store(DX + row * dx_stride + col, dx.to(DX.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            total += tl.where(inside, dx, 0.0)
    if HAS_BIAS:
        tl.store(Partial + walker.to(tl.int64) * n_cols + column, tl.sum(total, 0), mask=column < n_cols)


def _tile(n_cols: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile."""
    block = min(MAX_BLOCK, max(16, next_power_of_2(n_cols)))
    return max(1, elements // block), block


@functools.lru_cache(maxsize=1024)
def _forward_variant(n_cols: int, kind: str, has_bias: bool, gated: bool, early: bool) -> tuple[int, int, Variant]:
    """Rows of a tile, tiles of a row of `n_cols` elements, and the kernel that takes a tile a program."""
    rows, block = _tile(n_cols, GATED_TILE if gated else TILE)
    flags = {"KIND": kind, "HAS_BIAS": has_bias, "GATED": gated, "EARLY": early}
    return rows, cdiv(n_cols, block), Variant(_activation_fwd_kernel, **flags, ROWS=rows, BLOCK=block, num_warps=4)


@functools.lru_cache(maxsize=1024)
def _backward_variant(n_cols: int, kind: str, has_bias: bool, gated: bool, result: bool) -> tuple[int, int, Variant]:
    """The same for the kernel that walks tiles down the rows."""
    rows, block = _tile(n_cols, SUMMED_TILE if has_bias else GATED_TILE if gated else TILE)
    flags = {"KIND": kind, "HAS_BIAS": has_bias, "GATED": gated, "RESULT": result}
    return rows, cdiv(n_cols, block), Variant(_activation_bwd_kernel, **flags, ROWS=rows, BLOCK=block, num_warps=4)


def _forward(x: Tensor, bias: Tensor | None, up: Tensor | None, kind: str) -> Tensor:
    y = new_like(x)
    if y.numel() == 0:
        return y
    rows, apart = rows_apart(x)
    up_rows, up_apart = (rows, apart) if up is None else rows_apart(up)
    n_cols = x.shape[-1] if x.dim() else 1
    n_rows = x.numel() // n_cols
    per_tile, columns, kernel = _forward_variant(
        n_cols, kind, bias is not None, up is not None, launches_early(x.device)
    )
    tensors = rows, rows if bias is None else bias.contiguous(), up_rows, y
    kernel.launch((cdiv(n_rows, per_tile) * columns,), *tensors, apart, up_apart, n_rows, n_cols)
    return y


def _backward(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, kind: str, result: Tensor | None = None,
    halves: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """-> dx and, where there are, dup and dbias (float32). `result`, contiguous and perhaps dy, gets what the forward
    pass gave. dx and dup are those of `halves`, (..., 2 N), contiguous."""
    dx, dup = (new_like(x), None if up is None else new_like(x)) if halves is None else halves.chunk(2, -1)
    if dx.numel() == 0:
        return dx, dup, None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=x.device)
    (dy_rows, dy_apart), (rows, apart) = rows_apart(dy), rows_apart(x)
    up_rows, up_apart = (rows, apart) if up is None else rows_apart(up)
    n_cols = x.shape[-1] if x.dim() else 1
    n_rows = x.numel() // n_cols
    per_tile, columns, kernel = _backward_variant(n_cols, kind, bias is not None, up is not None, result is not None)
    walkers = cdiv(n_rows, per_tile)
    if bias is not None:  # each walker leaves a partial: as many as keep the device busy
        walkers = min(walkers, max(1, 8 * multiprocessors(x.device) // columns))
    partial = None if bias is None else torch.empty((walkers, n_cols), dtype=torch.float32, device=x.device)
    kernel.launch(
        (walkers * columns,),
        dy_rows, rows, rows if bias is None else bias.contiguous(), up_rows, dx, dx if dup is None else dup,
        dx if result is None else result, dx if partial is None else partial,
        dy_apart, apart, up_apart, n_cols if halves is None else 2 * n_cols, n_rows, n_cols,
    )  # fmt: skip
    if partial is None:
        return dx, dup, None
    dbias = torch.empty((n_cols,), dtype=torch.float32, device=x.device)
    sum_partials(partial[None], [dbias])
    return dx, dup, dbias


def _kind(approximate: str) -> str:
    return "erf" if approximate == "none" else "tanh"


def gelu_fwd(x: Tensor, approximate: str) -> Tensor:
    """x of any shape -> gelu(x), contiguous."""
    return _forward(x, None, None, _kind(approximate))


def gelu_bwd(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """-> dx as x."""
    return _backward(dy, x, None, None, _kind(approximate))[0]


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """x: (..., N); bias: (N,) or None -> gelu(x + bias), contiguous."""
    return _forward(x, bias, None, _kind(approximate))


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor | None]:
    """-> dx as x; dbias (N,) float32 or None."""
    dx, _, db = _backward(dy, x, bias, None, _kind(approximate))
    return dx, db


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: (..., N) -> silu(gate) * up, contiguous."""
    return _forward(gate, None, up, "silu")


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor | None]:
    """-> dgate, dup, contiguous."""
    return _backward(dy, gate, None, up, "silu")[:2]


def geglu_fwd(gate: Tensor, up: Tensor, approximate: str) -> Tensor:
    """gate, up: (..., N) -> gelu(gate) * up, contiguous."""
    return _forward(gate, None, up, _kind(approximate))


def geglu_bwd(dy: Tensor, gate: Tensor, up: Tensor, approximate: str) -> tuple[Tensor, Tensor | None]:
    """-> dgate, dup, contiguous."""
    return _backward(dy, gate, None, up, _kind(approximate))[:2]


def activation_fwd(x: Tensor, bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    """x, up: (..., N); bias: (N,) -> act(x + bias) * up, contiguous; activation: "silu", "gelu" or "gelu_tanh"."""
    return _forward(x, bias, up, KINDS[activation])


def activation_bwd_with_result(
    dy: Tensor, x: Tensor, bias: Tensor | None, up: Tensor | None, activation: str, halves: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> dx, dup, contiguous or those of `halves` (..., 2 N), which is contiguous, and dbias (N,) float32. dy, which
    must be contiguous, becomes act(x + bias) * up."""
    return _backward(dy, x, bias, up, KINDS[activation], result=dy, halves=halves)


KINDS = {"silu": "silu", "gelu": "erf", "gelu_tanh": "tanh"}
