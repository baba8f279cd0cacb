"""A linear layer of one vector beyond the shared table: layouts, and sizes of nothing."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast import ops

N, M = 70, 9
VECTORS: dict[str, Callable[[Tensor], Tensor]] = {
    "alone": lambda t: t[0, :N],
    "row": lambda t: t[None, 3:4, 5 : 5 + N],
    "every second": lambda t: t[:1, : 2 * N : 2],
    "column": lambda t: t[:N, :1].t(),
    "one number": lambda t: t[0, :1].expand(1, 1, N),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t[:M, :N].contiguous(),
    "part": lambda t: t[2 : 2 + M, 1 : 1 + N],
    "every third row": lambda t: t[: 3 * M : 3, :N],
    "every second column": lambda t: t[:M, : 2 * N : 2],
    "transposed": lambda t: t[:N, :M].t(),
    "one row": lambda t: t[:1, :N].expand(M, N),
    "one column": lambda t: t[:M, :1].expand(M, N),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("vector", VECTORS.values(), ids=VECTORS)
def test_layouts(
    vector: Callable[[Tensor], Tensor], weight: Callable[[Tensor], Tensor], dtype: torch.dtype, device: str
) -> None:
    pytest.importorskip("triton")
    first, second = torch.randn(2, 2 * N, 2 * N, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    x, w, bias = vector(first), weight(second), second[: 2 * M : 2, 0]
    out = ops.linear(x, w, bias, backend="triton")
    truth = F.linear(x.double(), w.double(), bias.double())
    torch.testing.assert_close(out.double(), truth, rtol=2e-3, atol=1e-2 if dtype is torch.float16 else 1e-4)


@pytest.mark.parametrize("shape, rows", [((0,), 3), ((1, 0), 3), ((1, 5), 0), ((0, 5), 3), ((1, 0, 5), 3)])
def test_sizes_of_nothing(shape: tuple[int, ...], rows: int, device: str) -> None:
    pytest.importorskip("triton")
    x, weight = torch.randn(shape, device=device), torch.randn(rows, shape[-1], device=device)
    assert torch.equal(ops.linear(x, weight, backend="triton"), F.linear(x, weight))
