"""What else computes an op: PyTorch's own kernels and, where importable, the libraries llmfast is measured against.

A peer is built for a case and is a function of its tensors. One that cannot run raises, and its error is shown.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .accuracy import outputs
from .cases import (
    AttentionCase,
    Case,
    CrossEntropyCase,
    DecodeAttentionCase,
    LinearCrossEntropyCase,
    Result,
    VarlenAttentionCase,
)
from .cases.attention import starts_of

Function = Callable[..., Result]


def _compiled(case: Case) -> Function:
    torch._dynamo.reset()  # a fresh graph for this shape: no dynamic-shape kernel from the last one
    return torch.compile(case.torch)


def _sdpa(backend: SDPBackend) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        def run(*tensors: Tensor) -> Result:
            with sdpa_kernel(backend):
                return case.torch(*tensors)

        return run

    return build


def _flash_attention_4(case: Case) -> Function:
    attend = importlib.import_module("flash_attn.cute").flash_attn_func
    assert isinstance(case, AttentionCase)
    causal = case.causal

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return outputs(attend(q, k, v, causal=causal))[0]

    return run


def _flash_attention_4_varlen(case: Case) -> Function:
    attend = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    assert isinstance(case, VarlenAttentionCase)
    queries, keys = zip(*case.lengths, strict=True)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = {"cu_seqlens_q": starts_of(queries, q.device), "cu_seqlens_k": starts_of(keys, q.device)}
        sizes = {"max_seqlen_q": max(queries), "max_seqlen_k": max(keys)}
        return outputs(attend(q, k, v, **places, **sizes, causal=case.causal))[0]

    return run


def _liger_softmax(case: Case) -> Function:
    return importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply


def _liger_layer_norm(case: Case) -> Function:
    apply = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return lambda x, weight, bias: apply(x, weight, bias, 1e-5)


def _quack(name: str) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        function = getattr(importlib.import_module("quack"), name)
        if isinstance(case, CrossEntropyCase):
            return lambda logits: function(logits, case.targets(logits.device), reduction="mean")
        return function

    return build


def _liger_rms_norm(case: Case) -> Function:
    apply = importlib.import_module("liger_kernel.ops.rms_norm").LigerRMSNormFunction.apply
    return lambda x, weight: apply(x, weight, 1e-6, 0.0, "llama", False)


def _liger_linear_cross_entropy(case: Case) -> Function:
    module = importlib.import_module("liger_kernel.ops.fused_linear_cross_entropy")
    assert isinstance(case, LinearCrossEntropyCase)

    def run(x: Tensor, weight: Tensor) -> Tensor:
        return outputs(module.LigerFusedLinearCrossEntropyFunction.apply(x, weight, case.targets(x.device)))[0]

    return run


def _liger_swiglu(case: Case) -> Function:
    return importlib.import_module("liger_kernel.ops.swiglu").LigerSiLUMulFunction.apply


_DECODE_ATTENTION: dict[str, Callable[[Case], Function]] = {
    "torch cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "torch flash": _sdpa(SDPBackend.FLASH_ATTENTION),
}
_ATTENTION = {**_DECODE_ATTENTION, "FlashAttention-4": _flash_attention_4}
# Beside PyTorch's own function and torch.compile's of it.
_LIBRARIES: dict[str, dict[str, Callable[[Case], Function]]] = {
    "softmax": {"QuACK": _quack("softmax"), "Liger": _liger_softmax},
    "layer_norm": {"Liger": _liger_layer_norm},
    "rms_norm": {"QuACK": _quack("rmsnorm"), "Liger": _liger_rms_norm},
    "cross_entropy": {"QuACK": _quack("cross_entropy")},
    "linear_cross_entropy": {"Liger": _liger_linear_cross_entropy},
    "swiglu": {"Liger": _liger_swiglu},
    "attention_varlen": {"FlashAttention-4": _flash_attention_4_varlen},
}


def peers(case: Case, device: torch.device) -> dict[str, Callable[[Case], Function]]:
    """What is timed beside ours; on a CPU neither a compiler nor another library."""
    if device.type != "cuda":
        return {"torch": lambda case: case.torch}
    if isinstance(case, AttentionCase):
        return _ATTENTION
    if isinstance(case, DecodeAttentionCase):
        return {} if case.page_size or case.ragged else _DECODE_ATTENTION  # which read neither
    return {"torch": lambda case: case.torch, "torch.compile": _compiled, **_LIBRARIES.get(case.op, {})}
