"""What the kernels share: an accurate exponential, block sizes for row kernels, row views, new tensors, facts of the
device."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rows up to this many elements are held in registers whole; longer ones are walked in blocks.
MAX_ROW_IN_REGISTERS = 32768

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2_HIGH: tl.constexpr = tl.constexpr(0.693359375)  # 9 bits: its product with an integer is exact
LN2_LOW: tl.constexpr = tl.constexpr(-2.12194440e-4)


@triton.jit
def exponential(x, EXACT: tl.constexpr):
    """e^x for x <= 0. EXACT, for float32 results, splits x = n ln 2 + r (Cody and Waite, Software Manual for the
    Elementary Functions, 1980): in 2^(x log2 e) alone the product's rounding is magnified by |x|."""
    if EXACT:
        x = tl.where(x < -200.0, -200.0, x)  # e^-200 is 0 in float32, and -inf would give inf - inf below; NaN stays
        n = tl.floor(x * LOG2E + 0.5)
        r = (x - n * LN2_HIGH) - n * LN2_LOW
        return tl.exp2(r * LOG2E) * tl.exp2(n)
    return tl.exp2(x * LOG2E)


@triton.jit
def await_previous(EARLY: tl.constexpr, LET_IN: tl.constexpr = True):
    """First of all in a kernel that is launched early: wait until all that the kernel before has written can be read.
    With LET_IN the next one may be launched early beside this one; else `let_in` says when."""
    if EARLY:
        if LET_IN:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_in(EARLY: tl.constexpr):
    """Let the next kernel be launched: where each program of this one has come, it may take room beside them."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()


def launches_early(device: torch.device) -> bool:
    """Whether a kernel can be launched while the one before still runs, which hides the time that launching takes
    (programmatic dependent launch, of CUDA alone)."""
    return architecture(device) >= 90 and torch.version.hip is None


def cdiv(n: int, d: int) -> int:
    """n / d, rounded up. Triton's, which also works inside kernels, takes the host 2 us; so does its power of 2."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not less than n > 0."""
    return 1 << (n - 1).bit_length()


def row_settings(n_cols: int) -> tuple[int, int, int]:
    """(rows per program, columns per block, warps) for a kernel over rows of `n_cols` elements.

    The block covers a row of up to MAX_ROW_IN_REGISTERS elements, and short rows share a program, so that each thread
    has 8 to 64 elements: enough independent 16-byte loads in flight, and no more registers than there are. A longer row
    gives a block that the kernel must walk with.
    """
    if n_cols <= 0:
        raise ValueError(f"row_settings: n_cols is {n_cols}; a row must hold at least one element")
    if n_cols > MAX_ROW_IN_REGISTERS:
        return 1, 8192, 16
    block = max(16, next_power_of_2(n_cols))
    rows = max(1, min(16, 2048 // block))
    warps = min(32, max(2, rows * block // 512))
    return rows, block, warps


def as_rows(x: Tensor) -> Tensor:
    """x as (rows, N) with unit stride in a row: a view where its strides allow, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_apart(x: Tensor) -> tuple[Tensor, int]:
    """What a kernel reads the rows of x from, and how many elements they lie apart: x itself, which costs no view,
    where it is contiguous."""
    if x.is_contiguous():
        return x, x.shape[-1] if x.dim() else 1
    rows = as_rows(x)
    return rows, rows.stride(0)


def cache_limits(k_cache: Tensor, v_cache: Tensor) -> str | None:
    """Why kernels cannot work in caches (..., D); None if they can. A copy would cost more than what they do there."""
    apart = k_cache.shape[-1] > 1 and (k_cache.stride(-1) != 1 or v_cache.stride(-1) != 1)
    return "needs caches with adjacent elements in their last dimension" if apart else None


def new_like(x: Tensor) -> Tensor:
    """Memory for a tensor of x's shape and dtype, contiguous."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gradients_like(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Memory for the gradients of q, k and v, (B, T, H, D) each: contiguous, or, where these lie side by side in the
    result of one product, side by side in the same order, so that nobody need put them together."""
    tensors = q, k, v
    heads = [t.shape[2] for t in tensors]
    ends = [t.data_ptr() + t.shape[2] * t.stride(2) * t.element_size() for t in tensors]
    alike = all(t.stride() == q.stride() and t.shape[:2] == q.shape[:2] for t in tensors)
    if alike and ends[:2] == [k.data_ptr(), v.data_ptr()] and q.stride(2) == q.shape[3]:
        together = torch.empty((*q.shape[:2], sum(heads), q.shape[3]), dtype=q.dtype, device=q.device)
        return together.split(heads, dim=2)
    return tuple(map(new_like, tensors))


def architecture(device: torch.device) -> int:
    """Compute capability of a CUDA device, as 90 for 9.0; of the CPU, that which kernels are compiled for there, 80 in
    the interpreter."""
    if device.type == "cuda":
        return _capability(device)
    return 80 if triton.knobs.runtime.interpret else triton.runtime.driver.active.get_current_target().arch


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 for the CPU interpreter, so that tests walk the same loops."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
