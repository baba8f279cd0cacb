"""The public ops: signature, shapes, validation and dispatch. Every one takes `backend=` and is differentiable.

Tensors may have any strides; the result has the first tensor's dtype. A wrong argument raises InputError with its name.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..errors import InputError
from ..hardware import several_gpus
from . import arguments, autograd, reference, registry


def softmax(x: Tensor, *, mask: Tensor | None = None, causal: bool = False, backend: str | None = None) -> Tensor:
    """Softmax over the last dimension. x: (..., N) -> (..., N).

    mask: bool, broadcastable to x, False where an element takes no part. `causal`: row i of the last two dimensions
    (Tq, Tk) sees columns j <= i + Tk - Tq. A row of which nothing takes part gives zeros.
    """
    return run("softmax", backend, arguments.softmax(x, mask=mask, causal=causal))


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> Tensor:
    """Layer normalisation over the last dimension. x: (..., N); weight, bias: (N,), of x's dtype or float32."""
    return run("layer_norm", backend, arguments.layer_norm(x, weight, bias, eps))


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention. q: (B, Tq, H, D); k, v: (B, Tk, Hkv, D) -> (B, Tq, H, D).

    H is a multiple of Hkv (grouped-query attention). `causal` is aligned bottom right: query i sees keys
    j <= i + Tk - Tq, and with a `window` only the last so many of these; a query that sees no key gives zeros. `scale`
    is 1/sqrt(D) by default; `softcap` c > 0 makes c tanh(score / c) of the scaled scores. With `return_lse` also their
    log-sum-exp (B, H, Tq), float32, which has no gradient.
    """
    options = {"window": window, "softcap": softcap, "return_lse": return_lse}
    return run("attention", backend, arguments.attention(q, k, v, causal=causal, scale=scale, **options))


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None = None,
    *,
    block_table: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Attention of the last Tq tokens of each sequence over its key-value cache, which holds them already.

    q: (B, Tq, H, D) -> (B, Tq, H, D). k_cache, v_cache: (B, capacity, Hkv, D), or pages (n_pages, page_size, Hkv, D)
    with block_table (B, max_pages) int32, the page of each page_size keys in turn. lengths: (B,) int32, from 0 to the
    capacity, which is what all have without them. Query i sees keys j < lengths[b] - (Tq - 1 - i); one that sees none
    gives zeros. `window` and `softcap` are those of `attention`. What lies past the lengths is not read, in the cache
    or in block_table. Neither lengths nor block_table are waited for, so that a captured graph replays with others. No
    gradient.
    """
    scores = {"scale": scale, "window": window, "softcap": softcap}
    args = arguments.decode_attention(q, k_cache, v_cache, lengths, block_table=block_table, **scores)
    return run("decode_attention", backend, args)


