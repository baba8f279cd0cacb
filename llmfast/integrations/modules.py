"""Which modules of transformers and PyTorch have a twin over `llmfast.ops`, by class, and how one becomes the other.

A module stays the same object with the same parameters, names and hooks: only its class changes, to a subclass with
another `forward` and the same name, by which Trainer, PEFT and `save_pretrained` know classes. So they, state dicts,
gradient checkpointing and torch.compile see no difference, and the way back is the old class.
"""

import copy
import functools
import importlib
import re
import sys
from collections.abc import Callable
from types import CellType, FunctionType
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import nn as fast
from .. import ops
from ..nn.functional import autocast

Forward = Callable[..., Any]
Maker = Callable[[type[nn.Module]], Forward]  # of a class of modules, what is to be its forward
Activation = Literal["silu", "gelu", "gelu_tanh"]


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


@functools.cache
def gated_mlp(activation: Activation) -> Maker:
    """down_proj(act(gate_proj(x)) * up_proj(x)); while training, where it can be, without keeping the product."""

    def make(base: type[nn.Module]) -> Forward:
        def forward(self: Any, x: Tensor) -> Tensor:
            gate, up, down = self.gate_proj(x), self.up_proj(x), self.down_proj
            if gate.dtype is not up.dtype:  # an adapter on one of them may change its dtype
                return down(self.act_fn(gate) * up)
            if torch.is_grad_enabled() and is_plain(down) and down.weight.requires_grad:
                layer = (down.weight,) if down.bias is None else (down.weight, down.bias)
                return ops.activation_linear(gate, *autocast(*layer), up=up, activation=activation)
            if activation == "silu":
                return down(ops.swiglu(gate, up))
            return down(ops.geglu(gate, up, approximate="none" if activation == "gelu" else "tanh"))

        return forward

    return make


def is_plain(linear: nn.Module) -> bool:
    """Whether F.linear of its parameters is all that it does: no adapter, quantisation or hook is in the way."""
    hooks = (linear._forward_pre_hooks, linear._forward_hooks, linear._backward_pre_hooks, linear._backward_hooks)
    return type(linear) is nn.Linear and "forward" not in vars(linear) and not any(hooks)


ROTATION = "apply_rotary_pos_emb"


def rotary_attention(base: type[nn.Module]) -> Forward:
    """The same code, for which the name `apply_rotary_pos_emb` means ops.rope, inside the same decorators."""
    return _rotating(base.forward)


def _rotating(own: Any) -> Any:
    names, cells, inner = own.__globals__, own.__closure__, _decorated(own)
    if inner is None:
        names = {**names, ROTATION: _rotation(names[ROTATION])}
        del names["__name__"]  # or a compiler would look them up in that module
    else:
        cells = tuple(CellType(_rotating(inner)) if cell.cell_contents is inner else cell for cell in cells)
    forward = FunctionType(own.__code__, names, own.__name__, own.__defaults__, cells)
    forward.__kwdefaults__ = own.__kwdefaults__
    return forward


def _decorated(function: Any) -> Any:
    """The function that a decorator is around, such as that of transformers 5.24 that renames arguments, else None."""
    inner = getattr(function, "__wrapped__", None)
    held = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    return inner if any(value is inner for value in held) else None


