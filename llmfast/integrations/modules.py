"""Which modules of transformers and PyTorch have a twin over `llmfast.ops`, by class, and how one becomes the other.

A module stays the same object with the same parameters, names and hooks: only its class changes, to a subclass with
another `forward`. So state dicts, PEFT, gradient checkpointing and torch.compile see no difference, and the way back
is the old class.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .. import nn as fast
from .. import ops

Forward = Callable[..., Any]
Maker = Callable[[type[nn.Module]], Forward]  # of a class of modules, what is to be its forward


def rms_norm(eps: str, offset: float) -> Maker:
    """offset + weight times the normalised input; `eps` names the attribute that holds it.

    In 16 bits ours rounds once, at the end, where Llama's rounds before the weight too. A weight of another dtype than
    the input decides the dtype of the result in ways that differ by family, and is left to the module's own forward.
    """

    def make(base: type[nn.Module]) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            if self.weight.dtype is not x.dtype:
                return base.forward(self, x)
            return ops.rms_norm(x, self.weight, getattr(self, eps), offset=offset)

        return forward

    return make


def layer_norm(base: type[nn.Module]) -> Forward:
    """Mixed dtypes, which autocast has its own rule for, are left to PyTorch's forward."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.weight is not None and self.weight.dtype is not input.dtype:
            return base.forward(self, input)
        return fast.LayerNorm.forward(self, input)

    return forward


def gelu(approximate: str) -> Maker:
    def make(base: type[nn.Module]) -> Forward:
        return lambda self, input: ops.gelu(input, approximate=approximate)  # pyright: ignore[reportArgumentType]

    return make


def gated_mlp(product: Callable[[Tensor, Tensor], Tensor]) -> Maker:
    """down_proj(product(gate_proj(x), up_proj(x)))."""

    def make(base: type[nn.Module]) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            gate, up = self.gate_proj(x), self.up_proj(x)
            same = gate.dtype is up.dtype  # an adapter on one of them may change its dtype
            return self.down_proj(product(gate, up) if same else self.act_fn(gate) * up)

        return forward

    return make


# The name by which the report calls what runs instead, and the maker of it.
Twin = tuple[str, Maker]

_LLAMA_NORM: Twin = "ops.rms_norm", rms_norm("variance_epsilon", 0.0)
_GEMMA_NORM: Twin = "ops.rms_norm, offset 1", rms_norm("eps", 1.0)
_GELU_TANH: Twin = "ops.gelu, tanh", gelu("tanh")
_GELU: Twin = "ops.gelu", gelu("none")

TRANSFORMERS: dict[str, Twin] = {
    "LlamaRMSNorm": _LLAMA_NORM,
    "MistralRMSNorm": _LLAMA_NORM,
    "MixtralRMSNorm": _LLAMA_NORM,
    "Qwen2RMSNorm": _LLAMA_NORM,
    "Qwen3RMSNorm": _LLAMA_NORM,
    "Phi3RMSNorm": _LLAMA_NORM,
    "SmolLM3RMSNorm": _LLAMA_NORM,
    "GemmaRMSNorm": _GEMMA_NORM,
    "Gemma2RMSNorm": _GEMMA_NORM,
    "Gemma3RMSNorm": _GEMMA_NORM,
    "NewGELUActivation": _GELU_TANH,
    "GELUTanh": _GELU_TANH,
    "GELUActivation": _GELU,
}
PYTORCH: dict[str, Twin] = {"LayerNorm": ("ops.layer_norm", layer_norm)}

GATED_MLPS = frozenset(
    f"{family}MLP" for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Gemma2", "Gemma3")
)
# Classes of activations -> the product of a gated MLP that has one.
PRODUCTS: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "SiLU": ("ops.swiglu", ops.swiglu),
    "SiLUActivation": ("ops.swiglu", ops.swiglu),
    "NewGELUActivation": ("ops.geglu, tanh", ops.geglu),
    "GELUTanh": ("ops.geglu, tanh", ops.geglu),
    "GELUActivation": ("ops.geglu", functools.partial(ops.geglu, approximate="none")),
}
# A module whose class is called so does what ours could; if the tables lack it, the report says so.
CANDIDATE = re.compile(r"Norm|MLP|[GS]E?I?LU|Activation")


def twin_of(module: nn.Module) -> Twin | str | None:
    """What can run in its place, or why nothing can, or None for a module that is none of our business."""
    kind, home = type(module).__name__, type(module).__module__
    if is_ours(module):
        return "it is ours already"
    if home.startswith("transformers."):
        if kind in GATED_MLPS:
            return _gated(module)
        if kind in TRANSFORMERS:
            return TRANSFORMERS[kind]
    if home.startswith("torch.nn.") and kind in PYTORCH:
        return PYTORCH[kind]
    return f"{home}.{kind} is not in the table" if CANDIDATE.search(kind) else None


def _gated(module: Any) -> Twin | str:
    activation = type(module.act_fn).__name__
    if activation not in PRODUCTS:
        return f"there is no gated product with {activation}"
    name, product = PRODUCTS[activation]
    return name, gated_mlp(product)


@functools.cache
def _subclass(base: type[nn.Module], name: str, make: Maker) -> type[nn.Module]:
    members = {"forward": functools.wraps(base.forward)(make(base)), "__module__": base.__module__, "_llmfast": name}
    return type(f"LLMFast{base.__name__}", (base,), members)


def is_ours(module: nn.Module) -> bool:
    return "_llmfast" in vars(type(module))


def replace(module: nn.Module, twin: Twin) -> None:
    module.__class__ = _subclass(type(module), *twin)


def restore(module: nn.Module) -> None:
    module.__class__ = type(module).__bases__[0]