def append_kv_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    *,
    block_table: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Write the keys and values of each sequence's last T tokens, k and v (B, T, Hkv, D), into its cache, in place,
    where `decode_attention` with the same lengths, which count them, then reads them.

    k_cache, v_cache, lengths and block_table are as there; pages are no other sequence's. A token whose place is before
    the cache or past its capacity is not written. Nothing is waited for but by the reference with a block_table. No
    gradient.
    """
    args = arguments.append_kv(k_cache, v_cache, k, v, lengths, block_table=block_table)
    _run_in_place("append_kv", backend, args)
    _changed(k_cache, v_cache)


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Any:
    """`attention` of sequences of different lengths that lie one after another, each apart from the others.

    q: (all queries, H, D); k, v: (all keys, Hkv, D); cu_seqlens: (B + 1,) int32, where each sequence begins and the
    last ends, on the tensors' device, from which the host does not read them; max_seqlen: at least the longest.
    -> (all queries, H, D), with `return_lse` also (H, all queries). Rows after the last sequence, which fill up a total
    that a CUDA graph has fixed, may hold anything: they give zeros (-inf for the log-sum-exp), and get zero gradients.
    """
    options = {"causal": causal, "scale": scale, "window": window, "softcap": softcap, "return_lse": return_lse}
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return run("attention_varlen", backend, arguments.attention_varlen(q, k, v, *lengths, **options))


def rms_norm(
    x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, *, offset: float = 0.0, backend: str | None = None
) -> Tensor:
    """Root-mean-square normalisation over the last dimension, times offset + weight (Gemma's offset is 1).

    x: (..., N); weight: (N,), of x's dtype or float32.
    """
    return run("rms_norm", backend, arguments.rms_norm(x, weight, eps, offset=offset))


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual) and the sum itself, in one pass: (norm, sum). Bitwise what the two steps give.

    x, residual: (..., N), of one dtype.
    """
    return run("add_layer_norm", backend, arguments.add_layer_norm(x, residual, weight, bias, eps))


def add_rms_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    offset: float = 0.0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """rms_norm(x + residual) and the sum itself, in one pass: (norm, sum), as add_layer_norm."""
    return run("add_rms_norm", backend, arguments.add_rms_norm(x, residual, weight, eps, offset=offset))


def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none", backend: str | None = None) -> Tensor:
    """x * Phi(x), element by element; `approximate="tanh"` is GPT-2's."""
    return run("gelu", backend, arguments.gelu(x, approximate=approximate))


def bias_gelu(
    x: Tensor,
    bias: Tensor | None = None,
    *,
    approximate: Literal["none", "tanh"] = "none",
    backend: str | None = None,
) -> Tensor:
    """gelu(x + bias): a linear layer's bias and activation in one pass. x: (..., N); bias: (N,), as layer_norm's."""
    return run("bias_gelu", backend, arguments.bias_gelu(x, bias, approximate=approximate))


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """silu(gate) * up, element by element; both of one shape and dtype."""
    return run("swiglu", backend, arguments.swiglu(gate, up))


def geglu(
    gate: Tensor, up: Tensor, *, approximate: Literal["none", "tanh"] = "tanh", backend: str | None = None
) -> Tensor:
    """gelu(gate) * up, element by element; both of one shape and dtype."""
    return run("geglu", backend, arguments.geglu(gate, up, approximate=approximate))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """x @ weight^T + bias. x: (..., N); weight: (M, N); bias: (M,), of x's dtype or float32 -> (..., M)."""
    return run("linear", backend, arguments.linear(x, weight, bias))


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """`linear` whose products, of the gradients too, are of 8-bit floats: x and weight are rounded to e4m3 (4 bits of
    precision), the gradient to e5m2 (3), each tensor scaled by a power of two such that its largest magnitude fits.

    M and N must be multiples of 16. A NaN stays where it would be; an infinity makes all results NaN.
    """
    return run("fp8_linear", backend, arguments.fp8_linear(x, weight, bias))


def fp8_mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: Literal["silu", "gelu", "gelu_tanh"] = "gelu",
    backend: str | None = None,
) -> Tensor:
    """Two `fp8_linear` with an activation between: act(h) @ down^T + down_bias of h = x @ up^T + up_bias, or, where up
    is twice as wide as down takes, of h in two halves: act(first) * second. The gradient of h is scaled by a bound on
    its largest magnitude in that one's place, which wastes some of e5m2's smallest numbers.

    x: (..., N); up: (F or 2 F, N); down: (M, F); biases: (F or 2 F,) and (M,), of x's dtype or float32 -> (..., M). N,
    F and M must be multiples of 16.
    """
    args = arguments.fp8_mlp(x, up, up_bias, down, down_bias, activation=activation)
    return run("fp8_mlp", backend, args)


def activation_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    up: Tensor | None = None,
    x_bias: Tensor | None = None,
    activation: Literal["silu", "gelu", "gelu_tanh"] = "gelu",
    backend: str | None = None,
) -> Tensor:
    """(act(x + x_bias) * up) @ weight^T + bias: the end of an MLP, gated by `up` or not. What the layer takes is not
    kept for the gradients, but made again from x and up.

    x, up: (..., N); x_bias: (N,), of x's dtype or float32; weight: (M, N); bias: (M,), of x's dtype or
    float32 -> (..., M).
    """
    args = arguments.activation_linear(x, weight, bias, up=up, x_bias=x_bias, activation=activation)
    return run("activation_linear", backend, args)


def mlp(
    x: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    *,
    activation: Literal["silu", "gelu", "gelu_tanh"] = "gelu",
    backend: str | None = None,
) -> Tensor:
    """Two linear layers with an activation between: act(h) @ down^T + down_bias of h = x @ up^T + up_bias, or, where up
    is twice as wide as down takes, of h in two halves: act(first) * second. On a GPU the product alone, of all that
    lies between, is kept for the gradients.

    x: (..., N); up: (F or 2 F, N); down: (M, F); biases: (F or 2 F,) and (M,), of x's dtype or float32 -> (..., M).
    """
    return run("mlp", backend, arguments.mlp(x, up, up_bias, down, down_bias, activation=activation))


