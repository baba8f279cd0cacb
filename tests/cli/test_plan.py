"""What a run will cost: memory beside measured peaks, the batch that fits, and the time to expect."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmfast.cli.defaults import DEFAULTS
from llmfast.cli.plan import MEMORY_SHARE, Plan, expected_time, make_plan, memory_bytes
from llmfast.errors import InputError
from llmfast.hardware import Device
from llmfast.models import GPT
from llmfast.training import optim
from llmfast.training.gradients import Gradients

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GIB = 2**30


def plan(kind: str = "cuda", memory: int | None = 80 * GIB, preset: str = "gpt2", **options: Any) -> Plan:
    return make_plan(Device(kind, "", None, None, memory, None, None), preset, "bfloat16", "data", None, **options)


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*/step-gpt2-*.json")), ids=lambda path: path.stem)
def test_memory_is_that_of_measured_steps(file: Path) -> None:
    measured = json.loads(file.read_text())
    options = {"preset": measured["model"], "batch_size": measured["batch_size"], "context": measured["context"]}
    for run in measured["runs"]:
        if run["name"].startswith("llmfast"):
            ours = plan(**options, fp8=run["name"] == "llmfast fp8")
            assert memory_bytes(ours) == pytest.approx(run["peak_bytes"], rel=0.1)


def test_there_are_measured_steps() -> None:
    assert len(list(RESULTS.glob("*/step-gpt2-*.json"))) >= 2


@pytest.mark.parametrize("again", [False, True])
def test_memory_kept_between_passes(again: bool) -> None:
    """On the CPU, whose kernels keep an MLP's activations, too, which a GPU makes again."""
    ours = plan("cpu", preset="mini", batch_size=4, context=64, activation_checkpointing=again)
    model, kept, ids = GPT(ours.model, torch.bfloat16), {}, torch.zeros(4, 64, dtype=torch.int64)
    optim.Optimizer(model, ours.training)  # which gives the model its matrices in 16 bits
    model.activation_checkpointing = again

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        _ = model.loss(ids, ids)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    measured = sum(size for pointer, size in kept.items() if pointer not in weights)
    d, d_mlp, n_layer = 192, 768, 4
    made_later, activated = (8 * d + d_mlp, 0) if again else (0, n_layer * d_mlp)  # values a token
    estimate = memory_bytes(ours) - 16 * ours.model.n_params + (activated - made_later) * 4 * 64 * 2
    assert measured == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize("accumulation, each", [(1, 16), (2, 20)])
def test_memory_of_parameters(accumulation: int, each: int) -> None:
    """Weights in 16 bits and their masters, gradients and their sum, and AdamW's moments, while a step is made."""
    ours = plan("cpu", preset="mini", batch_size=1, context=1, accumulation=accumulation)
    model = GPT(ours.model, torch.bfloat16)
    optimizer, ids = optim.Optimizer(model, ours.training), torch.zeros(1, 1, dtype=torch.int64)
    model.loss(ids, ids).backward()
    if accumulation > 1:
        optimizer.add_gradients()
    tensors = [t for w in optimizer.weights.values() for t in (w.parameter, w.parameter.grad, w.master, w.total)]
    tensors += [t for w in optimizer.weights.values() for t in w.state.values()]
    measured = sum({t.data_ptr(): t.nbytes for t in tensors if t is not None}.values())
    assert measured == pytest.approx(each * ours.model.n_params, rel=0.01)
    assert memory_bytes(ours) == pytest.approx(measured, rel=0.01)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"accumulation": 2}], ids=str)
def test_memory_on_a_gpu(options: dict[str, Any]) -> None:
    ours = plan(preset="small", context=512, batch_size=64, **options)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = GPT(ours.model, torch.bfloat16).to("cuda")
    model.activation_checkpointing = ours.training.activation_checkpointing
    optimizer, gradients = optim.Optimizer(model, ours.training), Gradients(model, False)
    batch = torch.randint(0, ours.model.vocab_size, (64, 513))
    for number in (1, 2):
        for _ in range(ours.training.accumulation):
            loss = gradients(batch, 1.0)
            if ours.training.accumulation > 1:
                optimizer.add_gradients()
        optimizer.step(1e-3, number, loss)
    assert memory_bytes(ours) == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.25)


@pytest.mark.parametrize("context", [64, 1024])
@pytest.mark.parametrize("gib", [1, 4, 7, 24, 80])
@pytest.mark.parametrize("again", [False, True])
def test_auto_is_the_largest_power_of_two_that_fits(gib: int, context: int, again: bool) -> None:
    options = {"context": context, "activation_checkpointing": again}
    found = plan(memory=gib * GIB, batch_size="auto", **options).training.batch_size
    assert found == 2 ** int(math.log2(found))
    fits = lambda size: (  # noqa: E731
        memory_bytes(plan(batch_size=size, **options)) <= MEMORY_SHARE * gib * GIB
        and size * context <= DEFAULTS["cuda"].auto_tokens
    )
    assert (fits(found) or found == 1) and not fits(2 * found)


def test_auto_with_other_options() -> None:
    small, large = (plan(memory=gib * GIB, batch_size="auto", context=1024).training for gib in (8, 80))
    assert (small.batch_size, large.batch_size) == (16, 64)
    again = plan(memory=8 * GIB, batch_size="auto", context=1024, activation_checkpointing=True).training
    assert again.batch_size == 64
    assert plan(memory=1, batch_size="auto").training.batch_size == 1  # which training will say does not fit
    assert plan("cpu", None, "mini", batch_size="auto").training.tokens_per_step == DEFAULTS["cpu"].auto_tokens
    fixed = plan(memory=80 * GIB, batch_size="auto", context=1024, accumulation=2, tokens=10**6).training
    assert (fixed.accumulation, fixed.max_steps) == (2, math.ceil(10**6 / (64 * 2 * 1024)))
    with pytest.raises(InputError, match="batch_size is 'all'"):
        plan(batch_size="all")


def seconds(line: str) -> float:
    match = re.search(r"about (?:(\d+):)?(\d+):(\d+)", line)
    assert match is not None
    return 3600 * int(match[1] or 0) + 60 * int(match[2]) + int(match[3])


def test_expected_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the published peak in bfloat16, by a measured one else; GPT-2's 0.8 GFLOP a token (nanoGPT says 0.86)."""
    import llmfast.cli.plan as module

    where = torch.device("cuda")
    monkeypatch.setattr(module.hardware, "describe", lambda where: Device("cuda", "", None, None, None, 989e12, None))
    monkeypatch.setattr(module, "matrix_product_flops", lambda where, dtype: 50e12)
    options = {"batch_size": 64, "context": 1024, "max_steps": 10_000}
    line = expected_time(plan(**options), where)
    assert seconds(line) == pytest.approx(10_000 * 65_536 * 0.8e9 / (0.4 * 989e12), rel=0.01)
    assert line.endswith("at 40% of the 989 TFLOP/s published for bfloat16 products") and "\n" not in line
    again = expected_time(plan(activation_checkpointing=True, **options), where)
    assert seconds(again) == pytest.approx(seconds(line) * 4 / 3, rel=0.01)
    budget = expected_time(plan(budget_seconds=132.5, **options), where)
    assert "about 2:12, enough for 1,003 steps, at 40%" in budget
    slow = make_plan(Device("cuda", "", None, None, None, None, None), "gpt2", "float32", "data", None, **options)
    assert seconds(expected_time(slow, where)) == pytest.approx(seconds(line) * 989 / 50, rel=0.01)
    assert "at 40% of the 50 TFLOP/s measured now for float32 products" in expected_time(slow, where)
