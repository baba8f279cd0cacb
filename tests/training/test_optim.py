"""Parameter groups, the schedule, and an update that can be skipped on the device."""

import math

import pytest
import torch

from llmfast.errors import CheckpointError, InputError
from llmfast.models import GPT, preset
from llmfast.training import TrainConfig, optim
from llmfast.training.spikes import SpikeDetector


def make_model(dtype: torch.dtype = torch.float32) -> GPT:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "context_length": 16, "bias": True, "tie_embeddings": False, "position": "learned"}
    return GPT(preset("tiny", **shape), dtype)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_each_parameter_has_its_rule(optimizer: str) -> None:
    model = make_model()
    rules = optim.rules(model, optimizer)
    assert list(rules) == [name for name, _ in model.named_parameters()]
    hidden = {n for n in rules if n.split(".")[-2] in ("qkv", "proj", "up", "down") and n.endswith("weight")}
    assert {rules[n] for n in hidden} == {optimizer} and rules["head.weight"] == "adamw"
    assert {rules[n] for n in rules if n not in hidden | {"head.weight"}} == {"adamw without decay"}


def test_a_tied_head_is_an_embedding() -> None:
    model = GPT(preset("tiny"))
    assert model.head is None and optim.rules(model, "adamw")["token_embedding.weight"] == "adamw without decay"


def test_schedule() -> None:
    config = TrainConfig(max_steps=100, learning_rate=2.0, min_lr_ratio=0.1, warmup_steps=4)
    assert [optim.learning_rate(config, n, 0.0) for n in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert optim.learning_rate(config, 50, 0.5) == pytest.approx(2.0 * 0.55)
    assert optim.learning_rate(config, 99, 1.0) == pytest.approx(0.2)
    assert optim.learning_rate(config, 99, 1.3) == pytest.approx(0.2)  # a last step may end past the budget
    rates = [optim.learning_rate(config, 10, p / 50) for p in range(51)]
    assert rates == sorted(rates, reverse=True)
    config = TrainConfig(max_steps=100, learning_rate=2.0, schedule="trapezoid", cooldown=0.2, warmup_steps=4)
    shares = [optim.learning_rate(config, 10, p) for p in (0.0, 0.8, 0.9, 1.0)]
    assert shares == pytest.approx([2.0, 2.0, 2.0 * 0.55, 0.2])


IDS = torch.arange(32).reshape(2, 16)
FINE = torch.zeros(())  # a loss that is finite


def backward(model: GPT) -> None:
    model.zero_grad()
    model.loss(IDS, IDS.flip(0)).backward()


def test_step_equals_plain_adamw() -> None:
    model, plain = make_model(), make_model()
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1, weight_decay=0.3, grad_clip=math.inf))
    rules = optim.rules(plain, "adamw")
    groups = [
        {"params": [p for n, p in plain.named_parameters() if rules[n] == rule], "weight_decay": decay}
        for rule, decay in (("adamw", 0.3), ("adamw without decay", 0.0))
    ]
    reference = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for number, rate in enumerate((1e-2, 5e-3, 1e-3), 1):
        backward(model)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        norm, made = optimizer.step(rate, number, FINE)
        assert made == 1.0
        assert norm == pytest.approx(torch.nn.utils.get_total_norm([q.grad for q in plain.parameters()]).item())  # type: ignore
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


def test_masters_keep_what_16_bits_would_lose() -> None:
    """Updates far smaller than a bfloat16 weight's last digit add up, and reach the weights that the model uses."""
    model = GPT(preset("tiny", vocab_size=64, context_length=16), torch.bfloat16)
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1, weight_decay=0.0))
    assert {p.dtype for p in model.parameters() if p.dim() >= 2} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.dim() < 2} == {torch.float32}
    up = optimizer.weights["blocks.0.mlp.up.weight"]
    up.master.fill_(1.0)
    for number in range(1, 101):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step(1e-4, number, FINE)
    assert up.master.mean().item() == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(up.parameter, up.master.bfloat16())
    assert optimizer.masters()["blocks.0.mlp.up.weight"] is up.master
    optimizer.release()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert up.parameter.data_ptr() == up.master.data_ptr()


def test_gradients_of_batches_add_up_in_float32() -> None:
    model = GPT(preset("tiny", vocab_size=64, context_length=16), torch.bfloat16)
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1))
    for value in (1.0, 2**-10):  # whose sum has no bfloat16
        for p in model.parameters():
            p.grad = torch.full_like(p, value)
        optimizer.add_gradients()
    assert {w.gradient.dtype for w in optimizer.weights.values()} == {torch.float32}
    assert all((w.gradient == 1.0 + 2**-10).all() for w in optimizer.weights.values())
    optimizer.step(1e-3, 1, FINE)
    assert all(w.total is None for w in optimizer.weights.values())


def test_muon_steps_are_orthogonal_and_as_large_as_adamws() -> None:
    model = make_model()
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1, optimizer="muon", weight_decay=0.0))
    before = {n: w.master.clone() for n, w in optimizer.weights.items()}
    backward(model)
    optimizer.step(1e-2, 1, FINE)
    for name, w in optimizer.weights.items():
        change = (w.master - before[name]) / 1e-2
        if "momentum" in w.state:
            values = torch.linalg.svdvals(change) / (0.2 * max(change.shape) ** 0.5)
            assert 0.5 < values[:8].min() and values.max() < 1.3, name  # 32 tokens' gradients have a rank of 31
            assert 0.1 < change.square().mean().sqrt() < 0.3
            assert (change * model.get_parameter(name).grad).sum() < 0  # downhill
    assert {len(w.state) for w in optimizer.weights.values()} == {1, 2}


