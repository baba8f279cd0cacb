"""The autograd functions of linear layers, of what is one op with them, and of both by 8-bit floats, whose gradients
come from tensors that were rounded in the forward pass."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.kernels = kernels
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, weight)
        return kernels.linear_fwd(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.linear_bwd(grad_outputs[0], *ctx.saved_tensors, ctx.needs_input_grad[1:])


class ActivationLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        x_bias: Tensor | None,
        up: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        ctx.kernels, ctx.options = kernels, (bias is not None, activation)
        out, kept = kernels.activation_linear_fwd(x, x_bias, up, weight, bias, activation)
        ctx.save_for_backward(x, x_bias, up, weight, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, *ctx.kernels.activation_linear_bwd(grad_outputs[0], *ctx.saved_tensors, *ctx.options), None


class MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        ctx.kernels, ctx.activation = kernels, activation
        out, h, kept = kernels.mlp_fwd(x, up, up_bias, down, down_bias, activation)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, up, up_bias, down, h, kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = ctx.activation, ctx.needs_input_grad[1:6]
        return None, *ctx.kernels.mlp_bwd(grad_outputs[0], *ctx.saved_tensors, *options), None


class Fp8Linear(torch.autograd.Function):
    """Keeps x and weight as the products of the gradients take them: of 8 bits, transposed."""

    @staticmethod
    def forward(ctx: Any, kernels: ModuleType, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        needs = ctx.needs_input_grad[1:4]
        if not any(needs):
            return kernels.fp8_linear_fwd(x, weight, bias)
        out, *saved = kernels.fp8_linear_kept(x, weight, bias, needs)
        ctx.kernels, ctx.shape = kernels, tuple(weight.shape)
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = ctx.shape, ctx.needs_input_grad[1:]
        return None, *ctx.kernels.fp8_linear_bwd(grad_outputs[0], *ctx.saved_tensors, *options)


class Fp8MLP(torch.autograd.Function):
    """Keeps, as Fp8Linear, what the products of the gradients take, and what the activation takes."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        up: Tensor,
        up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        activation: str,
    ) -> Tensor:
        args, needs = (x, up, up_bias, down, down_bias, activation), ctx.needs_input_grad[1:6]
        if not any(needs):
            return kernels.fp8_mlp_fwd(*args)
        out, *saved = kernels.fp8_mlp_kept(*args, needs)
        ctx.kernels, ctx.options = kernels, (activation, (*up.shape, *down.shape))
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        options = *ctx.options, ctx.needs_input_grad[1:6]
        return None, *ctx.kernels.fp8_mlp_bwd(grad_outputs[0], *ctx.saved_tensors, *options), None


class Fp8LinearCrossEntropy(torch.autograd.Function):
    """Gradients of the losses' sum are made with the loss, and scaled in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        kernels: ModuleType,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        reduction: str,
    ) -> Tensor:
        args, needs = (x, weight, targets, ignore_index, reduction), ctx.needs_input_grad[1:3]
        if not any(needs):
            return kernels.fp8_linear_cross_entropy_fwd(*args)
        loss, *saved = kernels.fp8_linear_cross_entropy_gradients(*args, needs)
        ctx.kernels, ctx.reduction, ctx.dtypes = kernels, reduction, (x.dtype, weight.dtype)
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        count, *gradients = ctx.saved_tensors
        bwd = ctx.kernels.fp8_linear_cross_entropy_bwd
        dx, dw = (
            g if g is None else bwd(grad_outputs[0], count, g, ctx.reduction, dtype)
            for g, dtype in zip(gradients, ctx.dtypes, strict=True)
        )
        return None, dx, dw, None, None, None
