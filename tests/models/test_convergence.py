"""A small GPT learns the same with our kernels as with the reference: equal losses at every step, and falling ones."""

import importlib
from typing import NamedTuple

import pytest
import torch

from llmfast import ops
from llmfast.models import GPT, Config

STEPS = 100


class Run(NamedTuple):
    """What is trained, and how far apart two loss curves may be, relative to the loss: at any step, and on average.

    A step's loss differs by the rounding of its forward pass, some eps relative (6e-8 in float32, 2^-9 = 2e-3 per
    activation in bfloat16, which the mean over the tokens reduces), and by the drift of the weights. AdamW moves a
    weight by the learning rate whatever its gradient's size, so rounding turns the steps of weights whose gradient is
    near zero; the loss is flat there, and feels it to second order only, while the learning rate is small. Two PyTorch
    implementations of the same ops, trained so on a CPU, differ by 3e-7 at worst in float32, 1.5e-3 in bfloat16 (mean
    3e-4), and at ten times the learning rate by 0.3 in both. The bounds leave room for a GPU's order of summation.
    """

    config: Config
    batch: int
    learning_rate: float
    dtype: torch.dtype
    worst: float
    mean: float


def small(context: int, n_layer: int, n_head: int, head_dim: int) -> Config:
    d = n_head * head_dim
    return Config(40, context, n_layer, n_head, n_head, head_dim, d, 4 * d)


INTERPRETED = Run(small(16, 1, 2, 16), 1, 3e-3, torch.float32, worst=1e-5, mean=2e-6)
ON_A_GPU = [
    Run(small(128, 4, 4, 64), 16, 3e-4, torch.float32, worst=1e-4, mean=1e-5),
    Run(small(128, 4, 4, 64), 16, 3e-4, torch.bfloat16, worst=1e-2, mean=2e-3),
]


def losses(run: Run, backend: str, device: str) -> torch.Tensor:
    """Of each of STEPS steps on a fixed pattern that repeats every 7 tokens, each batch at another place in it."""
    torch.manual_seed(0)
    model = GPT(run.config, run.dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate)
    pattern = torch.tensor([3, 17, 4, 31, 8, 22, 9], device=device)
    where = torch.arange(run.config.context_length + 1, device=device)
    collected = []
    for step in range(STEPS):
        starts = torch.arange(run.batch, device=device)[:, None] * 3 + step
        text = pattern[(starts + where) % len(pattern)]
        with ops.use_backend(backend):
            loss = model.loss(text[:, :-1], text[:, 1:])
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        collected.append(loss.detach())
    return torch.stack(collected).double().cpu()


def check(run: Run, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    launches = {"attention": 0, "norm": 0, "norm with residual": 0}
    for name, module, function in (
        ("attention", "attention", "attention_bwd"),
        ("norm", "norm", "layer_norm_bwd"),
        ("norm with residual", "norm", "add_layer_norm_bwd"),
    ):
        kernels = importlib.import_module(f"llmfast.kernels.{module}")
        launch = getattr(kernels, function)

        def counted(*args: object, launch=launch, name: str = name) -> object:
            launches[name] += 1
            return launch(*args)

        monkeypatch.setattr(kernels, function, counted)
    expected = losses(run, "reference", device)
    assert set(launches.values()) == {0}
    got = losses(run, "triton", device)
    layers = run.config.n_layer
    assert launches == {"attention": STEPS * layers, "norm": STEPS, "norm with residual": STEPS * 2 * layers}
    assert got[-1] < got[0] / 2 and expected[-1] < expected[0] / 2
    difference = (got - expected).abs() / expected
    assert difference.max() < run.worst and difference.mean() < run.mean, difference


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the larger ones")
def test_converges_alike_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    check(INTERPRETED, "cpu", monkeypatch)


@pytest.mark.gpu
@pytest.mark.parametrize("run", ON_A_GPU, ids=lambda run: str(run.dtype).removeprefix("torch."))
def test_converges_alike_on_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(run, "cuda", monkeypatch)
