"""scaled_dot_product_attention means what PyTorch's does, whichever of the two runs."""

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmfast import nn, ops
from llmfast.errors import BackendError
from llmfast.native import library
from llmfast.nn import functional

sdpa = functional.scaled_dot_product_attention


@pytest.fixture(autouse=True)
def warns_anew() -> None:
    functional._warn_once.cache_clear()
    try:
        library.load("cpu")  # all of it runs on the CPU
    except BackendError as error:
        pytest.skip(str(error))


def tensors(shape: tuple[int, ...] = (2, 4, 9, 16), kv: tuple[int, ...] | None = None, **options: Any) -> list[Tensor]:
    return [torch.randn(s, **options) for s in (shape, kv or shape, kv or shape)]


def assert_same(inputs: list[Tensor], **options: Any) -> None:
    """Outputs and gradients are PyTorch's."""
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        out = function(*leaves, **options)
        grads = torch.autograd.grad(out, leaves, torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out))
        results.append([out.detach(), *grads])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


OURS = {
    "plain": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({}, {"is_causal": True, "scale": 0.7}),
    "more keys": ({"kv": (2, 4, 13, 16)}, {}),
    "more keys, causal from the top left": ({"kv": (2, 4, 13, 16)}, {"is_causal": True}),
    "more queries": ({"kv": (2, 4, 5, 16)}, {}),
    "shared heads": ({"kv": (2, 2, 9, 16)}, {"is_causal": True, "enable_gqa": True}),
    "one query": ({"shape": (2, 4, 1, 16), "kv": (2, 4, 7, 16)}, {}),
    "one query, causal": ({"shape": (2, 4, 1, 16), "kv": (2, 4, 7, 16)}, {"is_causal": True}),
}
PYTORCHS = {
    "boolean mask": ({}, {"attn_mask": torch.ones(9, 9, dtype=torch.bool).tril()}, "attn_mask"),
    "float mask": ({}, {"attn_mask": torch.linspace(-3, 3, 81).view(9, 9)}, "attn_mask"),
    "more queries, causal": ({"kv": (2, 4, 5, 16)}, {"is_causal": True}, "top left"),
    "three dimensions": ({"shape": (4, 9, 16)}, {"is_causal": True}, "4 dimensions"),
    "broadcast heads": ({"kv": (2, 1, 9, 16)}, {}, "heads"),
    "double": ({"dtype": torch.float64}, {"is_causal": True}, "cpp has no float64 kernel"),
}


@pytest.mark.parametrize(("given", "options"), OURS.values(), ids=OURS)
def test_runs_ours_with_pytorchs_meaning(given: dict[str, Any], options: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.BackendFallbackWarning)
        assert_same(tensors(**given), **options)
    assert "PyTorch's" not in functional.explain(*tensors(**given), **options)


@pytest.mark.parametrize(("given", "options", "reason"), PYTORCHS.values(), ids=PYTORCHS)
def test_falls_back_to_pytorchs_and_says_so_once(given: dict[str, Any], options: dict[str, Any], reason: str) -> None:
    with pytest.warns(ops.BackendFallbackWarning, match=reason):
        assert_same(tensors(**given), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ops.BackendFallbackWarning)
        assert_same(tensors(**given), **options)
    assert reason in functional.explain(*tensors(**given), **options)


STRICT = {"strict": ("auto", True), "cpp": ("cpp", False)}


@pytest.mark.parametrize(("given", "options", "reason"), PYTORCHS.values(), ids=PYTORCHS)
@pytest.mark.parametrize(("backend", "strict"), STRICT.values(), ids=STRICT)
def test_strict_mode_and_a_named_backend_forbid_pytorchs(
    backend: str, strict: bool, given: dict[str, Any], options: dict[str, Any], reason: str
) -> None:
    """As they do the reference to ops."""
    reason = reason.replace("cpp has", "has") if backend == "cpp" else reason
    with ops.use_backend(backend, strict=strict), pytest.raises(BackendError, match=reason):
        sdpa(*tensors(**given), **options)


def test_the_environment_is_strict_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMFAST_STRICT", "1")
    with pytest.raises(BackendError, match="strict mode"):
        sdpa(*tensors(), dropout_p=0.5)


@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_backends_that_attention_has_no_kernels_of_forbid_nothing(backend: str) -> None:
    """As with ops, which then run the reference."""
    with ops.use_backend(backend, strict=True):
        assert_same(tensors(), is_causal=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ops.BackendFallbackWarning)
            assert_same(tensors(), attn_mask=torch.ones(9, 9, dtype=torch.bool).tril())


def test_dropout_is_pytorchs() -> None:
    q, k, v = tensors()
    results = []
    for function in (sdpa, F.scaled_dot_product_attention):
        torch.manual_seed(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ops.BackendFallbackWarning)
            results.append(function(q, k, v, dropout_p=0.5))
    assert torch.equal(*results)


def test_a_single_query_without_gradient_decodes() -> None:
    q, k, v = tensors((3, 4, 1, 16), (3, 2, 21, 16))
    torch.testing.assert_close(
        sdpa(q, k, v, enable_gqa=True), F.scaled_dot_product_attention(q, k, v, enable_gqa=True), rtol=1e-5, atol=1e-6
    )
    assert functional.explain(q, k, v, enable_gqa=True).startswith("decode_attention")
    assert functional.explain(q.requires_grad_(), k, v, enable_gqa=True).startswith("attention")


def test_autocast_casts_as_pytorch_does() -> None:
    """Rotary embedding in float32 leaves queries and keys in float32 beside values in bfloat16."""
    q, k, v = tensors()
    v = v.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = sdpa(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("kv", "options"), [((2, 3, 9, 16), {}), (None, {"dropout_p": -0.5})])
def test_pytorchs_errors_stay(kv: tuple[int, ...] | None, options: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError), warnings.catch_warnings():
        warnings.simplefilter("ignore", ops.BackendFallbackWarning)
        sdpa(*tensors((2, 4, 9, 16), kv), **options)


def test_tensors_without_data_have_shapes() -> None:
    """Of the device meta, which torch.is_autocast_enabled refuses."""
    q, k, v = tensors(device="meta")
    with pytest.warns(ops.BackendFallbackWarning, match="not on meta"):
        assert sdpa(q, k, v, is_causal=True).shape == q.shape
    with ops.use_backend("auto", strict=True):  # there are no kernels to prefer
        assert sdpa(q, k, v, is_causal=True).shape == q.shape


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_without_a_break_and_warns_as_well(masked: bool) -> None:
    q, k, v = tensors()
    mask = torch.ones(9, 9, dtype=torch.bool).tril() if masked else None
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = compiled(q, k, v, mask, is_causal=not masked)
    assert any("attn_mask" in str(w.message) for w in caught) == masked
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
def test_strict_mode_forbids_pytorchs_while_a_compiler_traces() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(sdpa, fullgraph=True, backend="aot_eager")
    with ops.use_backend("auto", strict=True), pytest.raises(Exception, match="strict mode forbids PyTorch's"):
        compiled(*tensors(), torch.ones(9, 9, dtype=torch.bool).tril())


def test_is_exported() -> None:
    assert nn.functional is functional
