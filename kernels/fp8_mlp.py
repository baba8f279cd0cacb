"""An MLP, F.linear(act(h), down) of h = F.linear(x, up), whose six matrix products are of 8-bit floats
(https://arxiv.org/abs/2209.05433). Gated, h is two halves and act(first) * second goes down.

As two layers of fp8_linear with the activation between, but what the activation gives, and the gradient of h, exist in
8 bits alone: each is rounded, and turned, by the kernel that makes it. For the first its largest magnitude is found in
a pass before, which reads h; turned, it is made again in the backward pass. That of h's gradient is bounded instead, by
what is known of the gradient that comes in and of `down`: e5m2 has 32 powers of two, of which the bound wastes some
ten.

Supported: any number of rows; widths that are multiples of 16; compute capability 8.9 on. Not supported: float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, cdiv, multiprocessors, next_power_of_2
from ._fp8 import (
    E4M3,
    E5M2,
    EXPONENTS,
    TILE,
    Rounded,
    fitting_scale,
    lacking,
    n_tiles,
    new_rounded,
    product,
    rounded,
    store_rounded,
    tile_place,
    up_to_16,
)
from ._launch import launch
from ._sums import column_sums_and_maxima, sum_partials
from .activation import KINDS, activation_and_slope

MAXIMA_TILE = {"ROWS": 16, "COLS": 256, "num_warps": 8}
PROGRAMS = 4  # on a multiprocessor


@triton.jit
def _activation_maxima_kernel(
    H, Maxima, h_stride, n_rows, n_cols,
    KIND: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """H: (n_rows, n_cols, or twice that if GATED) with a row stride; Maxima: of each program, which walks tiles down
    the rows, what no magnitude that goes down exceeds, and then, if GATED, none of H. NaN are left out.

    Without a gate H's largest number and its least tell: an activation grows above 0, and below it is at most half of x
    and 0.28.
    """
    WIDE: tl.constexpr = H.dtype.element_ty
    EXACT: tl.constexpr = WIDE == tl.float32
    col = tl.program_id(0) * COLS + tl.arange(0, COLS)
    first = tl.zeros([ROWS, COLS], tl.float32)
    second = tl.zeros([ROWS, COLS], tl.float32)
    for start in tl.range(tl.program_id(1) * ROWS, n_rows, tl.num_programs(1) * ROWS, num_stages=3):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
        place = H + row[:, None] * h_stride + col[None, :]
        x = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            up = tl.load(place + n_cols, mask=inside, other=0.0).to(tl.float32)
            y, _ = activation_and_slope(x, KIND, EXACT)
            first = tl.maximum(first, tl.abs(y * up))
            second = tl.maximum(second, tl.maximum(tl.abs(x), tl.abs(up)))
        else:
            first = tl.maximum(first, x)
            second = tl.maximum(second, -x)
    largest = tl.max(tl.max(first, 1), 0)
    below = tl.max(tl.max(second, 1), 0)
    Maxima += tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    if GATED:
        tl.store(Maxima + tl.num_programs(0) * tl.num_programs(1), below)
    else:
        largest, _ = activation_and_slope(largest, KIND, EXACT)
        largest = tl.maximum(largest, 0.5 * tl.minimum(below, 0.56))
    tl.store(Maxima, largest)


@triton.jit
def _activation_round_kernel(
    H, Maxima, Factor, Rows, Turned, Inverse, h_stride, padded, n_rows, n_cols, n_maxima,
    KIND: tl.constexpr, GATED: tl.constexpr, EXPONENT: tl.constexpr, MAXIMA: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """H and Maxima as above, n_maxima of either kind; Factor gets a power of two that no magnitude of a half of H
    exceeds, or 1; the rest as `store_rounded` has it."""
    scale = fitting_scale(Maxima, n_maxima, Inverse, EXPONENT, MAXIMA)
    if tl.program_id(0) == 0:
        factor = 1.0
        if GATED:
            i = tl.arange(0, MAXIMA)
            largest = tl.max(tl.load(Maxima + n_maxima + i, mask=i < n_maxima, other=0.0), 0)
            factor = (largest.to(tl.int32, bitcast=True) + 0x7FFFFF & 0x7F800000).to(tl.float32, bitcast=True)
        tl.store(Factor, factor)
    row, col = tile_place(n_cols, ROWS, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    place = H + row[:, None] * h_stride + col[None, :]
    WIDE: tl.constexpr = H.dtype.element_ty
    y, _ = activation_and_slope(tl.load(place, mask=inside, other=0.0).to(tl.float32), KIND, WIDE == tl.float32)
    if GATED:
        y *= tl.load(place + n_cols, mask=inside, other=0.0).to(tl.float32)
    store_rounded(y * scale, row, col, n_cols, padded, n_cols, Rows, Turned, WIDE, True, False)


@triton.jit
def _activation_bwd_round_kernel(
    DY, H, Factor, InverseOfGradient, InverseOfWeight, Rows, Turned, Inverse, Partials, InverseOfY, TurnedY,
    dy_stride, h_stride, padded, n_rows, n_cols, bound,
    KIND: tl.constexpr, GATED: tl.constexpr, SUMS: tl.constexpr, KEEP: tl.constexpr, TURN: tl.constexpr,
    TURN_Y: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """DY: (n_rows, n_cols) with a row stride, the gradient of what goes down. Of H's gradient, which is as wide as H
    and at most 0.875 2^16 times `bound`, both inverses and Factor: Rows and Turned as `store_rounded` has them, and
    Partials: (tiles down the rows, width) float32, sums of columns. TurnedY: what goes down, by the scale of the
    forward pass, if through WIDE where that rounds once: the last bit of a few in a hundred differs."""
    # Two and two: the inverses' product alone may be below float32's least.
    inverse = (tl.load(InverseOfGradient) * tl.load(Factor)) * (tl.load(InverseOfWeight) * bound)
    inverse = tl.minimum(tl.maximum(inverse, 2.0**-120), 2.0**120)
    if tl.program_id(0) == 0:
        tl.store(Inverse, inverse)
    scale = 1.0 / inverse
    WIDE: tl.constexpr = H.dtype.element_ty
    EXACT: tl.constexpr = WIDE == tl.float32
    row, col = tile_place(n_cols, ROWS, COLS)
    inside = (row < n_rows)[:, None] & (col < n_cols)[None, :]
    width = n_cols * 2 if GATED else n_cols
    Partials += tl.program_id(0).to(tl.int64) // tl.cdiv(n_cols, COLS) * width + col
    place = H + row[:, None] * h_stride + col[None, :]
    dy = tl.load(DY + row[:, None] * dy_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    y, slope = activation_and_slope(tl.load(place, mask=inside, other=0.0).to(tl.float32), KIND, EXACT)
    if GATED:
        second = _finite_or_nan(dy * y)
        up = tl.load(place + n_cols, mask=inside, other=0.0).to(tl.float32)
        dy *= up
        y *= up
        beyond = n_cols.to(tl.int64) * padded
        store_rounded(
            second * scale, row, col, n_cols, padded, width, Rows + n_cols, Turned + beyond, WIDE, KEEP, TURN
        )  # fmt: skip
        if SUMS:
            tl.store(Partials + n_cols, tl.sum(second, 0), mask=col < n_cols)
    if TURN_Y:
        y = _finite_or_nan(y) * (1.0 / tl.load(InverseOfY))
        store_rounded(y, row, col, n_cols, padded, n_cols, TurnedY, TurnedY, WIDE, False, True)
    dh = _finite_or_nan(dy * slope)
    store_rounded(dh * scale, row, col, n_cols, padded, width, Rows, Turned, WIDE, KEEP, TURN)
    if SUMS:
        tl.store(Partials, tl.sum(dh, 0), mask=col < n_cols)


@triton.jit
def _finite_or_nan(x):
    """x, and NaN in place of an infinity, which rounding would make a finite number."""
    return x + (x - x)


def _activation(h: Tensor, n_cols: int, kind: str) -> tuple[Rounded, Tensor]:
    """h: (M, n_cols or twice that), contiguous -> what goes down, (M, n_cols), in e4m3, and a power of two that no
    magnitude of h exceeds, () float32, or 1 if h has no halves."""
    n_rows, width = h.shape
    gated = width != n_cols
    columns = cdiv(n_cols, MAXIMA_TILE["COLS"])
    walkers = min(max(1, PROGRAMS * multiprocessors(h.device) // columns), cdiv(n_rows, MAXIMA_TILE["ROWS"]))
    n_maxima = walkers * columns
    maxima = torch.empty((2 if gated else 1, n_maxima), dtype=torch.float32, device=h.device)
    launch(
        _activation_maxima_kernel, (columns, walkers), h, maxima, h.stride(0), n_rows, n_cols,
        KIND=kind, GATED=gated, **MAXIMA_TILE,
    )  # fmt: skip
    y = new_rounded(h, (n_rows, n_cols), E4M3, True, False)
    factor = torch.empty((), dtype=torch.float32, device=h.device)
    launch(
        _activation_round_kernel, (n_tiles(n_rows, n_cols),),
        h, maxima, factor, *y, h.stride(0), up_to_16(n_rows), n_rows, n_cols, n_maxima,
        KIND=kind, GATED=gated, EXPONENT=EXPONENTS[E4M3], MAXIMA=next_power_of_2(n_maxima), **TILE,
    )  # fmt: skip
    return y.in_format(E4M3), factor


def _gradient(
    dy: Tensor, h: Tensor, factor: Tensor, kind: str, inverses: tuple[Tensor, Tensor], y_scale: Tensor, n_summed: int,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Rounded, Tensor | None, Tensor]:  # fmt: skip
    """dy: (M, F), sums over n_summed columns of products of what `inverses` belong to, in e5m2 and in e4m3; factor and
    y_scale as `_activation` gave -> h's gradient, as rows and turned, the sums of its columns, float32, and what goes
    down, turned: those that the gradients ask for which `needs` names, of x, up, its bias and down."""
    (n_rows, n_cols), width = dy.shape, h.shape[1]
    d8 = new_rounded(dy, (n_rows, width), E5M2, needs[0], needs[1])
    y8 = new_rounded(dy, (n_rows, n_cols), E4M3, False, needs[3])
    n_partials = cdiv(n_rows, TILE["ROWS"]) if needs[2] else 0
    partials = torch.empty((1, n_partials, width), dtype=torch.float32, device=h.device)
    # A product of the two is at most 0.875 2^16 times 0.875 2^9 of the inverses, and no activation is steeper than
    # 1.13, 0.875 of which is less than 1; what remains is 0.875 2^16, e5m2's largest, times 2^9.
    bound = 2.0 ** (9 + (n_summed - 1).bit_length())
    launch(
        _activation_bwd_round_kernel, (n_tiles(n_rows, n_cols),),
        dy, h, factor, *inverses, *d8, partials, y_scale, y8.turned, dy.stride(0), h.stride(0), up_to_16(n_rows),
        n_rows, n_cols, bound,
        KIND=kind, GATED=width != n_cols, SUMS=needs[2], KEEP=needs[0], TURN=needs[1], TURN_Y=needs[3], **TILE,
    )  # fmt: skip
    sums = None
    if needs[2]:
        sums = torch.empty((width,), dtype=torch.float32, device=h.device)
        sum_partials(partials, [sums])
    return d8.in_format(E5M2), sums, y8.in_format(E4M3).turned


def fp8_mlp_fwd(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> Tensor:
    """x: (..., N); up: (F or 2 F, N); down: (M, F) -> (..., M)."""
    return fp8_mlp_kept(x, up, up_bias, down, down_bias, activation, (False,) * 5)[0]


def fp8_mlp_kept(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str,
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, ...]:  # fmt: skip
    """The same, and what the gradients will ask for that `needs` names of x, up, its bias, down, its bias: x, up and
    down, rounded and transposed, and h; empty what they will not; and `_activation`'s factor and the inverse scales of
    x, up, what goes down, and down, () float32."""
    rows, (n_out, n_cols), behind = as_rows(x), down.shape, any(needs[:4])
    n_rows = rows.shape[0]
    if n_rows == 0:
        shapes = (x.shape[-1], 0), (up.shape[1], up.shape[0] if needs[0] else 0), (n_cols, n_out if behind else 0)
        unread = (x.new_empty(shape, dtype=E4M3) for shape in shapes)
        h = x.new_empty((0, up.shape[0]) if behind else 0)
        return x.new_zeros((*x.shape[:-1], n_out)), *unread, h, *(x.new_ones((), dtype=torch.float32) for _ in range(5))
    x8 = rounded(rows, E4M3, True, needs[1])
    up8 = rounded(as_rows(up), E4M3, True, needs[0])
    h = product(x8.rows[:n_rows], up8.rows, (x8.inverse, up8.inverse), x.dtype, True, up_bias)
    y8, factor = _activation(h, n_cols, KINDS[activation])
    down8 = rounded(as_rows(down), E4M3, True, behind)
    out = product(y8.rows[:n_rows], down8.rows, (y8.inverse, down8.inverse), x.dtype, True, down_bias)
    kept = x8.turned, up8.turned, down8.turned, h if behind else x.new_empty(0), factor
    return out.view(*x.shape[:-1], n_out), *kept, x8.inverse, up8.inverse, y8.inverse, down8.inverse


def fp8_mlp_bwd(
    dout: Tensor, x: Tensor, up: Tensor, down: Tensor, h: Tensor, factor: Tensor, x_scale: Tensor, up_scale: Tensor,
    y_scale: Tensor, down_scale: Tensor, activation: str, shapes: tuple[int, int, int, int],
    needs: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dout: (..., M), what `fp8_mlp_kept` gave, and the `shapes` of up and down -> the gradients that `needs` asks for:
    of x (..., N), of up and down in dout's dtype, of their biases (F or 2 F,) and (M,) float32."""
    rows, (width, n_in, n_out, _) = as_rows(dout), shapes
    n_rows, behind = rows.shape[0], any(needs[:4])
    dx = dup = dup_bias = ddown = None
    if n_rows == 0:
        zeros = (dout.new_zeros((*dout.shape[:-1], n_in)), dout.new_zeros(shapes[:2]), x_scale.new_zeros(width),
                 dout.new_zeros(shapes[2:]), x_scale.new_zeros(n_out))  # fmt: skip
        return tuple(zero if needed else None for zero, needed in zip(zeros, needs, strict=True))
    ddown_bias, magnitudes = column_sums_and_maxima(rows, needs[4])
    d8 = rounded(rows, E5M2, behind, needs[3], magnitudes)
    if behind:
        dy = product(d8.rows[:n_rows], down, (d8.inverse, down_scale), dout.dtype, False)
        inverses = d8.inverse, down_scale
        h8, dup_bias, y = _gradient(dy, h, factor, KINDS[activation], inverses, y_scale, n_out, needs[:4])
        if needs[0]:
            dx = product(h8.rows[:n_rows], up, (h8.inverse, up_scale), dout.dtype, False).view(*dout.shape[:-1], n_in)
        if needs[1]:
            dup = product(h8.turned, x, (h8.inverse, x_scale), dout.dtype, False)
        if needs[3]:
            ddown = product(d8.turned, y, (d8.inverse, y_scale), dout.dtype, False)
    return dx, dup, dup_bias, ddown, ddown_bias


def fp8_mlp_limits(
    x: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None, activation: str
) -> str | None:
    """Why the kernels cannot give what is asked."""
    return lacking(x.device)
