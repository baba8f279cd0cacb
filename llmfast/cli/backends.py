"""Which backend runs each op, asked with tensors of a model's own shapes."""

import torch

from .. import ops
from ..models import Config


def explain_ops(config: Config, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Op -> `ops.explain` for a training step of `config`, (batch, context) tokens computed in `dtype`."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, device=device, dtype=dtype)

    weight = empty(config.d_model, dtype=torch.float32)
    x, h = empty(batch, context, config.d_model), empty(batch, context, config.d_mlp)
    q = empty(batch, context, config.n_head, config.head_dim)
    kv = empty(batch, context, config.n_kv_head, config.head_dim)
    gelu = "none" if config.mlp == "gelu" else "tanh"
    explained = {
        "attention": ops.explain("attention", q, kv, kv, causal=True),
        "softmax": ops.explain("softmax", x),
        "layer_norm": ops.explain("layer_norm", x, weight, weight, config.norm_eps),
        "rms_norm": ops.explain("rms_norm", x, weight, config.norm_eps),
        "gelu": ops.explain("gelu", h, approximate=gelu),
        "bias_gelu": ops.explain("bias_gelu", h, empty(config.d_mlp, dtype=torch.float32), approximate=gelu),
        "swiglu": ops.explain("swiglu", h, h),
    }
    if config.head_dim % 2 == 0:
        angles = empty(context, config.head_dim // 2, dtype=torch.float32)
        explained["rope"] = ops.explain("rope", q, angles, angles)
    logits = empty(batch * context, config.vocab_size)
    targets = torch.zeros(batch * context, dtype=torch.int64, device=device)
    explained["cross_entropy"] = ops.explain("cross_entropy", logits, targets)
    return explained
