"""Twins of modules whose code is not ours, without transformers."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llmfast import ops
from llmfast.integrations import modules

Forward = Callable[..., Any]


def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("ops.rope is to run in place of this")


def renames(function: Forward) -> Forward:
    """As transformers 5.24 decorates every attention, for callers that use the old name of an argument."""

    @functools.wraps(function)
    def decorated(*args: Any, **options: Any) -> Any:
        return function(*args, **{name.removeprefix("old_"): value for name, value in options.items()})

    return decorated


def hides(function: Forward) -> Forward:
    """Holds what it calls in a list, not in its closure."""
    held = [function]
    return functools.wraps(function)(lambda *args, **options: held[0](*args, **options))


def attention(*decorators: Callable[[Forward], Forward]) -> nn.Module:
    def forward(self: Any, q: Tensor, *, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin)

    decorated = functools.reduce(lambda inner, decorator: decorator(inner), decorators, forward)
    return type("LlamaAttention", (nn.Module,), {"forward": decorated, "__module__": "transformers.models.llama"})()


def test_attention_inside_decorators_rotates_by_ours_and_they_run() -> None:
    module = attention(renames, renames)
    twin = modules.twin_of(module)
    assert isinstance(twin, tuple) and twin[0] == "ops.rope"
    modules.replace(module, twin, by=0)
    q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
    angles = torch.randn(5, 4)
    tables = {name: f(angles).repeat(1, 2)[None] for name, f in (("cos", torch.cos), ("sin", torch.sin))}
    for ours, x in zip(module(q, old_old_k=k, **tables), (q, k), strict=True):
        expected = ops.rope(x.transpose(1, 2), angles.cos(), angles.sin()).transpose(1, 2)
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)


def test_attention_inside_a_decorator_that_cannot_be_seen_into_is_left() -> None:
    assert modules.twin_of(attention(hides)) == "its forward does not call apply_rotary_pos_emb"
    assert modules.twin_of(attention(renames, hides, renames)) == "its forward does not call apply_rotary_pos_emb"
