"""Rotary positions: the tables of cosines and sines, whatever way a model stretches its context."""

import math
import reprlib
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError

Kind = Literal["linear", "llama3", "yarn"]

# What RopeScaling's numbers may be: far beyond any in use, and the frequencies stay finite.
SMALLEST, LARGEST = 1e-6, 1e6
MAX_ORIGINAL_CONTEXT = 2**31 - 1
_CHUNK = 2**20  # angles computed at once


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are lowered so that a context grows by `factor`.

    `linear` divides all by it (https://arxiv.org/abs/2306.15595). `llama3` and `yarn` keep those that turn often within
    `original_context` tokens, divide those that hardly turn and blend between: `llama3` between `low_freq_factor` and
    `high_freq_factor` turns, smoothly in the number of turns (https://arxiv.org/abs/2407.21783); `yarn` between
    `beta_slow` and `beta_fast` turns, evenly over the dimensions, which `truncate` rounds to whole ones
    (https://arxiv.org/abs/2309.00071). `yarn` also multiplies cosines and sines, by 0.1 ln(factor) + 1 where
    `attention_factor` is None.
    """

    kind: Kind
    factor: float
    original_context: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise InputError(f"RopeScaling.kind is {self.kind!r}; choose one of: {', '.join(get_args(Kind))}")
        numbers = ["factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"]
        for name in [*numbers, *(["attention_factor"] if self.attention_factor is not None else [])]:
            value, least = getattr(self, name), 1.0 if name == "factor" else SMALLEST
            if type(value) not in (int, float) or not least <= value <= LARGEST:
                raise InputError(f"RopeScaling.{name} is {reprlib.repr(value)}; it must be {least:g} to {LARGEST:g}")
        context = self.original_context
        if self.kind != "linear" and (type(context) is not int or not 1 <= context <= MAX_ORIGINAL_CONTEXT):
            wanted = f"{self.kind} needs a length of 1 to {MAX_ORIGINAL_CONTEXT}"
            raise InputError(f"RopeScaling.original_context is {reprlib.repr(context)}; {wanted}")
        if self.low_freq_factor >= self.high_freq_factor or self.beta_slow >= self.beta_fast:
            raise InputError(f"{self}: low_freq_factor and beta_slow must be below high_freq_factor and beta_fast")
        if type(self.truncate) is not bool:
            raise InputError(f"RopeScaling.truncate is {self.truncate!r}; it must be True or False")


def rope_table(length: int, head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """cos and sin of position * frequency, (2, length, D/2) float32; frequency i is theta^(-2i/D), unless scaled.

    https://arxiv.org/abs/2104.09864. Computed in float64, where an angle of many turns keeps its digits, and in chunks:
    that takes little memory beside the table.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    amplitude = 1.0
    if scaling is not None:
        frequencies = _SCALED[scaling.kind](frequencies, theta, scaling)
        amplitude = _amplitude(scaling)
    table = torch.empty(2, length, len(frequencies), dtype=torch.float32)
    rows = max(1, _CHUNK // len(frequencies))
    for start in range(0, length, rows):
        end = min(start + rows, length)
        angles = torch.outer(torch.arange(start, end, dtype=torch.float64), frequencies)
        table[0, start:end] = angles.cos() * amplitude
        table[1, start:end] = angles.sin() * amplitude
    return table


def _amplitude(scaling: RopeScaling) -> float:
    if scaling.kind != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    return 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1.0 else 1.0


def _linear(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    return frequencies / scaling.factor


def _llama3(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    assert scaling.original_context is not None
    turns = scaling.original_context * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    return torch.lerp(frequencies / scaling.factor, frequencies, kept.clamp(0.0, 1.0))


def _yarn(frequencies: Tensor, theta: float, scaling: RopeScaling) -> Tensor:
    context, half, dim = scaling.original_context, len(frequencies), 2 * len(frequencies)
    assert context is not None

    def dimension(turns: float) -> float:
        """The dimension whose frequency turns so often within the original context."""
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    divided = (torch.arange(half, dtype=torch.float64) - low) / (high - low if high != low else 1e-3)
    return torch.lerp(frequencies, frequencies / scaling.factor, divided.clamp(0.0, 1.0))


_SCALED = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
