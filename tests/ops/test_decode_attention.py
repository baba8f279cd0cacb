"""Decode attention beyond the shared table: lengths and pages as the device reads them, splits, layouts, graphs."""

import importlib
import math

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.ops.registry import BACKENDS, REFERENCE
from llmfast.testing.cases import DecodeAttentionCase, make_inputs

EACH = pytest.mark.parametrize("backend", [*(row.name for row in BACKENDS["decode_attention"]), REFERENCE])
RAGGED = DecodeAttentionCase(5, 2, 300, 8, 2, 64, ragged=True)


def lengths(*values: int, device: str) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def needs_triton(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")


@EACH
def test_each_sequence_is_attention_over_its_own_keys(backend: str, device: str) -> None:
    needs_triton(backend)
    tensors = make_inputs(RAGGED, device, torch.float32)
    out = RAGGED.ours(*tensors, backend=backend)
    q, k, v = (t.double() for t in tensors)
    for b, n in enumerate(RAGGED.lengths(torch.device("cpu")).tolist()):
        alone = ops.attention(q[b : b + 1], k[b : b + 1, :n], v[b : b + 1, :n], causal=True, backend=REFERENCE)
        torch.testing.assert_close(out[b : b + 1].double(), alone, rtol=1e-5, atol=1e-5)


@EACH
@pytest.mark.parametrize(("queries", "window"), [(1, None), (2, None), (2, 7)])
def test_lengths_outside_the_cache_read_nothing_outside(
    queries: int, window: int | None, backend: str, device: str
) -> None:
    needs_triton(backend)
    if backend == "cpp" and window is not None:
        pytest.skip("no window")
    q, k, v = make_inputs(DecodeAttentionCase(3, queries, 70, 4, 2, 64), device, torch.float32)
    out, inside = (
        ops.decode_attention(q, k, v, lengths(*n, device=device), window=window, backend=backend)
        for n in ((-5, 71, 2**31 - 1), (0, 70, 70))
    )
    assert torch.equal(out, inside)
    assert (out[0] == 0).all()


@EACH
@pytest.mark.parametrize("capacity", [70, 5000])
def test_without_lengths_all_of_the_cache_counts(capacity: int, backend: str, device: str) -> None:
    needs_triton(backend)
    q, k, v = make_inputs(DecodeAttentionCase(2, 2, capacity, 4, 2, 64), device, torch.float32)
    full = ops.decode_attention(q, k, v, lengths(capacity, capacity, device=device), backend=backend)
    assert torch.equal(ops.decode_attention(q, k, v, backend=backend), full)


@EACH
@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_scale(scale: float, backend: str, device: str) -> None:
    needs_triton(backend)
    q, k, v = make_inputs(DecodeAttentionCase(1, 3, 200, 4, 2, 64), device, torch.float32)
    n = lengths(190, device=device)
    truth = ops.decode_attention(q.double(), k.double(), v.double(), n, scale=scale, backend=REFERENCE)
    out = ops.decode_attention(q, k, v, n, scale=scale, backend=backend)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window", [70, 2**31 - 1, 2**31, 2**63 - 1])
def test_a_window_wider_than_the_cache_hides_nothing(window: int, device: str) -> None:
    """Of sequences with fewer keys than there are queries, too, where a difference may leave 32 bits."""
    pytest.importorskip("triton")
    q, k, v = make_inputs(DecodeAttentionCase(3, 16, 70, 4, 2, 64), device, torch.float32)
    n = lengths(1, 70, 3, device=device)
    out = ops.decode_attention(q, k, v, n, window=window, backend="triton")
    torch.testing.assert_close(out, ops.decode_attention(q, k, v, n, backend="triton"), rtol=1e-5, atol=1e-5)


@EACH
def test_layouts(backend: str, device: str) -> None:
    """Keys and values side by side, queries in any order, equal their copies bit for bit."""
    needs_triton(backend)
    q, k, v = make_inputs(DecodeAttentionCase(2, 3, 200, 4, 2, 64), device, torch.float32)
    n, both = lengths(200, 150, device=device), torch.stack((k, v), dim=2)
    turned = q.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    out = ops.decode_attention(turned, both[:, :, 0], both[:, :, 1], n, backend=backend)
    assert torch.equal(out, ops.decode_attention(q, k, v, n, backend=backend))


@EACH
def test_layouts_of_lengths_and_pages(backend: str, device: str) -> None:
    """Every second length, and a block_table whose columns are adjacent."""
    needs_triton(backend)
    q, k, v = make_inputs(DecodeAttentionCase(3, 1, 48, 4, 2, 64), device, torch.float32)
    n = lengths(40, 0, 7, 0, 48, 0, device=device)[::2]
    out = ops.decode_attention(q, k, v, n, backend=backend)
    assert torch.equal(out, ops.decode_attention(q, k, v, n.contiguous(), backend=backend))
    if backend == "cpp":  # which has no pages
        return
    table = torch.arange(9, dtype=torch.int32, device=device).view(3, 3).t()
    pages = [t.reshape(9, 16, 2, 64) for t in (k, v)]
    out = ops.decode_attention(q, *pages, block_table=table, backend=backend)
    assert torch.equal(out, ops.decode_attention(q, *pages, block_table=table.contiguous(), backend=backend))


def test_pages_change_no_bit(device: str) -> None:
    pytest.importorskip("triton")
    paged = DecodeAttentionCase(3, 2, 304, 8, 2, 64, page_size=16)
    q, k, v = make_inputs(paged, device, torch.float32)
    table, n = paged.block_table(torch.device(device)), lengths(304, 0, 201, device=device)
    assert table is not None
    caches = [cache[table.long()].flatten(1, 2) for cache in (k, v)]
    out = ops.decode_attention(q, k, v, n, block_table=table, backend="triton")
    assert torch.equal(out, ops.decode_attention(q, *caches, n, backend="triton"))
    whole = ops.decode_attention(q, k, v, block_table=table.clamp(min=0), backend="triton")
    assert torch.equal(whole, ops.decode_attention(q, *caches, backend="triton"))


def test_every_number_of_splits_gives_the_result(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """And the same bits when run again."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.decode_attention")
    tensors = make_inputs(RAGGED, device, torch.float32)
    truth = RAGGED.ours(*(t.double() for t in tensors), backend=REFERENCE)
    plan = kernels._plan
    for splits in (1, 2, 3, 17, 40):
        monkeypatch.setattr(kernels, "_plan", lambda *args, n=splits: plan(*args)._replace(splits=n))
        out = RAGGED.ours(*tensors, backend="triton")
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
        assert torch.equal(out, RAGGED.ours(*tensors, backend="triton"))


@pytest.mark.parametrize("window", [1, 62, 129, 200])
def test_windows_over_splits(window: int, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Some of which begin in the last key of a tile of 64, for the first of the queries alone."""
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.decode_attention")
    q, k, v = make_inputs(DecodeAttentionCase(4, 3, 300, 4, 2, 64), device, torch.float32)
    n = lengths(194, 300, 127, 2, device=device)
    truth = ops.decode_attention(q.double(), k.double(), v.double(), n, window=window, backend=REFERENCE)
    plan = kernels._plan
    for splits in (1, 2, 3, 17):
        monkeypatch.setattr(kernels, "_plan", lambda *args, n=splits: plan(*args)._replace(splits=n))
        out = ops.decode_attention(q, k, v, n, window=window, backend="triton")
        torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)


def test_splits_keep_the_processors_busy() -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.decode_attention")
    for tasks in (1, 8, 12, 66, 70, 128, 140, 512, 5000):
        for tiles in (0, 1, 2, 16, 256, 2048):
            splits = kernels._splits(tasks, tiles, 64, 132)
            assert max(1, tiles / 64) <= splits <= max(1, tiles)
            if tasks * tiles >= 132 * 16:
                time = math.ceil(tasks * splits / 132) * math.ceil(tiles / splits)
                assert tasks * tiles / 132 / time > 0.85
    assert [kernels._splits(tasks, 256, 64, 132) for tasks in (8, 32, 128)] == [16, 4, 4]
    assert kernels._splits(128, 192, 64, 132) == 4  # not 3, of which a processor would run two, then one


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [0, 16])
def test_a_graph_replays_with_other_lengths_and_pages(page_size: int, device: str) -> None:
    pytest.importorskip("triton")
    case = DecodeAttentionCase(4, 2, 4096, 8, 2, 128, page_size)
    q, k, v = make_inputs(case, device, torch.bfloat16)
    n, table = lengths(4096, 1, 70, 0, device=device), case.block_table(torch.device(device))

    def run() -> Tensor:
        return ops.decode_attention(q, k, v, n, block_table=table, backend="triton")

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    n.copy_(lengths(3, 4096, 0, 2222, device=device))
    if table is not None:
        table.copy_(table.flip(0))
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, run())
    if table is not None:
        table.copy_(table.flip(0))  # other tests share it


