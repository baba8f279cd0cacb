"""Offsets that 32 bits do not hold, where the interpreter shows them: in memory of 2^32 elements of which next to none
is touched. Those of tensors that are really as large are in test_gpu.py."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llmfast import ops

pytest.importorskip("triton")

Spread = Callable[[Tensor, int], Tensor]


@pytest.fixture
def spread(tmp_path: Path, device: str) -> Spread:
    """Gives the same values with a stride of 2^30 elements in one dimension. What lies 2^31 of them or more behind the
    first would, after a wraparound, be looked for as far before it: among zeros. On a CPU a file with holes."""

    def view(values: Tensor, dim: int) -> Tensor:
        size = 2**32 + values.numel()
        if device == "cpu":
            memory = torch.from_file(str(tmp_path / "holes"), shared=True, size=size, dtype=values.dtype)
        else:
            memory = torch.zeros(size, dtype=values.dtype, device=device)
        strides = list(values.stride())
        strides[dim] = 2**30
        return memory.as_strided(values.shape, strides, 2**31).copy_(values)

    return view


def test_softmax_mask(spread: Spread, device: str) -> None:
    """Of columns far apart, as a transposed mask's are."""
    x, mask = torch.randn(2, 3, device=device), torch.tensor([[True, False, True], [True, True, True]], device=device)
    got = ops.softmax(x, mask=spread(mask, 1), backend="triton")
    assert torch.equal(got, ops.softmax(x, mask=mask, backend="triton")) and got[0, 2] > 0


@pytest.mark.parametrize("shape", [(1, 3, 2, 16), (1, 2, 3, 16)], ids=["tokens", "heads"])
def test_decode_attention_queries(shape: tuple[int, ...], spread: Spread, device: str) -> None:
    q, (k, v) = torch.randn(shape, device=device).half(), torch.randn(2, 1, 20, 1, 16, device=device).half()
    far = spread(q, shape.index(3))
    assert torch.equal(
        ops.decode_attention(far, k, v, backend="triton"), ops.decode_attention(q, k, v, backend="triton")
    )
