"""Launchers over the native ops: tensors in, tensors out, as the Triton kernels' are. The tensors' device decides which
library runs; rows that are not evenly spaced are copied first."""

import itertools
from typing import Any

import torch
from torch import Tensor

from . import schemas

schemas.define()
_ops = torch.ops.llmfast


def softmax_fwd(x: Tensor, mask: None, causal: bool) -> Tensor:
    """x: (..., N) -> (..., N), contiguous."""
    return _softmax_fwd(as_rows(x))


def softmax_bwd(dy: Tensor, y: Tensor) -> Tensor:
    """dy, y: (..., N) -> dx, contiguous."""
    return _softmax_bwd(as_rows(dy), as_rows(y))


def softmax_limits(x: Tensor, mask: Tensor | None, causal: bool) -> str | None:
    """Why a kernel cannot give what is asked."""
    return "has no mask" if causal or mask is not None else None


def layer_norm_fwd(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x: (..., N); weight, bias: (N,) or None -> y as x, contiguous; mean and 1/std, (rows,) float32."""
    return _layer_norm_fwd(as_rows(x), _vector(weight), _vector(bias), eps)


def layer_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> dx as x; dweight, dbias (N,) float32 or None."""
    dx, dw, db = _layer_norm_bwd(as_rows(dy), as_rows(x), _vector(weight), mean, rstd)
    return dx, None if weight is None else dw, db if has_bias else None


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch's sum, then the norm's kernel -> y, sum; mean and 1/std, (rows,) float32."""
    total = x + residual
    y, mean, rstd = layer_norm_fwd(total, weight, bias, eps)
    return y, total, mean, rstd


def add_layer_norm_bwd(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """-> the gradient of x and of the residual; dweight, dbias (N,) float32 or None."""
    dx, dw, db = layer_norm_bwd(dy, total, weight, mean, rstd, has_bias)
    return dx.add_(dtotal), dw, db


def rms_norm_fwd(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """x: (..., N); weight: (N,) or None -> y as x, contiguous; 1/rms, (rows,) float32."""
    return _rms_norm_fwd(as_rows(x), _offset(weight, offset), eps)


def rms_norm_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor | None]:
    """-> dx as x; dweight (N,) float32 or None."""
    dx, dw = _rms_norm_bwd(as_rows(dy), as_rows(x), _offset(weight, offset), rstd)
    return dx, None if weight is None else dw


def add_rms_norm_fwd(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch's sum, then the norm's kernel -> y, sum; 1/rms, (rows,) float32."""
    total = x + residual
    y, rstd = rms_norm_fwd(total, weight, eps, offset)
    return y, total, rstd


def add_rms_norm_bwd(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor | None, rstd: Tensor, offset: float
) -> tuple[Tensor, Tensor | None]:
    """-> the gradient of x and of the residual; dweight (N,) float32 or None."""
    dx, dw = rms_norm_bwd(dy, total, weight, rstd, offset)
    return dx.add_(dtotal), dw


def bias_gelu_fwd(x: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """gelu(x + bias). x: (..., N); bias: (N,) or None -> (..., N), contiguous."""
    return _bias_gelu_fwd(as_rows(x), _vector(bias), approximate == "tanh")


def bias_gelu_bwd(dy: Tensor, x: Tensor, bias: Tensor | None, approximate: str) -> tuple[Tensor, Tensor | None]:
    """-> dx as x; dbias (N,) float32 or None."""
    dx, db = _bias_gelu_bwd(as_rows(dy), as_rows(x), _vector(bias), approximate == "tanh")
    return dx, None if bias is None else db


def bias_gelu_limits(x: Tensor, bias: Tensor | None, approximate: str) -> str | None:
    """Why x has no rows to work on."""
    return without_rows(x)


def gelu_fwd(x: Tensor, approximate: str) -> Tensor:
    """x: (..., N) -> (..., N), contiguous."""
    return bias_gelu_fwd(x, None, approximate)


def gelu_bwd(dy: Tensor, x: Tensor, approximate: str) -> Tensor:
    """-> dx as x."""
    return bias_gelu_bwd(dy, x, None, approximate)[0]


def gelu_limits(x: Tensor, approximate: str) -> str | None:
    """Why x has no rows to work on."""
    return without_rows(x)


def swiglu_fwd(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up: (..., N) -> silu(gate) * up, contiguous."""
    return _swiglu_fwd(as_rows(gate), as_rows(up))


def swiglu_bwd(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """-> dgate, dup, contiguous."""
    return _swiglu_bwd(as_rows(dy), as_rows(gate), as_rows(up))


def swiglu_limits(gate: Tensor, up: Tensor) -> str | None:
    """Why gate has no rows to work on."""
    return without_rows(gate)


def rope_fwd(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x: (B, T, H, D) of any strides but the last; cos, sin: (T, D/2) or (B, T, D/2) -> as x, contiguous."""
    return _rotate(x, cos, sin, False)


def rope_bwd(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """-> dx, contiguous: a rotation back."""
    return _rotate(dy, cos, sin, True)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    shape = x.shape
    if cos.dim() == 3:  # rows with positions of their own are one long row
        x, cos, sin = x.flatten(0, 1)[None], cos.flatten(0, 1), sin.flatten(0, 1)
    return _rope(_adjacent(x), cos.float().contiguous(), sin.float().contiguous(), back).view(shape)


def rope_limits(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> str | None:
    """Why a kernel cannot give what is asked."""
    if interleaved:
        return "has no interleaved layout"
    return "gives cos and sin no gradient; detach them" if cos.requires_grad or sin.requires_grad else None


def cross_entropy_fwd(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logits: (N, V); targets: (N,) int64 -> mean loss (), row maxima and sums (2, N), targets counted ()."""
    return _cross_entropy_fwd(as_rows(logits), targets.contiguous(), ignore_index)


def cross_entropy_bwd(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    statistics: Tensor,
    count: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> Tensor:
    """-> dlogits, contiguous, of logits' dtype."""
    return _cross_entropy_bwd(grad, as_rows(logits), targets.contiguous(), statistics, count, ignore_index)


def cross_entropy_limits(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    n_classes: int,
    in_place: bool,
) -> str | None:
    """Why the kernels cannot give what is asked."""
    if logits.shape[1] == 0:
        return "needs at least one class"
    if in_place and logits.is_cuda:
        return "does not write over the logits"  # nor need it on a CPU, where memory is rarely short
    plain = not (label_smoothing or z_loss) and reduction == "mean" and n_classes == logits.shape[1]
    return None if plain else "has the plain mean only, of all columns"


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: None,
    softcap: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D), of any strides but the last -> out as q, contiguous; statistics.

    The statistics, row maxima and sums (2, B, H, Tq) float32, are empty where nobody needs them: few queries over many
    keys are then read by a faster path.
    """
    needed = return_lse or q.requires_grad or k.requires_grad or v.requires_grad
    return _attention_fwd(_adjacent(q), _adjacent(k), _adjacent(v), causal, scale, needed)


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    causal: bool,
    scale: float,
    window: None,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq, dk, dv, contiguous."""
    tensors = (_adjacent(t) for t in (dout, q, k, v))
    return _attention_bwd(*tensors, out, statistics, causal, scale)


def attention_limits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float,
    return_lse: bool,
) -> str | None:
    """Why the kernels cannot give what is asked."""
    if window is not None or softcap:
        return "has no window and no cap"
    return None if q.shape[-1] <= 256 else f"supports head_dim up to 256, not {q.shape[-1]}"


def decode_attention_fwd(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    block_table: None,
    scale: float,
    window: None,
    softcap: float,
) -> Tensor:
    """q: (B, Tq, H, D); caches: (B, capacity, Hkv, D) -> out as q. Neighbours of one length run together."""
    q, k, v = _adjacent(q), _adjacent(k_cache), _adjacent(v_cache)
    if lengths is None:
        return _attention_fwd(q, k, v, True, scale, False)[0]
    outs, end = [], 0
    for length, run in itertools.groupby(lengths.clamp(0, k.shape[1]).tolist()):
        start, end = end, end + len(list(run))
        keys, values = k[start:end, :length], v[start:end, :length]
        outs.append(_attention_fwd(q[start:end], keys, values, True, scale, False)[0])
    return outs[0] if len(outs) == 1 else torch.cat(outs) if outs else torch.empty_like(q)


def decode_attention_limits(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    block_table: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float,
) -> str | None:
    """Why the kernels cannot run this call."""
    if block_table is not None:
        return "has no paged cache"
    if lengths is not None and torch.compiler.is_compiling():
        return "reads the lengths, so it is not traced by torch.compile"
    return attention_limits(q, k_cache, v_cache, True, scale, window, softcap, False)


def adamw_fwd(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: None,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float,
) -> None:
    """All contiguous, float32: updates parameters and moments."""
    corrections = (1.0 - beta1**step, 1.0 - beta2**step)
    settings = (learning_rate, beta1, beta2, eps, weight_decay, *corrections, grad_scale)
    for p, grad, m, v in zip(parameters, grads, exp_avgs, exp_avg_sqs, strict=True):
        _adamw(p, grad.contiguous(), m, v, *settings)


def adamw_limits(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor] | None,
    *settings: Any,
) -> str | None:
    """Why the tensors cannot be updated where they are."""
    if copies is not None or isinstance(settings[-1], Tensor) or grads[0].dtype != parameters[0].dtype:
        return "has no copies, no scale in a tensor and no gradients of another dtype"
    whole = all(t.is_contiguous() for t in (*parameters, *exp_avgs, *exp_avg_sqs))
    return None if whole else "needs contiguous parameters and moments"


def as_rows(x: Tensor) -> Tensor:
    """x where it is rows of adjacent elements at one distance from each other, else a contiguous copy."""
    if x.is_contiguous():
        return x
    sizes, strides = x.shape, x.stride()
    even = strides[-1] == 1
    outer = [(n, s) for n, s in zip(sizes[:-1], strides[:-1], strict=True) if n != 1]
    for (_, stride), (n, inner) in zip(outer, outer[1:], strict=False):
        even = even and stride == n * inner
    return x if even else x.contiguous()


def without_rows(x: Tensor) -> str | None:
    return "needs at least one dimension and one element in the last" if x.dim() == 0 or x.shape[-1] == 0 else None


def _adjacent(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _vector(p: Tensor | None) -> Tensor | None:
    return None if p is None else p.contiguous()


def _offset(weight: Tensor | None, offset: float) -> Tensor | None:
    return _vector(weight) if weight is None or offset == 0.0 else weight.float() + offset


def _op(name: str) -> Any:
    return getattr(_ops, name).default


_softmax_fwd, _softmax_bwd = _op("softmax_fwd"), _op("softmax_bwd")
_layer_norm_fwd, _layer_norm_bwd = _op("layer_norm_fwd"), _op("layer_norm_bwd")
_rms_norm_fwd, _rms_norm_bwd = _op("rms_norm_fwd"), _op("rms_norm_bwd")
_bias_gelu_fwd, _bias_gelu_bwd = _op("bias_gelu_fwd"), _op("bias_gelu_bwd")
_swiglu_fwd, _swiglu_bwd, _rope = _op("swiglu_fwd"), _op("swiglu_bwd"), _op("rope")
_cross_entropy_fwd, _cross_entropy_bwd = _op("cross_entropy_fwd"), _op("cross_entropy_bwd")
_attention_fwd, _attention_bwd = _op("attention_fwd"), _op("attention_bwd")
_adamw = _op("adamw_")
