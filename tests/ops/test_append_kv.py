"""Writing new keys and values into caches and pages: each in its place, and nothing else changed."""

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.errors import BackendError
from llmfast.ops.registry import BACKENDS, REFERENCE

EACH = pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["append_kv"]), REFERENCE])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)


def needs_triton(backend: str, dtype: torch.dtype = torch.float32) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
        if dtype is torch.float64:
            pytest.skip("no float64 kernel")


def tensors(shape: tuple[int, ...], *others: tuple[int, ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device, dtype) for s in (shape, *others) for _ in range(2)]


def expected(cache: Tensor, new: Tensor, lengths: list[int], pages: Tensor | None) -> Tensor:
    """One token after another."""
    out, size = cache.clone(), cache.shape[1]
    capacity = size if pages is None else size * pages.shape[1]
    for b, length in enumerate(lengths):
        for i in range(new.shape[1]):
            place = length - new.shape[1] + i
            if 0 <= place < capacity:
                page = b if pages is None else int(pages[b, place // size])
                out[page, place % size] = new[b, i]
    return out


@EACH
@DTYPES
@pytest.mark.parametrize("heads, head_dim", [(1, 1), (2, 64), (3, 40), (8, 128), (40, 64)])
def test_each_token_goes_to_its_place(heads: int, head_dim: int, dtype: torch.dtype, backend: str, device: str) -> None:
    """Places before, in and past the cache; what lies elsewhere keeps its bits."""
    needs_triton(backend, dtype)
    lengths = [0, 2, 3, 7, 9, 10, 11, 15, -4, 2**31 - 1]
    shapes = (len(lengths), 10, heads, head_dim), (len(lengths), 3, heads, head_dim)
    k_cache, v_cache, k, v = tensors(*shapes, device=device, dtype=dtype)
    want = [expected(cache, new, lengths, None) for cache, new in ((k_cache, k), (v_cache, v))]
    ops.append_kv_(k_cache, v_cache, k, v, torch.tensor(lengths, dtype=torch.int32, device=device), backend=backend)
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


@EACH
@pytest.mark.parametrize("page", [1, 4, 7])
def test_pages(page: int, backend: str, device: str) -> None:
    needs_triton(backend)
    lengths = [0, 1, 5, 9, 28, 30]
    order = torch.randperm(len(lengths) * 28, generator=torch.Generator().manual_seed(1))
    pages = order[: len(lengths) * (28 // page)].view(len(lengths), -1).int()
    k_cache, v_cache, k, v = tensors(
        (len(order), page, 2, 16), (len(lengths), 2, 2, 16), device=device, dtype=torch.float32
    )
    want = [expected(cache, new, lengths, pages) for cache, new in ((k_cache, k), (v_cache, v))]
    where, table = torch.tensor(lengths, dtype=torch.int32, device=device), pages.to(device)
    ops.append_kv_(k_cache, v_cache, k, v, where, block_table=table, backend=backend)
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


@EACH
def test_layouts(backend: str, device: str) -> None:
    """Caches side by side, new heads that lie in one product, every second length."""
    needs_triton(backend)
    both, product = tensors((2, 9, 2, 3, 16), (2, 2, 9, 16), device=device, dtype=torch.float32)[1:3]
    k, v = product[:, :, 3:6], product[:, :, 6:]
    lengths = torch.tensor([5, 0, 9, 0], dtype=torch.int32, device=device)[::2]
    want = [expected(both[:, :, i], new, [5, 9], None) for i, new in enumerate((k, v))]
    ops.append_kv_(both[:, :, 0], both[:, :, 1], k, v, lengths, backend=backend)
    assert torch.equal(both[:, :, 0], want[0]) and torch.equal(both[:, :, 1], want[1])


@EACH
def test_layouts_of_new_heads_and_pages(backend: str, device: str) -> None:
    """Heads whose elements lie apart, or are one, and a block_table whose columns are adjacent."""
    needs_triton(backend)
    k_cache, v_cache, k, v = tensors((6, 4, 2, 16), (3, 2, 16, 2), device=device, dtype=torch.float32)
    k, v = k.transpose(2, 3), v[..., :1, :].transpose(2, 3).expand(-1, -1, -1, 16)
    pages = torch.tensor([[5, 0, 2], [1, 4, 3]], dtype=torch.int32).t()
    want = [expected(cache, new, [5, 8, 2], pages) for cache, new in ((k_cache, k), (v_cache, v))]
    where, table = torch.tensor([5, 8, 2], dtype=torch.int32, device=device), pages.to(device)
    ops.append_kv_(k_cache, v_cache, k, v, where, block_table=table, backend=backend)
    assert torch.equal(k_cache, want[0]) and torch.equal(v_cache, want[1])


@EACH
def test_nothing_to_write(backend: str, device: str) -> None:
    needs_triton(backend)
    for shapes in (((2, 5, 2, 8), (2, 0, 2, 8)), ((0, 5, 2, 8), (0, 1, 2, 8)), ((2, 0, 2, 8), (2, 1, 2, 8))):
        k_cache, v_cache, k, v = tensors(*shapes, device=device, dtype=torch.float32)
        before = k_cache.clone()
        lengths = torch.ones(len(k), dtype=torch.int32, device=device)
        ops.append_kv_(k_cache, v_cache, k, v, lengths, backend=backend)
        assert torch.equal(k_cache, before)


@EACH
@pytest.mark.parametrize("written", [0, 1])
def test_who_needs_a_cache_to_go_backward_is_refused(written: int, backend: str, device: str) -> None:
    """In place of a gradient of what lies there now."""
    needs_triton(backend)
    caches, new = (tensors(s, device=device, dtype=torch.float32) for s in ((2, 5, 2, 8), (2, 1, 2, 8)))
    loss = (torch.ones_like(caches[0], requires_grad=True) * caches[written]).sum()
    ops.append_kv_(*caches, *new, torch.ones(2, dtype=torch.int32, device=device), backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_decode_attention_reads_what_was_appended(device: str) -> None:
    """Token by token, as a whole cache that was there from the start."""
    q, _, k, v = (t[:, :6] for t in tensors((2, 6, 4, 16), (2, 6, 2, 16), device=device, dtype=torch.float32))
    k_cache, v_cache = (torch.full((2, 8, 2, 16), float("nan"), device=device) for _ in range(2))
    for i in range(6):
        lengths = torch.full((2,), i + 1, dtype=torch.int32, device=device)
        ops.append_kv_(k_cache, v_cache, k[:, i : i + 1], v[:, i : i + 1], lengths)
        out = ops.decode_attention(q[:, i : i + 1], k_cache, v_cache, lengths)
        alone = ops.attention(q[:, i : i + 1], k[:, : i + 1], v[:, : i + 1], causal=True, backend=REFERENCE)
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-4)


def test_spread_caches_are_refused_by_the_kernel(device: str) -> None:
    pytest.importorskip("triton")
    k_cache, v_cache, k, v = tensors((2, 5, 2, 8), (2, 1, 2, 8), device=device, dtype=torch.float32)
    turned, one = k_cache.transpose(2, 3).contiguous().transpose(2, 3), torch.ones(2, dtype=torch.int32, device=device)
    with pytest.raises(BackendError, match="adjacent elements"):
        ops.append_kv_(turned, v_cache, k, v, one, backend="triton")
