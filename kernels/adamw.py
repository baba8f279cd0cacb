"""AdamW (https://arxiv.org/abs/1711.05101, algorithm 2) over many tensors in one launch, in place.

A table holds the tensors' addresses; each program finds its tensor and its block of elements in a second one.
Arithmetic and state are float32; gradients and the optional copies of the parameters may be of a 16-bit type. A scale
of the gradients that is read on the device allows clipping, and skipping an update, without the host waiting. Not
supported: float64.
"""

import functools
from collections.abc import Iterable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import launch

BLOCK = 1024


@triton.jit
def _adamw_kernel(
    Addresses, Sizes, Blocks, GradScale, LikeGrad, LikeCopy,
    step_size, decay, to_average, beta2, to_square, correction, eps, grad_scale,
    SCALE_ON_DEVICE: tl.constexpr, HAS_COPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Addresses: (tensors, 5) int64, of parameter, gradient, both moments and copy; Sizes: (tensors,) int64, elements;
    Blocks: (programs, 2) int64, tensor and first element. LikeGrad, LikeCopy: pointers, for their types."""
    tensor = tl.load(Blocks + 2 * tl.program_id(0))
    at = tl.load(Blocks + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK)
    inside = at < tl.load(Sizes + tensor)
    row = Addresses + 5 * tensor
    floats = tl.pointer_type(tl.float32)
    parameter = tl.load(row).to(floats) + at
    gradient = tl.load(row + 1).to(LikeGrad.dtype) + at
    average = tl.load(row + 2).to(floats) + at
    square = tl.load(row + 3).to(floats) + at
    if SCALE_ON_DEVICE:
        grad_scale = tl.load(GradScale + tl.zeros_like(at)).to(tl.float32)
        inside = inside & (tl.abs(grad_scale) < float("inf"))  # false for NaN, too
    g = tl.load(gradient, mask=inside, other=0.0).to(tl.float32) * grad_scale
    m = tl.load(average, mask=inside, other=0.0)
    v = tl.load(square, mask=inside, other=0.0)
    p = tl.load(parameter, mask=inside, other=0.0)
    m += (g - m) * to_average
    v = v * beta2 + g * g * to_square
    root = tl.sqrt_rn(tl.div_rn(v, correction)) + eps
    p = p * decay - step_size * tl.div_rn(m, root)
    tl.store(average, m, mask=inside)
    tl.store(square, v, mask=inside)
    tl.store(parameter, p, mask=inside)
    if HAS_COPY:
        copy = tl.load(row + 4).to(LikeCopy.dtype) + at
        tl.store(copy, p.to(LikeCopy.dtype.element_ty), mask=inside)


def _table(numbers: Iterable[Iterable[int]], device: torch.device) -> Tensor:
    table = torch.tensor([list(row) for row in numbers], dtype=torch.int64)
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table


@functools.lru_cache(maxsize=8)
def _blocks(sizes: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """The kernel's Sizes and Blocks, kept: those of a model never change."""
    blocks = _table(((i, start) for i, n in enumerate(sizes) for start in range(0, n, BLOCK)), device)
    return _table([sizes], device).view(-1), blocks


def adamw_fwd(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor] | None,
    step: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    grad_scale: float | Tensor,
) -> None:
    """Update parameters and moments, float32, and write the parameters to `copies` where there are."""
    grads = [g.contiguous() for g in grads]
    groups = zip(parameters, grads, exp_avgs, exp_avg_sqs, copies or parameters, strict=True)
    device = parameters[0].device
    addresses = _table(((t.data_ptr() for t in group) for group in groups), device)
    sizes, blocks = _blocks(tuple(p.numel() for p in parameters), device)
    if len(blocks) == 0:
        return
    on_device = isinstance(grad_scale, Tensor)
    launch(
        _adamw_kernel, (len(blocks),),
        addresses, sizes, blocks, grad_scale if on_device else sizes, grads[0], (copies or parameters)[0],
        learning_rate / (1.0 - beta1**step), 1.0 - learning_rate * weight_decay,
        1.0 - beta1, beta2, 1.0 - beta2, 1.0 - beta2**step, eps, 1.0 if on_device else grad_scale,
        SCALE_ON_DEVICE=on_device, HAS_COPY=copies is not None, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip


def adamw_limits(
    parameters: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    copies: list[Tensor] | None,
    *settings: object,
) -> str | None:
    """Why the tensors cannot be updated where they are."""
    if parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return "copies addresses from the host, which a CUDA graph would not do again"
    written = (*parameters, *exp_avgs, *exp_avg_sqs, *(copies or ()))
    if not all(t.is_contiguous() for t in written):
        return "needs contiguous parameters, moments and copies"
    return None
