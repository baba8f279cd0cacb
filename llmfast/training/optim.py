"""The update of the weights, by AdamW and Muon with float32 masters of 16-bit weights; who is updated by which; and the
learning-rate schedules."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError
from ..models import GPT
from . import muon
from .config import TrainConfig
from .spikes import SpikeDetector

Rule = Literal["adamw", "adamw without decay", "muon"]


def rules(model: nn.Module, optimizer: str) -> dict[str, Rule]:
    """By parameter. Weights of two or more dimensions are decayed; embeddings (a tied head is one), norms and biases
    are not. Muon takes the decayed ones but the head, AdamW the rest."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    found: dict[str, Rule] = {}
    for name, p in model.named_parameters():
        if p.dim() < 2 or id(p) in embeddings:
            found[name] = "adamw without decay"
        else:
            found[name] = "muon" if optimizer == "muon" and name != "head.weight" else "adamw"
    return found


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of update number `step`, counted from 0, when the share `progress` in [0, 1] of the run is done.

    Times a linear warm-up, from learning_rate down to its min_lr_ratio: "cosine", by half a cosine over the run
    (https://arxiv.org/abs/1608.03983); "trapezoid", constant but for a straight line over the last `cooldown` of the
    run (https://arxiv.org/abs/2405.18392).
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    left = 1.0 - min(1.0, progress)
    if config.schedule == "cosine":
        shape = 0.5 * (1.0 - math.cos(math.pi * left))
    else:
        shape = min(1.0, left / config.cooldown) if config.cooldown else 1.0
    return config.learning_rate * warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * shape)


@dataclass
class Weight:
    """A parameter and what its rule keeps of it: float32, of the parameter's shape. The master is the parameter itself
    where that is float32; `total` is the gradient of a step's batches so far, where it has several."""

    parameter: nn.Parameter
    master: Tensor
    state: dict[str, Tensor]
    total: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        grad = self.parameter.grad if self.total is None else self.total
        return torch.zeros_like(self.parameter) if grad is None else grad


class Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101), and Muon if `config.optimizer` says so, of a model that computes in
    `model.compute_dtype`.

    If that has 16 bits, the model's matrices are kept in it from here on until `release`, so that no pass has to cast
    them; updates are made to float32 masters and copied out.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model, self.config = model, config
        rule_of = rules(model, config.optimizer)
        self.weights: dict[str, Weight] = {}
        self.groups: dict[tuple[Rule, torch.dtype], list[Weight]] = {}  # updated together
        for name, parameter in model.named_parameters():
            master, rule = parameter.detach(), rule_of[name]
            if parameter.dim() >= 2 and model.compute_dtype.itemsize == 2:
                parameter.data = master.to(model.compute_dtype)
            kept = ("momentum",) if rule == "muon" else ("exp_avg", "exp_avg_sq")
            weight = Weight(parameter, master, {key: torch.zeros_like(master) for key in kept})
            self.weights[name] = weight
            self.groups.setdefault((rule, parameter.dtype), []).append(weight)
        self.spikes = SpikeDetector(config.spike_threshold, next(model.parameters()).device)

    def add_gradients(self) -> None:
        """Add a batch's gradients, which `.grad` holds, to the step's, in float32."""
        for w in self.weights.values():
            if w.parameter.grad is not None:
                grad = w.parameter.grad.float()
                w.total = grad.clone() if w.total is None else w.total.add_(grad)

    def step(self, rate: float, number: int, loss: Tensor) -> Tensor:
        """Update number `number`, counted from 1, by the gradients added up, or else by those in `.grad`.

        Returns their L2 norm before clipping and whether the update was made, (2,) on the device. Where the norm stands
        out, or it or `loss` is not finite, nothing at all is changed: the host does not wait for that decision.
        """
        groups = [(key, group, [w.gradient for w in group]) for key, group in self.groups.items()]
        norms = [n for *_, grads in groups for n in _norms(grads)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        made = self.spikes.judge(norm, torch.isfinite(norm) & torch.isfinite(loss))
        scale = torch.where(made, scale, torch.nan)
        for (rule, _), group, grads in groups:
            if rule == "muon":
                self._muon(group, grads, rate, scale)
            else:
                self._adamw(group, grads, rate, number, scale, 0.0 if "without" in rule else self.config.weight_decay)
        for w in self.weights.values():
            w.total = None
        return torch.stack((norm, made.float()))

    def _adamw(
        self, group: list[Weight], grads: list[Tensor], rate: float, number: int, scale: Tensor, weight_decay: float
    ) -> None:
        masters = [w.master for w in group]
        moments = [w.state["exp_avg"] for w in group], [w.state["exp_avg_sq"] for w in group]
        settings = {"step": number, "learning_rate": rate, "betas": self.config.betas, "weight_decay": weight_decay}
        if scale.is_cuda:
            copies = None if group[0].parameter.dtype == torch.float32 else [w.parameter.detach() for w in group]
            ops.adamw_(masters, grads, *moments, copies, grad_scale=scale, **settings)
        elif math.isfinite(known := scale.item()):  # on the CPU there is nothing to wait for
            ops.adamw_(masters, [g.float() for g in grads], *moments, grad_scale=known, **settings)
            _copy_out(group)

    def _muon(self, group: list[Weight], grads: list[Tensor], rate: float, scale: Tensor) -> None:
        momenta = [w.state["momentum"] for w in group]
        muon.update([w.master for w in group], grads, momenta, rate, self.config.weight_decay, scale)
        _copy_out(group)

    def masters(self) -> dict[str, Tensor]:
        """The model's state with float32 weights."""
        return self.model.state_dict() | {name: w.master for name, w in self.weights.items()}

    def release(self) -> None:
        """Give the model its float32 weights back."""
        for w in self.weights.values():
            w.parameter.grad = None
            w.parameter.data = w.master

    def state(self) -> dict[str, Tensor]:
        """What the rules keep, as `<parameter name>/<exp_avg, exp_avg_sq or momentum>`, and the norms seen."""
        kept = {f"{name}/{key}": value for name, w in self.weights.items() for key, value in w.state.items()}
        return kept | {"gradient norms": self.spikes.seen}

    def load(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Inverse of `masters` and `state`. Raises CheckpointError if they are another model's or optimiser's."""
        state = {"gradient norms": torch.zeros_like(self.spikes.seen)} | state  # older runs did not keep them
        for name, value in self.state().items():
            if name not in state:
                raise CheckpointError(
                    f"the checkpoint has no optimiser state {name}; it is of another model or optimiser"
                )
            value.copy_(state[name])
        dtypes = {name: w.parameter.dtype for name, w in self.weights.items()}
        self.release()
        self.model.load_state_dict(masters)
        for name, w in self.weights.items():
            w.parameter.data = w.master.to(dtypes[name])


def _copy_out(group: list[Weight]) -> None:
    """Where parameters are not their own masters."""
    for w in group:
        if w.parameter.dtype != w.master.dtype:
            w.parameter.detach().copy_(w.master)


def _norms(grads: list[Tensor]) -> tuple[Tensor, ...]:
    """L2 norms in float32, each of a tensor, in a few launches."""
    return torch._foreach_norm(grads, 2.0, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
