"""Gluon (triton.experimental.gluon) on Hopper from Triton 3.6 to 3.9: what was renamed between them or has no name yet.

Imported for sm_90 only: Gluon has no CPU interpreter.
"""

import functools
from typing import NamedTuple

import torch
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ._launch import Descriptor

# 3.8 renamed the copies and gave the reduction a name; 3.9 keeps the old names only to raise. Called as
# tma_load(descriptor, coordinates, mbarrier, destination), tma_store(descriptor, coordinates, source).
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
MANY = gl.constexpr(2**30)  # rows that no tensor has
MAX_SOFTCAP = 256.0
MAX_HEAD_DIM = {"fwd": 256, "bwd": 128}
# Descriptors, kept by all that they are made of, because PyTorch hands out the same memory again and again. A model of
# 100 layers trains with at most 1,200.
KEPT = 2048


@builtin
def tma_reduce_add(desc, coord, src, _semantic=None):
    """Add a tile in shared memory to global memory, element by element and atomically (`async_atomic_add` from 3.8)."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, desc.handle, coord, src.handle)


@builtin
def reinterpreted(memory, dtype, shape, layout, _semantic=None):
    """Shared memory as another shape (a method that 3.9 renamed)."""
    method = getattr(memory, "reinterpret", None) or memory._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)


@gluon.jit
def _named_barrier(ASM: gl.constexpr):
    # Elementwise inline assembly is the only one there is: one element for each thread of the calling warps.
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    x = gl.zeros([32 * gl.num_warps()], gl.int32, layout=layout)
    gl.inline_asm_elementwise(ASM + " mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def named_barrier_sync(ID: gl.constexpr, THREADS: gl.constexpr):
    """Wait until THREADS threads, these included, have arrived at hardware barrier ID. Triton uses the first few of the
    16 for itself: take 8 and above."""
    ASM: gl.constexpr = f"bar.sync {ID}, {THREADS};"
    _named_barrier(ASM)


@gluon.jit
def named_barrier_arrive(ID: gl.constexpr, THREADS: gl.constexpr):
    """Arrive at hardware barrier ID without waiting; THREADS counts these and the threads that wait."""
    ASM: gl.constexpr = f"bar.arrive {ID}, {THREADS};"
    _named_barrier(ASM)


@gluon.jit
def reciprocal(x):
    """1 / x to one unit in the last place, in one instruction: Triton's division takes several."""
    return gl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


def tma_readable(x: Tensor) -> bool:
    """Whether a (B, T, H, D) tensor of 16-bit elements can be addressed by `head_tiles`: unit stride in D, the other
    strides and the address multiples of 16 bytes, no stride 0."""
    return x.data_ptr() % 16 == 0 and _steps_readable(x.shape, x.stride())


def matrix_readable(x: Tensor) -> bool:
    """The same of a matrix of 16-bit elements and `plain_tiles`."""
    return x.data_ptr() % 16 == 0 and x.stride(1) == 1 and x.stride(0) > 0 and x.stride(0) % 8 == 0


@functools.lru_cache(KEPT)
def _steps_readable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    aligned = all(n == 1 or (s > 0 and s % 8 == 0) for n, s in zip(shape[:3], strides[:3], strict=True))
    return min(shape) > 0 and strides[3] == 1 and aligned


class Memory(NamedTuple):
    """What a descriptor has in place of a tensor: keeping it keeps no memory."""

    address: int
    dtype: torch.dtype

    def data_ptr(self) -> int:
        return self.address


def memory_of(x: Tensor) -> Memory:
    return Memory(x.data_ptr(), x.dtype)


@functools.lru_cache(KEPT)
def _head_tiles(
    memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], rows: int, cols: int, packed: bool
) -> Descriptor:  # fmt: skip
    batch, length, heads, head_dim = shape
    # The stride of a dimension of one element is arbitrary in PyTorch; TMA wants it aligned.
    sequence, row, head = (s if n > 1 else 8 for n, s in zip(shape[:3], strides[:3], strict=True))
    sizes, apart = [batch, heads, length, head_dim], [sequence, head, row, 1]
    if packed:
        sizes = [2**31 - 2**16, 2**31 - 2**16, heads, MANY.value, head_dim]
        apart = [2**34 - row, row, head, row, 1]
    ones = [1] * (len(sizes) - 2)
    layout = gl.NVMMASharedLayout(128, 16, len(sizes))
    return Descriptor(TensorDescriptor(memory, sizes, apart, [*ones, rows, cols], layout))


def head_tiles(x: Tensor, rows: int, cols: int, packed: bool = False) -> Descriptor:
    """TMA descriptor of a (B, T, H, D) tensor whose tiles, (1, 1, rows, cols) at (b, h, t, d), are rows of one head.

    With one dimension for each of B, H and T, what lies beyond T or D reads as zero and is not written. packed: of
    (1, T, H, D), sequences one after another; `head_rows` tells the coordinates, of which T's goes up to MANY, where a
    sequence ends, and two more bring the address back: by 64-bit wraparound, as in Triton's tools/ragged_tma.py.
    """
    return _head_tiles(memory_of(x), x.shape, x.stride(), rows, cols, packed)


@functools.lru_cache(KEPT)
def _plain_tiles(
    memory: Memory, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...], swizzle: int
) -> Descriptor:  # fmt: skip
    layout = gl.NVMMASharedLayout(swizzle, 8 * memory.dtype.itemsize, len(block))
    return Descriptor(TensorDescriptor(memory, list(shape), list(strides), list(block), layout))


def plain_tiles(x: Tensor, block: tuple[int, ...], swizzle: int) -> Descriptor:
    """TMA descriptor of a tensor as it is; in shared memory its tiles are swizzled in so many bytes."""
    return _plain_tiles(memory_of(x), x.shape, x.stride(), block, swizzle)


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N mbarriers in shared memory, a phase of which ends when ARRIVALS have arrived."""
    made = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(made.index(i), count=ARRIVALS)
    return made


@gluon.jit
def head_rows(b, h, row, first, length, PACKED: gl.constexpr):
    """Coordinates of a tile of `head_tiles`. PACKED: of rows from `row` on in a sequence of `length` from `first` on.

    MANY * (2^34 - stride) + (first + length) * stride + (MANY - length + row) * stride elements are first + row rows
    and 2^64 elements, so none."""
    if PACKED:
        return [MANY, first + length, h, MANY - length + row, 0]
    else:  # two types of results: Triton reads what follows a return
        return [b, h, row, 0]


def hopper_limits(q: Tensor, k: Tensor, v: Tensor, softcap: float = 0.0, direction: str = "fwd") -> str | None:
    """Why attention's kernel for this architecture, of one direction, cannot run these (B, T, H, D) tensors; None if it
    can, causal or not, with or without a window. Scores are capped as far as their tanh is accurate, see `capped` in
    kernels/_hopper_scores.py."""
    if q.element_size() != 2:
        return "takes 16-bit types alone"
    if q.shape[3] > MAX_HEAD_DIM[direction] or q.shape[3] % 8:
        return f"takes head dimensions up to {MAX_HEAD_DIM[direction]} that are multiples of 8, not {q.shape[3]}"
    if softcap > MAX_SOFTCAP:
        return f"takes a softcap up to {MAX_SOFTCAP:g}, not {softcap:g}"
    if not all(map(tma_readable, (q, k, v))):
        return "takes tensors that are not empty, addresses and strides of multiples of 16 bytes, and adjacent elements"
    return None
