"""The shape of a decoder: every behaviour of the model is a field here."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import InputError

Norm = Literal["layer_norm", "rms_norm"]
Position = Literal["learned", "rope"]
MLP = Literal["gelu", "gelu_tanh", "swiglu"]


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Sizes are numbers of elements; `context_length` is in tokens.

    `head_dim` is free: n_head * head_dim need not equal d_model. `n_kv_head` < n_head is grouped-query attention.
    """

    vocab_size: int
    context_length: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_mlp: int
    norm: Norm = "layer_norm"
    norm_eps: float = 1e-5
    position: Position = "learned"
    rope_theta: float = 10_000.0
    mlp: MLP = "gelu_tanh"
    bias: bool = True
    tie_embeddings: bool = True
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_mlp"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"Config.{name} is {value!r}; it must be a positive integer")
        for name, choices in (("norm", Norm), ("position", Position), ("mlp", MLP)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"Config.{name} is {getattr(self, name)!r}; choose one of: {', '.join(get_args(choices))}"
                )
        for name in ("norm_eps", "rope_theta"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0.0 < value < math.inf:
                raise InputError(f"Config.{name} is {value!r}; it must be positive and finite")
        for name in ("bias", "tie_embeddings"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"Config.{name} is {getattr(self, name)!r}; it must be True or False")
        if self.n_head % self.n_kv_head:
            raise InputError(f"Config.n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        if self.position == "rope" and self.head_dim % 2:
            raise InputError(f"Config.head_dim is {self.head_dim}; rotary positions need an even one")
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"Config.dropout is {self.dropout!r}; it must be in [0, 1)")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`. Unknown and missing fields are refused by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown Config fields: {', '.join(sorted(unknown))}")
        try:
            return cls(**values)
        except TypeError as error:
            raise InputError(f"incomplete Config: {error}") from None

    @property
    def n_params(self) -> int:
        """Number of parameters, a tied head counted once."""
        d, q, kv = self.d_model, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        b = int(self.bias)
        norm = d * (2 if self.norm == "layer_norm" else 1)
        attention = d * (q + 2 * kv) + b * (q + 2 * kv) + q * d + b * d
        up = 2 if self.mlp == "swiglu" else 1
        mlp = up * (d * self.d_mlp + b * self.d_mlp) + self.d_mlp * d + b * d
        embeddings = self.vocab_size * d + (self.context_length * d if self.position == "learned" else 0)
        head = 0 if self.tie_embeddings else self.vocab_size * d
        return embeddings + self.n_layer * (attention + mlp + 2 * norm) + norm + head

    def flops_per_token(self, context: int | None = None) -> float:
        """Training floating-point operations per token, forward and backward, the matrix products alone.

        6 per matrix weight (the head counted, embedding look-ups not) plus 6 * n_layer * n_head * head_dim * context
        for causal attention, its masked half left out (PaLM, appendix B, https://arxiv.org/abs/2204.02311, halved).
        """
        context = self.context_length if context is None else context
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        up = 2 if self.mlp == "swiglu" else 1
        layer = self.d_model * (2 * q + 2 * kv) + (up + 1) * self.d_model * self.d_mlp
        matrices = self.n_layer * layer + self.vocab_size * self.d_model
        return 6.0 * matrices + 6.0 * self.n_layer * q * context
