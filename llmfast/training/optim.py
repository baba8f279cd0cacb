"""AdamW over parameter groups, the learning-rate schedule, and the optimiser's state as named tensors."""

import math

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .config import TrainConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Decay for weights of two or more dimensions; none for embeddings (a tied head is one), norms and biases."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, others = [], []
    for parameter in model.parameters():
        (decayed if parameter.dim() >= 2 and id(parameter) not in embeddings else others).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101), fused: only that kernel can skip an update on the device (`step`)."""
    groups = [group for group in parameter_groups(model, config.weight_decay) if group["params"]]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=1e-8, fused=True)


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of update number `step`, counted from 0, when the share `progress` in [0, 1] of the run is done.

    A half cosine over the run (https://arxiv.org/abs/1608.03983), from learning_rate down to its min_lr_ratio, times a
    linear warm-up.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


def step(optimizer: torch.optim.Optimizer, rate: float, finite: Tensor) -> None:
    """Update the weights with learning rate `rate`; where `finite` (a bool scalar) is false, change nothing at all.

    The decision is taken inside the fused kernel, which leaves weights, moments and step count as they are when
    `found_inf` is 1 (the interface of torch.amp.GradScaler): the host never waits for the device.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~finite).float()  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.step()


def state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state as `<parameter name>/<exp_avg | exp_avg_sq | step>`."""
    return {
        f"{name}/{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def load_state_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `state_tensors`. Raises CheckpointError if `tensors` are another model's."""
    for name, parameter in model.named_parameters():
        try:
            state = {key: tensors[f"{name}/{key}"].to(parameter.device) for key in ("exp_avg", "exp_avg_sq", "step")}
        except KeyError as error:
            raise CheckpointError(f"the checkpoint has no optimiser state {error}; it is of another model") from None
        optimizer.state[parameter] = state
