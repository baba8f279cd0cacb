"""Parameter groups, the schedule, and an update that can be skipped on the device."""

import pytest
import torch

from llmfast.errors import CheckpointError, InputError
from llmfast.models import GPT, preset
from llmfast.training import TrainConfig, optim


def make_model() -> GPT:
    torch.manual_seed(0)
    return GPT(preset("tiny", vocab_size=64, context_length=16, bias=True, tie_embeddings=False, position="learned"))


def test_groups_hold_every_parameter_once() -> None:
    model = make_model()
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ([names[id(p)] for p in g["params"]] for g in optim.parameter_groups(model, 0.1))  # type: ignore
    assert sorted(decayed + others) == sorted(names.values())
    assert {n.split(".")[-2] for n in decayed} == {"qkv", "proj", "up", "down", "head"}
    assert all(n.endswith("weight") for n in decayed)


def test_a_tied_head_is_an_embedding() -> None:
    model = GPT(preset("tiny"))
    assert model.head is None
    assert any(p is model.token_embedding.weight for p in optim.parameter_groups(model, 0.1)[1]["params"])  # type: ignore


def test_schedule() -> None:
    config = TrainConfig(max_steps=100, learning_rate=2.0, min_lr_ratio=0.1, warmup_steps=4)
    assert [optim.learning_rate(config, n, 0.0) for n in range(5)] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert optim.learning_rate(config, 50, 0.5) == pytest.approx(2.0 * 0.55)
    assert optim.learning_rate(config, 99, 1.0) == pytest.approx(0.2)
    assert optim.learning_rate(config, 99, 1.3) == pytest.approx(0.2)  # a last step may end past the budget
    rates = [optim.learning_rate(config, 10, p / 50) for p in range(51)]
    assert rates == sorted(rates, reverse=True)


def test_step_equals_plain_adamw() -> None:
    model, plain = make_model(), make_model()
    config = TrainConfig(max_steps=1, learning_rate=1e-2, weight_decay=0.3)
    optimizer = optim.make_optimizer(model, config)
    reference = torch.optim.AdamW(optim.parameter_groups(plain, 0.3), lr=1e-2, betas=(0.9, 0.95), fused=False)  # type: ignore
    ids = torch.arange(32).reshape(2, 16)
    for rate in (1e-2, 5e-3, 1e-3):
        model.zero_grad()
        model.loss(ids, ids.flip(0)).backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        optim.step(optimizer, rate, torch.tensor(True))
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("before", [0, 2])  # the very first update, and a later one
def test_a_skipped_step_changes_nothing(before: int) -> None:
    model = make_model()
    optimizer = optim.make_optimizer(model, TrainConfig(max_steps=1))
    ids = torch.arange(32).reshape(2, 16)

    def backward() -> None:
        model.zero_grad()
        model.loss(ids, ids).backward()

    for _ in range(before):
        backward()
        optim.step(optimizer, 1e-2, torch.tensor(True))
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = {n: t.clone() for n, t in optim.state_tensors(model, optimizer).items()}
    backward()
    for p in model.parameters():
        assert p.grad is not None
        p.grad[...] = float("nan")
    optim.step(optimizer, 1e-2, torch.tensor(False))
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    after = optim.state_tensors(model, optimizer)
    assert all(torch.equal(after[n], state.get(n, torch.zeros(()))) if before else not after[n].any() for n in after)
    backward()
    optim.step(optimizer, 1e-2, torch.tensor(True))
    assert all(not torch.equal(p, weights[n]) and p.isfinite().all() for n, p in model.named_parameters())


def test_state_of_another_model_is_refused() -> None:
    model = make_model()
    with pytest.raises(CheckpointError, match="token_embedding.weight/exp_avg"):
        optim.load_state_tensors(model, optim.make_optimizer(model, TrainConfig(max_steps=1)), {})


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