def test_muon_learns() -> None:
    """Falls at least as fast as AdamW at the same rate on a model that both can learn."""
    losses = {}
    for name in ("adamw", "muon"):
        model = make_model()
        optimizer = optim.Optimizer(model, TrainConfig(max_steps=1, optimizer=name))
        for number in range(1, 31):
            backward(model)
            optimizer.step(3e-3, number, FINE)
        losses[name] = model.loss(IDS, IDS.flip(0)).item()
    assert losses["muon"] < 1.0 and losses["muon"] < 1.1 * losses["adamw"], losses


@pytest.mark.parametrize("before", [0, 2])  # the very first update, and a later one
@pytest.mark.parametrize("bad", ["loss", "gradient"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_a_skipped_step_changes_nothing(before: int, bad: str, dtype: torch.dtype, rule: str) -> None:
    model = make_model(dtype)
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1, optimizer=rule))  # type: ignore[arg-type]
    for number in range(before):
        backward(model)
        optimizer.step(1e-2, number + 1, FINE)
    state = {n: t.clone() for n, t in (optimizer.masters() | optimizer.state()).items()}
    weights = [p.detach().clone() for p in model.parameters()]
    backward(model)
    if bad == "gradient":
        for p in model.parameters():
            assert p.grad is not None
            p.grad[...] = float("nan")
    outcome = optimizer.step(1e-2, before + 1, torch.tensor(float("nan")) if bad == "loss" else FINE)
    assert outcome[1] == 0.0
    after = optimizer.masters() | optimizer.state()
    assert all(torch.equal(after[n], t) for n, t in state.items())
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights, strict=True))
    backward(model)
    optimizer.step(1e-2, before + 2, FINE)
    assert all(not torch.equal(p, w) and p.isfinite().all() for p, w in zip(model.parameters(), weights, strict=True))


def test_a_gradient_that_stands_out_is_left_out_and_not_learned_from() -> None:
    """Judged after 50 updates, by their mean and deviation; a slow rise is no spike."""
    detector, fine = SpikeDetector(6.0, torch.device("cpu")), torch.tensor(True)
    generator = torch.Generator().manual_seed(0)

    def norm(scale: float = 1.0) -> torch.Tensor:
        return scale * (2.0 + 0.1 * torch.randn((), generator=generator))

    assert detector.judge(norm(100.0), fine)  # nothing to compare it with yet
    detector = SpikeDetector(6.0, torch.device("cpu"))
    norms = [norm() for _ in range(60)]
    assert all(detector.judge(n, fine) for n in norms)
    count, mean, variance = detector.seen.tolist()
    assert count == 60 and mean == pytest.approx(2.0, abs=0.05) and variance**0.5 == pytest.approx(0.1, rel=0.3)
    assert not detector.judge(norm(2.0), fine) and not detector.judge(norm(), torch.tensor(False))
    assert detector.seen.tolist() == [count, mean, variance]
    assert all(detector.judge(norm(1.0 + i / 200), fine) for i in range(100))
    off = SpikeDetector(math.inf, torch.device("cpu"))
    assert all(off.judge(n, fine) for n in [*norms, norm(1e6)])


def test_norms_seen_are_part_of_the_state() -> None:
    model = make_model()
    optimizer = optim.Optimizer(model, TrainConfig(max_steps=1))
    backward(model)
    optimizer.step(1e-3, 1, FINE)
    seen = optimizer.spikes.seen.clone()
    assert seen[0] == 1.0 and seen[1] > 0.0
    fresh = optim.Optimizer(make_model(), TrainConfig(max_steps=1))
    fresh.load(optimizer.masters(), optimizer.state())
    assert torch.equal(fresh.spikes.seen, seen)
    old = {name: value for name, value in optimizer.state().items() if name != "gradient norms"}
    fresh.load(optimizer.masters(), old)
    assert fresh.spikes.seen[0] == 0.0


def test_state_of_another_model_is_refused() -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match="token_embedding.weight/exp_avg"):
        optim.Optimizer(model, TrainConfig(max_steps=1)).load(model.state_dict(), {})


@pytest.mark.parametrize(
    "field, value",
    [
        ("max_steps", 0),
        ("batch_size", -1),
        ("learning_rate", float("nan")),
        ("grad_clip", 0.0),
        ("min_lr_ratio", 2.0),
        ("budget_seconds", 0.0),
        ("betas", (0.9, 1.0)),
    ],
)
def test_config_refuses(field: str, value: object) -> None:
    with pytest.raises(InputError, match=f"TrainConfig.{field}"):
        TrainConfig(**({"max_steps": 5} | {field: value}))  # type: ignore


def test_config_round_trip() -> None:
    config = TrainConfig(max_steps=5, betas=(0.8, 0.9), budget_seconds=3.0)
    assert TrainConfig.from_dict(config.to_dict()) == config
    with pytest.raises(InputError, match="unknown TrainConfig fields: colour"):
        TrainConfig.from_dict({"max_steps": 5, "colour": 1})
    with pytest.raises(InputError, match="incomplete TrainConfig"):
        TrainConfig.from_dict({})
