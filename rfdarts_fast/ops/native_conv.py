"""Frozen convolutions that are not mixed ops: ReLU, 1x1 convolution, BatchNorm, and FactorizedReduce."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from rfdarts_fast.ops.backend import Memory
from rfdarts_fast.ops.native_plan import pack_reduce

_packed: weakref.WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = weakref.WeakKeyDictionary()


def channels_inside(x: Tensor) -> Tensor:
    """x itself where channels are consecutive, else a channels_last copy."""
    if x.stride(1) == 1 and x.stride(3) >= x.shape[1]:
        return x
    return channels_last(x)


def channels_last(x: Tensor) -> Tensor:
    """x with the strides of a dense NHWC tensor, sizes of 1 included; itself where it has them."""
    _, c, h, w = x.shape
    strides = (h * w * c, 1, w * c, c)
    if x.stride() == strides:
        return x
    return torch.empty_strided(x.shape, strides, dtype=x.dtype, device=x.device).copy_(x)


def why_not_conv(x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.Module) -> str | None:
    """Why the CPU kernels cannot compute ReLU, one convolution or FactorizedReduce's two, and `norm`."""
    if x.device.type != "cpu":
        return f"no kernels for device {x.device.type}"
    if x.dtype not in (torch.float32, torch.float64):
        return f"no kernels for dtype {x.dtype}"
    return unsupported_conv(x, convs, norm, x.dtype)


def unsupported_conv(
    x: Tensor, convs: tuple[nn.Conv2d, ...], norm: nn.Module, parameters: torch.dtype
) -> str | None:
    """What no device has kernels for, or None; weights and BatchNorm must have the dtype `parameters`."""
    if x.dim() != 4 or x.numel() == 0:
        return f"an input of shape {[*x.shape]}"
    stride = len(convs)
    if stride == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        return "a reduction of an odd image size"
    for conv in convs:
        if type(conv) is not nn.Conv2d or conv.bias is not None or conv.groups != 1:
            return "a convolution of an unexpected shape"
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (stride, stride), (0, 0)):
            return "a convolution that is not 1x1"
        if conv.weight.requires_grad:
            return "a convolution is trained; the kernels have no weight gradients"
        if conv.weight.dtype != parameters or conv.weight.device != x.device:
            return "convolution and input of different dtypes or devices"
    if type(norm) is not nn.BatchNorm2d or norm.momentum is None:
        return "no BatchNorm2d with a fixed momentum"
    if norm.affine and norm.weight.dtype != parameters:
        return "BatchNorm and input of different dtypes"
    return None


def _state(weight: Tensor) -> tuple:
    """What differs when a weight has changed."""
    # a tensor without data, for tracing, has no address
    address = id(weight) if isinstance(weight, FakeTensor) else weight.data_ptr()
    return address, weight._version, weight.dtype


def _weights(convs: tuple[nn.Conv2d, ...]) -> Tensor:
    """The matrix [in, out] and its transpose, packed again when a weight has changed."""
    state = tuple(_state(conv.weight) for conv in convs)
    found = _packed.get(convs[0])
    if found is None or found[0] != state:
        with torch.no_grad():
            if len(convs) == 2:
                parts = pack_reduce(*convs)
            else:
                matrix = convs[0].weight.flatten(1)
                parts = [matrix.t(), matrix]
            found = state, torch.cat([part.reshape(-1) for part in parts])
        _packed[convs[0]] = found
    return found[1]


class ConvNormFunction(torch.autograd.Function):
    """ReLU, frozen convolution, BatchNorm; see `relu_conv_bn`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gamma: Tensor,
        beta: Tensor,
        weights: Tensor,
        moments: Tensor | None,
        eps: float,
        reduce: bool,
        recompute: bool,
    ) -> tuple[Tensor, Tensor]:
        x = channels_inside(x)
        out, y, used = torch.ops.rfdarts.conv_bn_forward(x, weights, gamma, beta, moments, eps, reduce)
        ctx.save_for_backward(x, None if recompute else y, gamma, beta, weights, used)
        ctx.eps, ctx.reduce, ctx.training = eps, reduce, moments is None
        ctx.mark_non_differentiable(used)
        ctx.set_materialize_grads(False)
        return out, used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        x, y, gamma, beta, weights, used = ctx.saved_tensors
        if y is None:
            y = torch.ops.rfdarts.conv_bn_forward(x, weights, gamma, beta, used, ctx.eps, ctx.reduce)[1]
        dx, grad_gamma, grad_beta = torch.ops.rfdarts.conv_bn_backward(
            channels_last(grad),
            x,
            y,
            weights,
            gamma,
            beta,
            used,
            ctx.eps,
            ctx.training,
            ctx.reduce,
            ctx.needs_input_grad[0],
        )
        return dx if ctx.needs_input_grad[0] else None, grad_gamma, grad_beta, *(None,) * 5


def relu_conv_bn(
    x: Tensor,
    convs: tuple[nn.Conv2d, ...],
    norm: nn.BatchNorm2d,
    memory: Memory = "fast",
) -> Tensor:
    """norm(conv(relu(x))) with a frozen 1x1 convolution, or FactorizedReduce with its two.

    For arguments that the engine's `why_not_conv` has nothing against. x [N, C, H, W] -> [N, C', H, W], or
    [N, C', H/2, W/2] for a reduction; the running statistics are updated as BatchNorm2d does.
    `memory` "recompute" keeps nothing but x for the backward.

    Raises:
        ValueError: in training mode with a single value per channel, as BatchNorm2d.
    """
    training = norm.training or norm.running_mean is None
    count = x.shape[0] * (x.shape[2] // len(convs)) * (x.shape[3] // len(convs))
    if training and count == 1:
        raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
    weights = _weights(convs)
    gamma = norm.weight if norm.affine else weights.new_ones(norm.num_features)
    beta = norm.bias if norm.affine else weights.new_zeros(norm.num_features)
    moments = None
    if not training:
        moments = torch.stack([norm.running_mean, norm.running_var]).double()  # type: ignore[list-item]
    reduce, recompute = len(convs) == 2, memory == "recompute"
    out, used = ConvNormFunction.apply(x, gamma, beta, weights, moments, norm.eps, reduce, recompute)
    if norm.training and norm.running_mean is not None:
        torch.ops.rfdarts.update_running(
            [norm.running_mean],
            [norm.running_var],
            [norm.num_batches_tracked],
            used.unsqueeze(1),
            float(norm.momentum or 0.0),
            count,
        )
    return out
