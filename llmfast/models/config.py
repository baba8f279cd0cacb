"""The shape of a decoder: every behaviour of the model is a field here."""

import reprlib
import sys
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from ..errors import InputError
from .rope import RopeScaling

Norm = Literal["layer_norm", "rms_norm"]
Position = Literal["learned", "rope"]
MLP = Literal["gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh"]

# Far beyond any in use: a small file must not make us take all memory.
MAX_SIZE = 2**31 - 1
MAX_WIDTH = 2**24  # of all heads together
MAX_ROTATIONS = 2**28  # context_length * head_dim: a million positions of 256, whose tables take 1 GiB
MIN_ROPE_THETA = 2.0  # in use are 10^4 to 10^7; frequencies are equal at 1 and grow below


@dataclass(frozen=True)
class Config:
    """A decoder-only transformer. Sizes are numbers of elements; `context_length` and `window` are in tokens.

    `head_dim` is free: n_head * head_dim need not equal d_model. `n_kv_head` < n_head is grouped-query attention. What
    follows `dropout` is off by default:

    `qkv_bias`, `mlp_bias`: `bias` where it is another for these layers.
    `qk_norm`: queries and keys are normalised per head, before they are rotated.
    `post_norms`: a branch is normalised before it is added, too.
    `norm_offset`: RMS norms multiply by offset + weight (Gemma's is 1).
    `rope_scaling`: of the rotary frequencies; `local_rope_theta`: the local layers' own base, unscaled.
    `window`: the number of tokens, its own included, that a token sees in the local layers; `local_layers`: which those
    are, all by default.
    `attention_scale`: of the scores, 1/sqrt(head_dim) by default; `attention_softcap`, `logit_softcap`: where not 0,
    scores or logits become cap * tanh(. / cap).
    `embedding_scale`: of the token embeddings, rounded to the compute dtype (as Gemma's was trained).
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
    qkv_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False
    post_norms: bool = False
    norm_offset: float = 0.0
    rope_scaling: RopeScaling | None = None
    local_rope_theta: float | None = None
    window: int | None = None
    local_layers: tuple[int, ...] | None = None
    attention_scale: float | None = None
    attention_softcap: float = 0.0
    logit_softcap: float = 0.0
    embedding_scale: float = 1.0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context_length", "n_layer", "n_head", "n_kv_head", "head_dim", "d_model", "d_mlp"):
            self._check_size(name)
        for name, choices in (("norm", Norm), ("position", Position), ("mlp", MLP)):
            if getattr(self, name) not in get_args(choices):
                raise InputError(
                    f"Config.{name} is {getattr(self, name)!r}; choose one of: {', '.join(get_args(choices))}"
                )
        for name in ("norm_eps", "rope_theta", "embedding_scale"):
            self._check_number(name)
        for name in ("local_rope_theta", "attention_scale"):
            if getattr(self, name) is not None:
                self._check_number(name)
        for name in ("norm_offset", "attention_softcap", "logit_softcap"):
            if getattr(self, name) != 0.0:
                self._check_number(name)
        for name in ("bias", "tie_embeddings", "qk_norm", "post_norms"):
            if type(getattr(self, name)) is not bool:
                raise InputError(f"Config.{name} is {getattr(self, name)!r}; it must be True or False")
        for name in ("qkv_bias", "mlp_bias"):
            if getattr(self, name) is not None and type(getattr(self, name)) is not bool:
                raise InputError(f"Config.{name} is {getattr(self, name)!r}; it must be True, False or None")
        if self.n_head % self.n_kv_head:
            raise InputError(f"Config.n_head {self.n_head} is not a multiple of n_kv_head {self.n_kv_head}")
        self._check_product("n_head", "head_dim", MAX_WIDTH)
        if self.position == "rope":
            self._check_rope()
        if type(self.dropout) not in (int, float) or not 0.0 <= self.dropout < 1.0:
            raise InputError(f"Config.dropout is {self.dropout!r}; it must be in [0, 1)")
        self._check_combinations()

    def _check_size(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            raise InputError(f"Config.{name} is {reprlib.repr(value)}; it must be a positive integer up to {MAX_SIZE}")

    def _check_number(self, name: str) -> None:
        value = getattr(self, name)
        if type(value) not in (int, float) or not 0.0 < value <= sys.float_info.max:
            raise InputError(f"Config.{name} is {reprlib.repr(value)}; it must be positive and finite")

    def _check_product(self, first: str, second: str, limit: int) -> None:
        a, b = getattr(self, first), getattr(self, second)
        if a * b > limit:
            raise InputError(f"Config.{first} {a} times {second} {b} is {a * b}; it must be at most {limit}")

    def _check_rope(self) -> None:
        if self.head_dim % 2:
            raise InputError(f"Config.head_dim is {self.head_dim}; rotary positions need an even one")
        self._check_product("context_length", "head_dim", MAX_ROTATIONS)
        for name in ("rope_theta", "local_rope_theta"):
            value = getattr(self, name)
            if value is not None and value < MIN_ROPE_THETA:
                raise InputError(f"Config.{name} is {value!r}; it must be at least {MIN_ROPE_THETA}")

    def _check_combinations(self) -> None:
        """Fields that would have no effect or no meaning beside others are refused."""
        if self.window is not None:
            self._check_size("window")
        if self.local_layers is not None:
            layers = self.local_layers
            if any(type(i) is not int or not 0 <= i < self.n_layer for i in layers) or len({*layers}) < len(layers):
                raise InputError(f"Config.local_layers is {layers!r}; give different layers below {self.n_layer}")
        if self.window is None and (self.local_layers is not None or self.local_rope_theta is not None):
            raise InputError("Config.local_layers and local_rope_theta need a window")
        if self.rope_scaling is not None and type(self.rope_scaling) is not RopeScaling:
            raise InputError(f"Config.rope_scaling is {self.rope_scaling!r}; it must be a RopeScaling")
        if self.position != "rope" and (self.rope_scaling is not None or self.local_rope_theta is not None):
            raise InputError("Config.rope_scaling and local_rope_theta need position 'rope'")
        if self.norm != "rms_norm" and (self.norm_offset or self.qk_norm):
            raise InputError("Config.norm_offset and qk_norm need norm 'rms_norm'")

    def is_local(self, layer: int) -> bool:
        """Whether the layer sees a window only."""
        return self.window is not None and (self.local_layers is None or layer in self.local_layers)

    @property
    def gated(self) -> bool:
        """Whether the MLP's activation is multiplied by a second product of its input."""
        return self.mlp in ("swiglu", "geglu", "geglu_tanh")

    def has_bias(self, part: Literal["qkv", "mlp"]) -> bool:
        """Whether the part's linear layers have biases."""
        own = self.qkv_bias if part == "qkv" else self.mlp_bias
        return self.bias if own is None else own

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Config":
        """Inverse of `to_dict`. Unknown and missing fields are refused by name."""
        unknown = set(values) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"unknown Config fields: {', '.join(sorted(unknown))}")
        values = dict(values)
        if isinstance(values.get("local_layers"), list):  # as JSON has it
            values["local_layers"] = tuple(values["local_layers"])
        try:
            if isinstance(values.get("rope_scaling"), dict):
                values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
            return cls(**values)
        except TypeError as error:
            raise InputError(f"incomplete Config: {error}") from None

    @property
    def n_params(self) -> int:
        """Number of parameters, a tied head counted once."""
        d, q, kv = self.d_model, self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        norm = d * (2 if self.norm == "layer_norm" else 1)
        attention = (d + self.has_bias("qkv")) * (q + 2 * kv) + q * d + self.bias * d + self.qk_norm * 2 * self.head_dim
        up = (d + self.has_bias("mlp")) * (2 if self.gated else 1) * self.d_mlp
        mlp = up + self.d_mlp * d + self.has_bias("mlp") * d
        norms = (4 if self.post_norms else 2) * norm
        embeddings = self.vocab_size * d + (self.context_length * d if self.position == "learned" else 0)
        head = 0 if self.tie_embeddings else self.vocab_size * d
        return embeddings + self.n_layer * (attention + mlp + norms) + norm + head

    def flops_per_token(self, context: int | None = None) -> float:
        """Training floating-point operations per token, forward and backward, the matrix products alone.

        6 per matrix weight (the head counted, embedding look-ups not) plus 12 * n_head * head_dim for every key that a
        layer's token sees, context / 2 of them on average: causal attention's masked half is left out (PaLM, appendix
        B, https://arxiv.org/abs/2204.02311, halved).
        """
        context = self.context_length if context is None else context
        q, kv = self.n_head * self.head_dim, self.n_kv_head * self.head_dim
        layer = self.d_model * (2 * q + 2 * kv) + (3 if self.gated else 2) * self.d_model * self.d_mlp
        matrices = self.n_layer * layer + self.vocab_size * self.d_model
        n_local = sum(self.is_local(i) for i in range(self.n_layer))
        window = min(self.window or context, context)
        keys = (self.n_layer - n_local) * context / 2 + n_local * window * (1 - window / (2 * context))
        return 6.0 * matrices + 12.0 * q * keys
