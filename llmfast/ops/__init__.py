"""The operations a GPT is made of: one function each, several backends behind it.

y = ops.softmax(x)                          # auto: the first backend that can run this call
y = ops.softmax(x, backend="triton")        # explicit: runs, or raises with the reason
with ops.use_backend("reference"): ...      # for a block of code
print(ops.explain("softmax", x))            # every backend, and why it would or would not run
"""

from .functional import (
    activation_linear,
    adamw_,
    add_layer_norm,
    add_rms_norm,
    append_kv_,
    attention,
    attention_varlen,
    bias_gelu,
    cross_entropy,
    decode_attention,
    embedding,
    explain,
    fp8_linear,
    fp8_linear_cross_entropy,
    fp8_mlp,
    geglu,
    gelu,
    layer_norm,
    linear,
    linear_cross_entropy,
    mlp,
    rms_norm,
    rope,
    softmax,
    swiglu,
)
from .registry import BackendFallbackWarning, current_backend, use_backend

__all__ = [
    "BackendFallbackWarning",
    "activation_linear",
    "adamw_",
    "add_layer_norm",
    "add_rms_norm",
    "append_kv_",
    "attention",
    "attention_varlen",
    "bias_gelu",
    "cross_entropy",
    "current_backend",
    "decode_attention",
    "embedding",
    "explain",
    "fp8_linear",
    "fp8_linear_cross_entropy",
    "fp8_mlp",
    "geglu",
    "gelu",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "mlp",
    "rms_norm",
    "rope",
    "softmax",
    "swiglu",
    "use_backend",
]
