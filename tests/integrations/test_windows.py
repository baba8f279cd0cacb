"""Sliding windows of transformers' models run by ours, and what is more than a window by transformers."""

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from llmfast import ops  # noqa: E402
from llmfast.nn import functional  # noqa: E402

from .test_transformers import CACHE, assert_equal, assert_same_step, make, make_ours, padding, tokens  # noqa: E402


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """The ops that computed attention from here on, and their windows."""
    seen: list[tuple[str, int | None]] = []
    run = functional.run

    def noted(op: str, backend: str | None, args: tuple[Any, ...]) -> Any:
        if "attention" in op:
            seen.append((op, args[5 if op == "attention" else 6]))
        return run(op, backend, args)

    monkeypatch.setattr(functional, "run", noted)
    return seen


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
@pytest.mark.parametrize("side", [None, "right"])
def test_windows_train_by_ours(name: str, side: str | None, windows: list[tuple[str, int | None]]) -> None:
    """As transformers' own masks, also beside padding that no token sees."""
    x = tokens()
    mask = None if side is None else padding(side)
    labels = x if mask is None else x.masked_fill(mask == 0, -100)
    with ops.use_backend("reference"):
        assert_same_step(make_ours(name), make(name), input_ids=x, attention_mask=mask, labels=labels)
    kinds = {"mistral": [5, 5], "gemma3": [5, None]}
    assert windows == [("attention", window) for window in kinds[name]]


@pytest.mark.parametrize("name", ["mistral", "gemma3"])
def test_windows_generate_by_ours(name: str, windows: list[tuple[str, int | None]]) -> None:
    """From prompts shorter than the window, as long, and longer."""
    theirs, ours = make(name, "eager").eval(), make_ours(name).eval()
    for length in (3, 5, 9):
        options: dict[str, Any] = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
        x = tokens(length=length)
        mask = torch.ones_like(x)
        with ops.use_backend("reference"), torch.no_grad():
            got = ours.generate(x, attention_mask=mask, **options)
        assert torch.equal(got, theirs.generate(x, attention_mask=mask, **options))
        assert len(windows) == 2 * 9  # every layer and token
        assert ("decode_attention", 5) in windows and (("attention", 5) in windows) is (length >= 5)
        windows.clear()


def test_windows_of_more_than_the_keys_before_are_masks(windows: list[tuple[str, int | None]]) -> None:
    """Packed sequences, several tokens after a cache, padding on the left: by transformers, with the same results."""
    x, model, theirs = tokens(), make_ours("mistral"), make("mistral")
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(3, -1)
    for inputs in ({"position_ids": positions, "use_cache": False}, {"attention_mask": padding("left")}):
        valid = inputs.get("attention_mask", torch.ones_like(x)).bool()
        assert_equal(*(m(input_ids=x, **inputs).logits[valid] for m in (model, theirs)))
    results = []
    for m in (model, theirs):
        first = m(input_ids=x[:, :7], use_cache=True)
        windows.clear()
        results.append(m(input_ids=x[:, 7:], **{CACHE: first[CACHE]}).logits)
    assert_equal(*results)
    assert windows == []
