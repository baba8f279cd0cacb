"""The first matrix product of an MLP with its activation, and the gradient of that, for Hopper (sm_90), in Gluon.

Two warpgroups multiply tiles of 128 x 256 (wgmma), the first of which also starts the copies into shared memory (TMA).
They round a tile to 16 bits, put it into shared memory and go on with the next, while a third warpgroup takes it from
there: it applies the activation and writes what comes out, so that nothing is read back from global memory that a
product wrote there. Thread blocks stay on their multiprocessor and take tiles of one column, whose bias each thread of
the third warpgroup keeps, as it keeps the sums of its columns.

12 warps is what there can be: with 16, ptxas gives none the registers of an accumulator of 64 x 256. The third
warpgroup's loops are short for the cache of instructions: unrolled over a tile it waited for them, erf's GELU for two
thirds of the time.

Supported: bfloat16 and float16, no gate, whole matrices that TMA takes, widths up to 256 times the multiprocessors.
"""

from typing import NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ._common import cdiv, multiprocessors
from ._hopper_loads import next_stage
from ._launch import launch
from .activation import activation_and_slope
from .hopper import barriers, matrix_readable, plain_tiles, reinterpreted, tma_load

ROWS: gl.constexpr = gl.constexpr(128)
COLS: gl.constexpr = gl.constexpr(256)
DEPTH: gl.constexpr = gl.constexpr(64)
STAGES: gl.constexpr = gl.constexpr(3)
SLICE: gl.constexpr = gl.constexpr(8)  # rows that the third warpgroup takes at once
SLICES: gl.constexpr = gl.constexpr(8)  # of what one warpgroup multiplied


class Buffers(NamedTuple):
    """Shared memory. a: (STAGES * 2, 64, DEPTH), of both warpgroups; b: (STAGES, DEPTH, COLS) or its transpose; a ring,
    with barriers for "loaded" and, of the second warpgroup, "free again". out: (2, 64, COLS), a tile that is made, with
    barriers for "made" and "taken" of each half."""

    a: gl.shared_memory_descriptor
    b: gl.shared_memory_descriptor
    out: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    made: gl.shared_memory_descriptor
    taken: gl.shared_memory_descriptor


class Work(NamedTuple):
    """A thread block's tiles, `steps` of them: in a column of tiles, from `first` on every `apart`-th."""

    n_rows: gl.tensor
    n_cols: gl.tensor
    k_steps: gl.tensor
    column: gl.tensor
    first: gl.tensor
    apart: gl.tensor
    steps: gl.tensor


@gluon.jit
def _fetch(inputs, buffers, work, step, k, stage, BACKWARD: gl.constexpr):
    """Start to load a tile's k-th part, if there is such a tile; -> the numbers of what comes after it."""
    a_desc, b_desc = inputs
    if step < work.steps:
        full = buffers.full.index(stage)
        row = (work.first + step * work.apart) * ROWS
        col = work.column * COLS
        mbarrier.expect(full, (ROWS + COLS) * DEPTH * 2)
        for w in gl.static_range(2):
            tma_load(a_desc, [row + w * 64, k * DEPTH], full, buffers.a.index(stage * 2 + w))
        if BACKWARD:
            tma_load(b_desc, [k * DEPTH, col], full, buffers.b.index(stage))
        else:
            tma_load(b_desc, [col, k * DEPTH], full, buffers.b.index(stage))
    last = k + 1 == work.k_steps
    return gl.where(last, step + 1, step), gl.where(last, 0, k + 1)


@gluon.jit
def _refill(inputs, buffers, work, step, k, stage, phase, W: gl.constexpr, BACKWARD: gl.constexpr):
    """After a warpgroup's product of a stage: the second says so, the first waits for it and loads what comes next."""
    if W == 0:
        mbarrier.wait(buffers.empty.index(stage), phase)
        step, k = _fetch(inputs, buffers, work, step, k, stage, BACKWARD)
    else:
        mbarrier.arrive(buffers.empty.index(stage), count=1)
    stage, phase = next_stage(stage, phase, STAGES)
    return step, k, stage, phase


