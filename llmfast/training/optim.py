"""AdamW with float32 masters of 16-bit weights, its parameter groups, and the learning-rate schedule."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import CheckpointError
from ..models import GPT
from .config import TrainConfig


def is_decayed(model: nn.Module) -> dict[str, bool]:
    """By parameter: weights of two or more dimensions are decayed; embeddings (a tied head is one), norms and biases
    are not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return {name: p.dim() >= 2 and id(p) not in embeddings for name, p in model.named_parameters()}


def learning_rate(config: TrainConfig, step: int, progress: float) -> float:
    """The rate of update number `step`, counted from 0, when the share `progress` in [0, 1] of the run is done.

    A half cosine over the run (https://arxiv.org/abs/1608.03983), from learning_rate down to its min_lr_ratio, times a
    linear warm-up.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * warmup * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * cosine)


@dataclass
class Weight:
    """A parameter and what AdamW keeps of it: float32, of the parameter's shape. The master is the parameter itself
    where that is float32; `total` is the gradient of a step's batches so far, where it has several."""

    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    decayed: bool
    total: Tensor | None = None

    @property
    def gradient(self) -> Tensor:
        grad = self.parameter.grad if self.total is None else self.total
        return torch.zeros_like(self.parameter) if grad is None else grad


class AdamW:
    """AdamW (https://arxiv.org/abs/1711.05101) of a model that computes in `model.compute_dtype`.

    If that has 16 bits, the model's matrices are kept in it from here on until `release`, so that no pass has to cast
    them; updates are made to float32 masters and copied out.
    """

    def __init__(self, model: GPT, config: TrainConfig) -> None:
        self.model, self.config = model, config
        decayed = is_decayed(model)
        self.weights: dict[str, Weight] = {}
        self.groups: dict[tuple[bool, torch.dtype], list[Weight]] = {}  # updated together
        for name, parameter in model.named_parameters():
            master = parameter.detach()
            if parameter.dim() >= 2 and model.compute_dtype.itemsize == 2:
                parameter.data = master.to(model.compute_dtype)
            moments = torch.zeros_like(master), torch.zeros_like(master)
            weight = self.weights[name] = Weight(parameter, master, *moments, decayed[name])
            self.groups.setdefault((weight.decayed, parameter.dtype), []).append(weight)

    def add_gradients(self) -> None:
        """Add a batch's gradients, which `.grad` holds, to the step's, in float32."""
        for w in self.weights.values():
            if w.parameter.grad is not None:
                grad = w.parameter.grad.float()
                w.total = grad.clone() if w.total is None else w.total.add_(grad)

    def step(self, rate: float, number: int, loss: Tensor) -> Tensor:
        """Update number `number`, counted from 1, by the gradients added up, or else by those in `.grad`.

        Returns their L2 norm before clipping, a scalar on the device. Where it or `loss` is not finite, nothing at all
        is changed, by a decision taken on the device, for which the host does not wait.
        """
        groups = [(key, group, [w.gradient for w in group]) for key, group in self.groups.items()]
        norms = [n for *_, grads in groups for n in _norms(grads)]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        scale = (self.config.grad_clip / (norm + 1e-6)).clamp(max=1.0)
        scale = torch.where(torch.isfinite(norm) & torch.isfinite(loss), scale, torch.nan)
        for (decayed, dtype), group, grads in groups:
            settings = {"step": number, "learning_rate": rate, "betas": self.config.betas}
            settings["weight_decay"] = self.config.weight_decay if decayed else 0.0
            masters = [w.master for w in group]
            moments = [w.exp_avg for w in group], [w.exp_avg_sq for w in group]
            copies = [w.parameter.detach() for w in group] if dtype != torch.float32 else None
            if scale.is_cuda:
                ops.adamw_(masters, grads, *moments, copies, grad_scale=scale, **settings)
            elif math.isfinite(known := scale.item()):  # on the CPU there is nothing to wait for
                ops.adamw_(masters, [g.float() for g in grads], *moments, grad_scale=known, **settings)
                if copies is not None:
                    for copy, master in zip(copies, masters, strict=True):
                        copy.copy_(master)
        for w in self.weights.values():
            w.total = None
        return norm

    def masters(self) -> dict[str, Tensor]:
        """The model's state with float32 weights."""
        return self.model.state_dict() | {name: w.master for name, w in self.weights.items()}

    def release(self) -> None:
        """Give the model its float32 weights back."""
        for w in self.weights.values():
            w.parameter.grad = None
            w.parameter.data = w.master

    def state(self) -> dict[str, Tensor]:
        """Both moments, as `<parameter name>/<exp_avg | exp_avg_sq>`."""
        return {f"{n}/{key}": getattr(w, key) for n, w in self.weights.items() for key in ("exp_avg", "exp_avg_sq")}

    def load(self, masters: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        """Inverse of `masters` and `state`. Raises CheckpointError if they are another model's."""
        for name, w in self.weights.items():
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{name}/{key}" not in state:
                    raise CheckpointError(f"the checkpoint has no optimiser state {name}/{key}; it is of another model")
                getattr(w, key).copy_(state[f"{name}/{key}"])
        dtypes = {name: w.parameter.dtype for name, w in self.weights.items()}
        self.release()
        self.model.load_state_dict(masters)
        for name, w in self.weights.items():
            w.parameter.data = w.master.to(dtypes[name])


def _norms(grads: list[Tensor]) -> tuple[Tensor, ...]:
    """L2 norms in float32, each of a tensor, in a few launches."""
    return torch._foreach_norm(grads, 2.0, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
