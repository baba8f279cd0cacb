"""What else computes an op: PyTorch's own kernels and, where importable, the libraries llmfast is measured against.

A peer is built for a case and is a function of its tensors. One that cannot run raises, and its error is shown.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .cases import AttentionCase, Case

Function = Callable[..., Tensor]


def _compiled(case: Case) -> Function:
    torch._dynamo.reset()  # a fresh graph for this shape: no dynamic-shape kernel from the last one
    return torch.compile(case.torch)


def _sdpa(backend: SDPBackend) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        def run(*tensors: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return case.torch(*tensors)

        return run

    return build


def _flash_attention_4(case: Case) -> Function:
    attend = importlib.import_module("flash_attn.cute").flash_attn_func
    assert isinstance(case, AttentionCase)
    causal = case.causal

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Any = attend(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    return run


def _quack_softmax(case: Case) -> Function:
    return importlib.import_module("quack").softmax


def _liger_softmax(case: Case) -> Function:
    return importlib.import_module("liger_kernel.ops.softmax").LigerSoftmaxFunction.apply


def _liger_layer_norm(case: Case) -> Function:
    apply = importlib.import_module("liger_kernel.ops.layer_norm").LigerLayerNormFunction.apply
    return lambda x, weight, bias: apply(x, weight, bias, 1e-5)


PEERS: dict[str, dict[str, Callable[[Case], Function]]] = {
    "softmax": {
        "torch": lambda case: case.torch,
        "torch.compile": _compiled,
        "QuACK": _quack_softmax,
        "Liger": _liger_softmax,
    },
    "layer_norm": {
        "torch": lambda case: case.torch,
        "torch.compile": _compiled,
        "Liger": _liger_layer_norm,
    },
    "attention": {
        "torch cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
        "torch flash": _sdpa(SDPBackend.FLASH_ATTENTION),
        "FlashAttention-4": _flash_attention_4,
    },
}

# What stands for PyTorch on a CPU, where neither a compiler nor another library is timed.
CPU_PEERS: dict[str, Callable[[Case], Function]] = {"torch": lambda case: case.torch}
