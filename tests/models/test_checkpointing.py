"""Activation checkpointing: the same bits with and without it, from less memory."""

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from llmfast import ops
from llmfast.models import GPT, preset

SHAPES = {
    "rope, layer norm": ("tiny", {}),
    "learned, tied": ("gpt2", {"n_head": 2, "n_kv_head": 2, "head_dim": 16, "d_model": 32, "d_mlp": 128}),
    "grouped, gated, rms norm": ("tiny", {"n_head": 4, "n_kv_head": 2, "norm": "rms_norm", "mlp": "swiglu"}),
}


def make(again: bool, shape: str = "rope, layer norm", dtype: torch.dtype = torch.float32, **changes: Any) -> GPT:
    name, fields = SHAPES[shape]
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "context_length": 32, "n_layer": 4, "dropout": 0.2}
    model = GPT(preset(name, **(sizes | fields | changes)), dtype)
    model.activation_checkpointing = again
    return model


def ids() -> Tensor:
    return torch.randint(0, 64, (4, 33), generator=torch.Generator().manual_seed(1))


def passes(model: GPT) -> tuple[Tensor, list[Tensor], int]:
    """Loss and gradients of two passes, whose dropout differs, and bytes kept for the second one's backward pass."""
    batch, kept = ids(), {}

    def keep(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    torch.manual_seed(2)
    first = model.loss(batch[:, :-1], batch[:, 1:])
    first.backward()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        second = model.loss(batch[:, :-1], batch[:, 1:])
    for parameter in model.parameters():  # kept in any case
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    second.backward()
    assert not torch.equal(first, second)
    return second.detach(), [p.grad for p in model.parameters() if p.grad is not None], sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_from_less_memory(shape: str, dtype: torch.dtype) -> None:
    (loss, grads, kept), (loss2, grads2, kept2) = (passes(make(again, shape, dtype)) for again in (False, True))
    assert torch.equal(loss, loss2)
    assert len(grads) == len(grads2) > 10
    assert all(torch.equal(a, b) for a, b in zip(grads, grads2, strict=True))
    assert kept2 < kept / 3  # of four blocks the inputs, two values of the dozen a block keeps


def test_a_block_runs_twice_when_trained_and_once_else() -> None:
    model, batch, calls = make(True), ids()[:, :32], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = model.loss(batch, batch)
    assert len(calls) == 4
    loss.backward()
    assert len(calls) == 8
    with torch.no_grad():
        model(batch)
    assert len(calls) == 12


def test_the_second_run_has_the_first_ones_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another thread, too, where a GPU's backward pass runs: the choice of backend is a thread's own."""
    seen = []
    real = ops.reference.attention

    def spy(*args: Any, **options: Any) -> Tensor:
        seen.append(threading.current_thread().name)
        return real(*args, **options)

    monkeypatch.setattr(ops.reference, "attention", spy)
    model, batch = make(True), ids()
    with ops.use_backend("reference"):
        loss = model.loss(batch[:, :-1], batch[:, 1:])
    thread = threading.Thread(target=loss.backward, name="backward")
    thread.start()
    thread.join()
    assert seen == ["MainThread"] * 4 + ["backward"] * 4
    assert all(p.grad is not None for p in model.parameters())


def test_compiles() -> None:
    plain, model, batch = make(False, dropout=0.0), make(True, dropout=0.0), ids()
    compiled = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
    compiled(batch[:, :-1], batch[:, 1:]).backward()
    plain.loss(batch[:, :-1], batch[:, 1:]).backward()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
