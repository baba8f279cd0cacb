"""What a caller waits for: a call with small arguments, whose kernels take less time than it takes to launch them."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .accuracy import compare, outputs, upstream
from .bench import contenders
from .cases import Case, make_inputs
from .tables import SMALL_CASES

CALLS, REPEATS = 50, 9


@dataclass(frozen=True)
class Call:
    """Microseconds on the host, calls one after another: forward alone, and with autograd forward and backward."""

    op: str
    case: str
    provider: str
    ours: bool
    forward_us: float | None
    training_us: float | None
    """None where the op has no gradient."""
    note: str = ""


def microseconds(function: Callable[[], object], device: torch.device, calls: int = CALLS) -> float:
    """Median over rounds of the time that a call takes the host, of so few that the GPU's queue never fills."""
    rounds = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        rounds.append((time.perf_counter() - start) / calls)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return 1e6 * statistics.median(rounds[1:])


def measure(op: str, device: torch.device, dtype: torch.dtype, wanted: list[str]) -> Iterator[Call]:
    """Calls of `op` by the `wanted` providers, or all; ours are checked against the truth first."""
    case: Case = SMALL_CASES[op]
    inputs = make_inputs(case, device, dtype)
    grad = torch.randn(case.output, device=device).to(dtype)
    for name, function, ours in contenders(case, device, dtype):
        if wanted and name not in wanted:
            continue
        if isinstance(function, str):
            yield Call(op, case.label, name, ours, None, None, function)
            continue
        if ours:
            wrong = "; ".join(str(c) for c in compare(case, inputs, grad, name) if not c.ok)
            if wrong:
                yield Call(op, case.label, name, ours, None, None, wrong)
                continue

        def train(function: Callable[..., Any] = function) -> object:
            outs = outputs(function(*inputs))
            return torch.autograd.grad(outs, inputs, upstream(outs, grad))

        try:
            with torch.no_grad():
                forward = microseconds(lambda function=function: function(*inputs), device)
            training = microseconds(train, device) if case.differentiable else None
            yield Call(op, case.label, name, ours, forward, training)
        except Exception as error:  # a peer may refuse a shape with any error: the table shows which
            if ours:
                raise
            message = (str(error).splitlines() or [""])[0][:120]
            yield Call(op, case.label, name, ours, None, None, f"{type(error).__name__}: {message}")
