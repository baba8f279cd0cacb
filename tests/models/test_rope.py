"""Tables of rotations: their base, and the three ways of stretching them."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llmfast.errors import InputError
from llmfast.models import rope
from llmfast.models.rope import RopeScaling, rope_table

LENGTH, DIM, THETA = 50, 16, 1e4


def frequencies(scaling: RopeScaling | None) -> Tensor:
    """From the table's second row, whose angles are below pi."""
    cos, sin = rope_table(LENGTH, DIM, THETA, scaling).double()
    return torch.atan2(sin[1], cos[1])


PLAIN = torch.tensor([THETA ** (-i / DIM) for i in range(0, DIM, 2)], dtype=torch.float64)


def test_plain() -> None:
    table = rope_table(LENGTH, DIM, THETA, None)
    assert table.shape == (2, LENGTH, DIM // 2) and table.dtype is torch.float32
    for position in (0, 1, 49):
        torch.testing.assert_close(table[0, position].double(), (PLAIN * position).cos(), rtol=0, atol=1e-7)
        torch.testing.assert_close(table[1, position].double(), (PLAIN * position).sin(), rtol=0, atol=1e-7)


class Largest(TorchDispatchMode):
    """Elements of the largest float64 tensor that an operator gave."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.dtype is torch.float64:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("length", [1, 64, 1000])
@pytest.mark.parametrize("dim", [2, 6, 128])
@pytest.mark.parametrize("scaling", [None, RopeScaling("yarn", 4.0, original_context=640)])
def test_chunks(length: int, dim: int, scaling: RopeScaling | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no bit, and no float64 tensor is larger; one row may be."""
    whole = rope_table(length, dim, THETA, scaling)
    for chunk in (1, 7, 4096):
        monkeypatch.setattr(rope, "_CHUNK", chunk)
        with Largest() as seen:
            assert torch.equal(rope_table(length, dim, THETA, scaling), whole)
        assert seen.elements <= max(chunk, dim // 2)


def test_a_million_positions() -> None:
    """On the meta device, which has no memory: less than a hundredth of the table is float64."""
    with torch.device("meta"), Largest() as seen:
        assert rope_table(2**20, 256, THETA, None).numel() == 2**28
    assert 0 < seen.elements < 2**28 / 100


def test_linear() -> None:
    torch.testing.assert_close(frequencies(RopeScaling("linear", 4.0)), PLAIN / 4, rtol=1e-6, atol=1e-9)


def test_llama3_keeps_what_turns_often() -> None:
    """High frequencies stay, low ones are divided, and between there is a blend."""
    context = 2000
    scaled = frequencies(RopeScaling("llama3", 8.0, original_context=context)) / PLAIN
    turns = context * PLAIN / (2 * math.pi)
    torch.testing.assert_close(scaled[turns > 4], torch.ones(int((turns > 4).sum())).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        scaled[turns < 1], torch.full((int((turns < 1).sum()),), 1 / 8).double(), rtol=1e-5, atol=0
    )
    between = (turns > 1) & (turns < 4)
    assert between.any() and (turns > 4).any() and (turns < 1).any()
    kept = (turns[between] - 1) / 3
    torch.testing.assert_close(scaled[between], kept + (1 - kept) / 8, rtol=1e-5, atol=0)


def test_yarn() -> None:
    """Its frequencies fall from kept to divided, and its amplitude grows with the factor unless it is given."""
    scaling = RopeScaling("yarn", 4.0, original_context=2000)
    ratio = frequencies(scaling) / PLAIN
    assert ratio[0] == pytest.approx(1.0) and ratio[-1] == pytest.approx(1 / 4, rel=1e-5)
    assert (ratio.diff() <= 1e-6).all() and ((ratio > 0.3) & (ratio < 0.95)).any()
    assert rope_table(LENGTH, DIM, THETA, scaling)[0, 0, 0].item() == pytest.approx(0.1 * math.log(4) + 1)
    given = RopeScaling("yarn", 4.0, original_context=2000, attention_factor=1.5)
    assert rope_table(LENGTH, DIM, THETA, given)[0, 0, 0].item() == 1.5


def test_refusals() -> None:
    for factor, shown in ((-1.0, "-1"), (0.5, "0.5"), (5e-324, "5e-324"), (1e300, "1e"), (10**400, "1000.*0")):
        with pytest.raises(InputError, match=f"RopeScaling.factor is {shown}.*; it must be 1 to 1e") as raised:
            RopeScaling("linear", factor)
        assert len(str(raised.value)) < 200
    for context in (0, 10**400, 2.0, None):
        with pytest.raises(InputError, match="original_context is .*; yarn needs a length of 1 to 2147483647"):
            RopeScaling("yarn", 2.0, original_context=context)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="must be below"):
        RopeScaling("llama3", 2.0, original_context=8, low_freq_factor=4.0)
    with pytest.raises(InputError, match="attention_factor is 0"):
        RopeScaling("yarn", 2.0, original_context=8, attention_factor=0.0)