def _rotation(theirs: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        """q: (B, H, T, D); k: (B, Hkv, T, D); cos, sin: (1 or B, T, D), both halves of the last dimension the same.

        A rotation of part of a head and mixed dtypes are left to transformers' own.
        """
        alike = unsqueeze_dim == 1 and q.dtype is k.dtype is cos.dtype and cos.shape[0] in (1, q.shape[0])
        if not alike or not cos.shape[-1] == q.shape[-1] == k.shape[-1]:
            return theirs(q, k, cos, sin, unsqueeze_dim)
        if cos.shape[0] == 1:
            cos, sin = cos[0], sin[0]
        half = cos.shape[-1] // 2
        cos, sin = cos.narrow(-1, 0, half), sin.narrow(-1, 0, half)
        q, k = ops.rope(q.transpose(1, 2), cos, sin), ops.rope(k.transpose(1, 2), cos, sin)
        return q.transpose(1, 2), k.transpose(1, 2)

    return apply_rotary_pos_emb


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

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "Gemma", "Gemma2", "Gemma3")
GATED_MLPS = frozenset(f"{family}MLP" for family in FAMILIES)
ATTENTIONS = frozenset(f"{family}Attention" for family in FAMILIES)
# Classes of activations of a gated MLP -> what ours is called.
ACTIVATIONS: dict[str, Activation] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "GELUActivation": "gelu",
}
ALREADY = "it is ours already"
# A module whose class is called so does what ours could; if the tables lack it, the report says so.
CANDIDATE = re.compile(r"Norm|MLP|[GS]E?I?LU|Activation")


def twin_of(module: nn.Module) -> Twin | str | None:
    """What can run in its place, or why nothing can, or None for a module that is none of our business."""
    kind, home = type(module).__name__, type(module).__module__
    if is_ours(module):
        return ALREADY
    if home.startswith("transformers."):
        if kind in GATED_MLPS:
            return _gated(module)
        if kind in ATTENTIONS:
            return _rotary(module)
        if kind in TRANSFORMERS:
            return TRANSFORMERS[kind]
    if home.startswith("torch.nn.") and kind in PYTORCH:
        return PYTORCH[kind]
    return f"{home}.{kind} is not in the table" if CANDIDATE.search(kind) else None


def _gated(module: Any) -> Twin | str:
    activation = type(module.act_fn).__name__
    if activation not in ACTIVATIONS:
        return f"there is no gated product with {activation}"
    return f"ops.activation_linear, {ACTIVATIONS[activation]}", gated_mlp(ACTIVATIONS[activation])


def _rotary(module: nn.Module) -> Twin | str:
    forward: Any = type(module).forward
    while (inner := _decorated(forward)) is not None:
        forward = inner
    code = getattr(forward, "__code__", None)
    if code is None or ROTATION not in code.co_names:
        return f"its forward does not call {ROTATION}"
    return "ops.rope", rotary_attention


@functools.cache
def _subclass(base: type[nn.Module], make: Maker) -> type[nn.Module]:
    named = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    pickled = {"__reduce_ex__": _reduce, "__deepcopy__": _deepcopy}
    forward = functools.wraps(base.forward)(make(base))
    return type(base.__name__, (base,), {**named, **pickled, "forward": forward, "_llmfast": base})


_BY = "_llmfast_by"  # an attribute of modules rather than a list of them, so that copies have it, such as PEFT makes


def _reduce(self: Any, protocol: Any) -> tuple[Any, ...]:
    """Pickled as what it was: by its name that class is found, not ours."""
    return _empty, (self._llmfast,), {name: value for name, value in self.__getstate__().items() if name != _BY}


def _empty(base: Any) -> nn.Module:
    """For a pickle to fill, whose model may name our attention: importing registers it."""
    if "transformers" in sys.modules:
        importlib.import_module(f"{__package__}.transformers")
    return base.__new__(base)


def _deepcopy(self: Any, memo: dict[int, Any]) -> Any:
    """As without it, but for `_reduce`: a copy is ours too."""
    copied = memo[id(self)] = self.__new__(type(self))
    copied.__setstate__(copy.deepcopy(nn.Module.__getstate__(self), memo))
    return copied


def is_ours(module: nn.Module) -> bool:
    return "_llmfast" in vars(type(module))


def replace(module: nn.Module, twin: Twin, by: int) -> None:
    module.__class__ = _subclass(type(module), twin[1])
    vars(module)[_BY] = by


def restore(module: Any, by: int) -> None:
    """Back to what it was, if it was replaced `by` the one that asks."""
    if is_ours(module) and vars(module).get(_BY) == by:
        del vars(module)[_BY]
        module.__class__ = type(module)._llmfast
