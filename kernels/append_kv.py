"""Writing the newest keys and values of each sequence into its cache, where the device alone knows how many it holds.

A program copies a token's keys or values. Not supported: float64, caches whose last dimension has other strides than 1.
"""

import functools

import triton
import triton.language as tl
from torch import Tensor

from ._common import await_previous, cache_limits, cdiv, launches_early, next_power_of_2
from ._launch import Variant

BLOCK = 1024  # elements of a program of 4 warps


@triton.jit
def _append_kv_kernel(
    KCache, VCache, K, V, Lengths, Table, kc_sb, kc_st, kc_sh, vc_sb, vc_st, vc_sh,
    k_sb, k_st, k_sh, v_sb, v_st, v_sh, t_sb, n_new, heads, capacity,
    PAGE: tl.constexpr, EARLY: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """K, V: (B, n_new, heads, D), strided; caches: (B, capacity, heads, D), or with PAGE tokens a page
    (n_pages, PAGE, heads, D) and Table (B, capacity / PAGE); Lengths: (B,), the new ones counted. HEADS of a token a
    program, its keys by those of program_id(2) 0, its values by those of 1."""
    await_previous(EARLY)
    token = tl.program_id(0)
    b, i = (token // n_new).to(tl.int64), (token % n_new).to(tl.int64)
    place = tl.load(Lengths + b) - n_new + i
    page, slot = b, tl.minimum(tl.maximum(place, 0), capacity - 1)
    if PAGE:
        page = tl.load(Table + b * t_sb + slot // PAGE).to(tl.int64)
        slot = slot % PAGE
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    col = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < heads) & (col < D)
    written = (head < tl.where((place >= 0) & (place < capacity), heads, 0)) & (col < D)
    if tl.program_id(2) == 0:
        new = tl.load(K + b * k_sb + i * k_st + head * k_sh + col, mask=inside, other=0.0)
        tl.store(KCache + page * kc_sb + slot * kc_st + head * kc_sh + col, new, mask=written)
    else:
        new = tl.load(V + b * v_sb + i * v_st + head * v_sh + col, mask=inside, other=0.0)
        tl.store(VCache + page * vc_sb + slot * vc_st + head * vc_sh + col, new, mask=written)


@functools.lru_cache(maxsize=256)
def _variant(heads: int, head_dim: int, page: int, early: bool) -> tuple[int, Variant]:
    """Programs for a token's keys, and their kernel."""
    width = next_power_of_2(head_dim)
    per_program = max(1, min(next_power_of_2(heads), BLOCK // width))
    flags = {"PAGE": page, "EARLY": early}
    sizes = {"D": head_dim, "HEADS": per_program, "BLOCK_D": width}
    return cdiv(heads, per_program), Variant(_append_kv_kernel, **flags, **sizes, num_warps=4)


def append_kv_limits(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None
) -> str | None:
    """Why the kernel cannot give what is asked."""
    return cache_limits(k_cache, v_cache)


def append_kv_fwd(
    k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, lengths: Tensor, block_table: Tensor | None
) -> None:
    """k, v: (B, T, Hkv, D) -> into caches (B, capacity, Hkv, D), or pages with a block_table."""
    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    batch, n_new, heads, head_dim = k.shape
    page = k_cache.shape[1]
    table = lengths if block_table is None else block_table.contiguous()  # any tensor will do where there is none
    capacity = page if block_table is None else page * table.shape[1]
    if k.numel() == 0 or capacity == 0:
        return
    parts, kernel = _variant(heads, head_dim, 0 if block_table is None else page, launches_early(k.device))
    strides = [t.stride()[:3] for t in (k_cache, v_cache, k, v)]
    kernel.launch(
        (batch * n_new, parts, 2),
        k_cache, v_cache, k, v, lengths.contiguous(), table, *(s for three in strides for s in three),
        table.stride(0), n_new, heads, capacity,
    )  # fmt: skip