def rope(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, backend: str | None = None) -> Tensor:
    """Rotary position embedding of pairs (i, i + D/2), or (2i, 2i + 1) where interleaved.

    x: (B, T, H, D) with D even; cos, sin: (T, D/2), which is where any scaling of positions belongs, or (B, T, D/2)
    where every row has positions of its own.
    """
    return run("rope", backend, arguments.rope(x, cos, sin, interleaved=interleaved))


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    n_classes: int | None = None,
    in_place: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Negative log-likelihood, in nats: the mean over the targets that are not `ignore_index` (0 if there are none),
    the sum, or each ("none", (N,)).

    logits: (N, V); targets: (N,) int64 in [0, n_classes). Returns float32 (float64 for float64 logits). z_loss adds
    that many times logsumexp^2. Of a padded vocabulary only the first `n_classes` columns count. With `in_place` the
    backward pass may write the gradient over the logits, which nothing else may then need.
    """
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    in_place = in_place and not torch.compiler.is_compiling()  # a compiler plans memory itself
    options |= {"reduction": reduction, "n_classes": n_classes, "in_place": in_place}
    return run("cross_entropy", backend, arguments.cross_entropy(logits, targets, **options))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """cross_entropy(x @ weight^T + bias, targets) without holding all the logits at once.

    x: (N, D); weight: (V, D); bias: (V,), all of one dtype; targets: (N,) int64. Gradients are made together with the
    loss; the weight's is summed in float32.
    """
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    args = arguments.linear_cross_entropy(x, weight, targets, bias, reduction=reduction, **options)
    return run("linear_cross_entropy", backend, args)


def fp8_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum"] = "mean",
    backend: str | None = None,
) -> Tensor:
    """`linear_cross_entropy` by products of 8-bit floats, rounded as those of `fp8_linear`. The gradient of the logits
    is rounded before it is divided by the number of targets or multiplied by what comes in.

    x: (N, D), D a multiple of 16; weight: (V, D), of any V, of one dtype; targets: (N,) int64.
    """
    args = arguments.fp8_linear_cross_entropy(x, weight, targets, ignore_index=ignore_index, reduction=reduction)
    return run("fp8_linear_cross_entropy", backend, args)


def embedding(weight: Tensor, tokens: Tensor, *, padding_idx: int | None = None, backend: str | None = None) -> Tensor:
    """Row tokens[...] of weight for each token; row `padding_idx` gets no gradient.

    weight: (V, D); tokens: int64 of any shape, in [0, V) -> (*tokens.shape, D).
    """
    return run("embedding", backend, arguments.embedding(weight, tokens, padding_idx=padding_idx))


def adamw_(
    parameters: arguments.Tensors,
    grads: arguments.Tensors,
    exp_avgs: arguments.Tensors,
    exp_avg_sqs: arguments.Tensors,
    copies: arguments.Tensors | None = None,
    *,
    step: int,
    learning_rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    grad_scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> None:
    """AdamW's update of parameters and both moments, in place, for the gradients grad * grad_scale.

    One tensor or equally many of each, on one device. Moments have the parameters' dtype; gradients, and `copies`,
    which get the new parameters, may have another. `step` counts from 1. A grad_scale on the device is not waited for:
    where it is not finite, nothing changes. Nothing is differentiated through it.
    """
    settings = {"learning_rate": learning_rate, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    tensors = parameters, grads, exp_avgs, exp_avg_sqs, copies
    args = arguments.adamw(*tensors, step=step, grad_scale=grad_scale, **settings)
    _run_in_place("adamw", backend, args)
    changed, _, exp_avgs, exp_avg_sqs, made = args[:5]
    _changed(*changed, *exp_avgs, *exp_avg_sqs, *(made or ()))


def explain(op: str, *args: Any, **kwargs: Any) -> str:
    """Every backend of `op` for this call, a line each: whether it is chosen, and by what, or why it cannot run.

    Takes the arguments of the op, without `backend=`.
    """
    if op not in arguments.ARGUMENTS:
        raise InputError(f"unknown op {op!r}; choose one of: {', '.join(arguments.ARGUMENTS)}")
    return registry.explain(op, arguments.ARGUMENTS[op](*args, **kwargs))


def run(op: str, backend: str | None, args: tuple[Any, ...]) -> Any:
    """An op by what `arguments.ARGUMENTS[op]` makes of its arguments, which have been checked thereby."""
    if torch.compiler.is_compiling():
        from . import compiled

        return compiled.run(op, backend, *args)
    kernels = registry.choose(op, backend, args)
    x = args[0]
    if kernels is None or not x.is_cuda or not several_gpus() or x.get_device() == torch.cuda.current_device():
        return autograd.apply(op, kernels, args)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the tensors'
        return autograd.apply(op, kernels, args)


def _run_in_place(op: str, backend: str | None, args: tuple[Any, ...]) -> None:
    """As `run`, an op that gives nothing and is not differentiated."""
    kernels = registry.choose(op, backend, args)
    with torch.no_grad(), torch.cuda.device_of(registry.first_tensor(args)):
        (getattr(reference, op) if kernels is None else getattr(kernels, f"{op}_fwd"))(*args)


def _changed(*tensors: Tensor) -> None:
    """Tell autograd, which kernels do not, so that it refuses to go back to what the tensors held."""
    torch.autograd.graph.increment_version(tensors)
