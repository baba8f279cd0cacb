"""Modules of torch.nn by the same names, constructors and parameters, over `llmfast.ops`: a model changes an import.

from llmfast import nn as fast
fast.LayerNorm(768)                      # as torch.nn.LayerNorm(768), checkpoints interchangeable
fast.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
"""

from . import functional
from .activations import GELU, Softmax
from .layers import Embedding, Linear
from .loss import CrossEntropyLoss
from .norms import LayerNorm, RMSNorm

__all__ = ["GELU", "CrossEntropyLoss", "Embedding", "LayerNorm", "Linear", "RMSNorm", "Softmax", "functional"]