@pytest.mark.gpu
def test_lengths_compile_nothing(device: str) -> None:
    pytest.importorskip("triton")
    kernels = importlib.import_module("llmfast.kernels.decode_attention")
    compiled = set()
    for batch, capacity in ((1, 4096), (2, 4096), (3, 5000), (4, 8192)):
        q, k, v = make_inputs(DecodeAttentionCase(batch, 1, capacity, 8, 2, 128), device, torch.bfloat16)
        for n in (1, 16, 17, capacity):
            ops.decode_attention(q, k, v, lengths(*[n] * batch, device=device), backend="triton")
        (cache,) = [c[0] for c in kernels._decode_kernel.device_caches.values()]
        compiled.add(len(cache))
    assert len(compiled) == 1


@pytest.mark.gpu
def test_caches_beyond_2_31_elements(device: str) -> None:
    """The last page, and the last key of the second sequence, lie past what 32 bits can address."""
    pytest.importorskip("triton")
    pages, page = 2**31 // (256 * 128) + 3, 256
    cache = torch.zeros(pages, page, 1, 128, dtype=torch.bfloat16, device=device)
    case = DecodeAttentionCase(1, 1, 2 * page, 8, 1, 128, page)
    q, k, v = make_inputs(case, device, torch.bfloat16)
    cache[-2:] = k
    table = torch.tensor([[pages - 2, pages - 1]], dtype=torch.int32, device=device)
    n = lengths(2 * page, device=device)
    out = ops.decode_attention(q, cache, cache, n, block_table=table, backend="triton")
    small = torch.tensor([[0, 1]], dtype=torch.int32, device=device)
    assert torch.equal(out, ops.decode_attention(q, k, k, n, block_table=small, backend="triton"))
    one = cache.flatten(0, 1)[None]
    far = ops.decode_attention(q, one, one, lengths(one.shape[1], device=device), backend="triton")
    truth = ops.decode_attention(
        q.float(), k[:, :, :].flatten(0, 1)[None].float(), k.flatten(0, 1)[None].float(), n, backend=REFERENCE
    )
    weight = (q[:, 0].float() @ k.flatten(0, 2).float().T / 128**0.5).exp().sum(-1)  # of the keys that are not zeros
    zeros = one.shape[1] - 2 * page
    torch.testing.assert_close(far.float(), truth * (weight / (weight + zeros))[:, None, :, None], rtol=0.02, atol=1e-5)