@gluon.jit
def _multiply(inputs, buffers, work, W: gl.constexpr, BACKWARD: gl.constexpr):
    """Warpgroup W: rows W * 64 to W * 64 + 63 of each tile."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 16])
    next_step = 0
    next_k = 0
    if W == 0:
        for s in gl.static_range(STAGES):
            next_step, next_k = _fetch(inputs, buffers, work, next_step, next_k, s, BACKWARD)
    stage = 0
    phase = 0
    used = 0
    used_phase = 0
    for step in range(0, work.steps):
        acc = gl.zeros([64, COLS], gl.float32, layout=layout)
        for k in range(0, work.k_steps):
            mbarrier.wait(buffers.full.index(stage), phase)
            b = buffers.b.index(stage)
            if not BACKWARD:
                b = b.permute([1, 0])
            acc = warpgroup_mma(buffers.a.index(stage * 2 + W), b, acc, use_acc=k > 0, is_async=True)
            stage, phase = next_stage(stage, phase, STAGES)
            acc = warpgroup_mma_wait(1, deps=[acc])
            if k > 0:
                next_step, next_k, used, used_phase = _refill(
                    inputs, buffers, work, next_step, next_k, used, used_phase, W, BACKWARD
                )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        next_step, next_k, used, used_phase = _refill(
            inputs, buffers, work, next_step, next_k, used, used_phase, W, BACKWARD
        )  # fmt: skip
        mbarrier.wait(buffers.taken.index(W), step % 2 ^ 1)
        buffers.out.index(W).store(acc.to(buffers.out.dtype))
        mbarrier.arrive(buffers.made.index(W), count=1)


@gluon.jit
def _inside(rows, cols, work):
    return (rows < work.n_rows)[:, None] & (cols < work.n_cols)[None, :]


@gluon.jit
def _places(rows, cols, work):
    return rows[:, None] * work.n_cols + cols[None, :]


@gluon.jit
def _finish_slice(
    out, buffers, work, outputs, rows, cols, bias, h, total, i, LAST: gl.constexpr,
    KIND: gl.constexpr, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Slice i of a tile whose first rows are `rows`. Backward: h is H there; -> H two slices on, which is asked for
    before this one's arithmetic, and total with this slice's sums."""
    H, Y, DH = outputs
    dtype: gl.constexpr = out.dtype
    at = rows + i * SLICE
    inside = _inside(at, cols, work)
    place = _places(at, cols, work)
    made = out.index(i).load(total.type.layout)
    if LAST:
        if i % SLICES == SLICES - 1:
            mbarrier.arrive(buffers.taken.index(i // SLICES), count=1)
    if BACKWARD:
        x = h.to(gl.float32) + bias[None, :]
        beyond = work.apart * ROWS - 2 * SLICES * SLICE
        ahead = at + 2 * SLICE + gl.where(i < 2 * SLICES - 2, 0, beyond)
        h = gl.load(H + _places(ahead, cols, work), mask=_inside(ahead, cols, work), other=0.0)
        y, slope = activation_and_slope(x, KIND, False)
        dh = made.to(gl.float32) * slope
        gl.store(DH + place, dh.to(dtype), mask=inside)
        gl.store(Y + place, y.to(dtype), mask=inside)
        if HAS_BIAS:  # rows past the matrix's end are 0: so were those that were multiplied
            some = gl.sum(gl.reshape(dh, [SLICE // 4, 4, COLS]), 0)
            total += gl.convert_layout(some, total.type.layout)
    else:
        gl.store(H + place, made, mask=inside)
        y, _ = activation_and_slope(made.to(gl.float32) + bias[None, :], KIND, False)
        gl.store(Y + place, y.to(dtype), mask=inside)
    return h, total


@gluon.jit
def _finish(buffers, work, outputs, Bias, Partials, KIND: gl.constexpr, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr):
    """The third warpgroup. Each thread has 8 adjacent columns, and of each slice every fourth row."""
    H, Y, DH = outputs
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    across: gl.constexpr = gl.SliceLayout(0, layout)
    dtype: gl.constexpr = buffers.out.dtype
    cols = work.column * COLS + gl.arange(0, COLS, layout=across)
    bias = gl.zeros([COLS], gl.float32, layout=across)
    if HAS_BIAS:
        bias = gl.load(Bias + cols, mask=cols < work.n_cols, other=0.0).to(gl.float32)
    total = gl.zeros([4, COLS], gl.float32, layout=layout)
    rows = work.first.to(gl.int64) * ROWS + gl.arange(0, SLICE, layout=gl.SliceLayout(1, layout))
    even = gl.zeros([SLICE, COLS], dtype, layout=layout)
    odd = even
    if BACKWARD:
        even = gl.load(H + _places(rows, cols, work), mask=_inside(rows, cols, work), other=0.0)
        odd = gl.load(H + _places(rows + SLICE, cols, work), mask=_inside(rows + SLICE, cols, work), other=0.0)
    out = reinterpreted(buffers.out, dtype, [2 * SLICES, SLICE, COLS], buffers.out.layout)
    for step in range(0, work.steps):
        for w in range(0, 2):
            mbarrier.wait(buffers.made.index(w), step % 2)
            # Two at once: a value that changed its name from one round to the next would be waited for.
            for i in range(w * SLICES, (w + 1) * SLICES, 2):
                even, total = _finish_slice(
                    out, buffers, work, outputs, rows, cols, bias, even, total, i, False, KIND, HAS_BIAS, BACKWARD
                )  # fmt: skip
                odd, total = _finish_slice(
                    out, buffers, work, outputs, rows, cols, bias, odd, total, i + 1, True, KIND, HAS_BIAS, BACKWARD
                )  # fmt: skip
        rows += work.apart * ROWS
    if BACKWARD and HAS_BIAS:
        gl.store(Partials + work.first.to(gl.int64) * work.n_cols + cols, gl.sum(total, 0), mask=cols < work.n_cols)


@gluon.jit
def _mlp_hopper_kernel(
    a_desc, b_desc, H, Y, DH, Bias, Partials, n_rows, n_cols, depth,
    KIND: gl.constexpr, HAS_BIAS: gl.constexpr, BACKWARD: gl.constexpr,
):  # fmt: skip
    """Descriptors of a: (n_rows, depth), tiles of (64, DEPTH), and b: (n_cols, depth), tiles of (COLS, DEPTH), or
    BACKWARD (depth, n_cols), tiles of (DEPTH, COLS). Forward: H gets a b^T and Y act(H + Bias). BACKWARD: DH gets
    a b * act'(H + Bias), Y act(H + Bias) again, and Partials: (thread blocks of a column, n_cols) sums of DH's columns.
    H, Y, DH: (n_rows, n_cols), contiguous; Bias: (n_cols,)."""
    dtype: gl.constexpr = a_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    B_TILE: gl.constexpr = [STAGES, DEPTH, COLS] if BACKWARD else [STAGES, COLS, DEPTH]
    buffers = Buffers(
        gl.allocate_shared_memory(dtype, [STAGES * 2, 64, DEPTH], layout),
        gl.allocate_shared_memory(dtype, B_TILE, layout),
        gl.allocate_shared_memory(dtype, [2, 64, COLS], gl.SwizzledSharedLayout(8, 1, 8, [1, 0])),
        barriers(STAGES, 1),
        barriers(STAGES, 1),
        barriers(2, 1),
        barriers(2, 1),
    )
    fence_async_shared()
    columns = gl.cdiv(n_cols, COLS)
    first = gl.program_id(0) // columns
    apart = gl.num_programs(0) // columns
    steps = gl.cdiv(gl.cdiv(n_rows, ROWS) - first, apart)
    work = Work(n_rows, n_cols, gl.cdiv(depth, DEPTH), gl.program_id(0) % columns, first, apart, steps)
    inputs = (a_desc, b_desc)
    gl.warp_specialize(
        [
            (_multiply, (inputs, buffers, work, 0, BACKWARD)),
            (_multiply, (inputs, buffers, work, 1, BACKWARD)),
            (_finish, (buffers, work, (H, Y, DH), Bias, Partials, KIND, HAS_BIAS, BACKWARD)),
        ],
        [4, 4],
        [168, 168],
    )


def _programs(n_rows: int, n_cols: int, device: torch.device) -> tuple[int, int]:
    """Thread blocks for a column of tiles, 0 if there are more columns than multiprocessors, and columns."""
    columns = cdiv(n_cols, COLS.value)
    return min(multiprocessors(device) // columns, cdiv(n_rows, ROWS.value)), columns


def mlp_hopper_pays(rows: Tensor, weight: Tensor, n_cols: int) -> bool:
    """Whether the kernel can multiply rows: (M, N) by a weight, of which one side is n_cols long, and leaves few
    multiprocessors idle, as it would where tiles fill them not even once."""
    if rows.element_size() != 2 or n_cols % 8:
        return False
    programs, columns = _programs(rows.shape[0], n_cols, rows.device)
    tiles = cdiv(rows.shape[0], ROWS.value)
    if programs == 0 or tiles * columns < 0.85 * cdiv(tiles, programs) * multiprocessors(rows.device):
        return False
    return matrix_readable(rows) and matrix_readable(weight)


def mlp_hopper_fwd(x: Tensor, up: Tensor, bias: Tensor | None, kind: str) -> tuple[Tensor, Tensor]:
    """x: (M, N); up: (F, N); bias: (F,) -> h = x up^T and act(h + bias), (M, F)."""
    (n_rows, depth), n_cols = x.shape, up.shape[0]
    h, y = (torch.empty((n_rows, n_cols), dtype=x.dtype, device=x.device) for _ in range(2))
    programs, columns = _programs(n_rows, n_cols, x.device)
    launch(
        _mlp_hopper_kernel, (programs * columns,),
        h, y, h, h if bias is None else bias.contiguous(), h, n_rows, n_cols, depth,
        descriptors=(plain_tiles(x, (64, DEPTH.value), 128), plain_tiles(up, (COLS.value, DEPTH.value), 128)),
        KIND=kind, HAS_BIAS=bias is not None, BACKWARD=False, num_warps=4,
    )  # fmt: skip
    return h, y


def mlp_hopper_bwd(
    dout: Tensor, down: Tensor, h: Tensor, bias: Tensor | None, kind: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dout: (M, O); down: (O, F); h: (M, F), contiguous -> its gradient, act(h + bias), and partial sums (1, n, F),
    float32, of the bias's gradient."""
    (n_rows, depth), n_cols = dout.shape, h.shape[1]
    dh, y = torch.empty_like(h), torch.empty_like(h)
    programs, columns = _programs(n_rows, n_cols, h.device)
    partials = torch.empty((1, 0 if bias is None else programs, n_cols), dtype=torch.float32, device=h.device)
    launch(
        _mlp_hopper_kernel, (programs * columns,),
        h, y, dh, h if bias is None else bias.contiguous(), partials, n_rows, n_cols, depth,
        descriptors=(plain_tiles(dout, (64, DEPTH.value), 128), plain_tiles(down, (DEPTH.value, COLS.value), 128)),
        KIND=kind, HAS_BIAS=bias is not None, BACKWARD=True, num_warps=4,
    )  # fmt: skip
    return dh, y, None if bias is None else partials
