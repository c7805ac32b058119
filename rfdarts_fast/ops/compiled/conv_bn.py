"""Frozen convolutions that are not mixed ops: ReLU, 1x1 convolution, BatchNorm, and FactorizedReduce."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from rfdarts_fast.ops.backend import Memory
from rfdarts_fast.ops.compiled.plan import pack_reduce
from rfdarts_fast.ops.reference import Layer

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
    """ReLU, frozen convolutions, BatchNorms; see `relu_conv_bns`."""

    @staticmethod
    def forward(
        ctx: Any,
        weights: list[Tensor],
        moments: list[Tensor],
        eps: float,
        reduce: bool,
        recompute: bool,
        x: Tensor,
        *gammas_betas: Tensor,
    ) -> tuple[Tensor, ...]:
        x, n = channels_inside(x), len(weights)
        gammas, betas = list(gammas_betas[:n]), list(gammas_betas[n:])
        outs, ys, used = torch.ops.rfdarts.relu_conv_bn_forward(x, weights, gammas, betas, moments, eps, reduce)
        ctx.save_for_backward(x, *weights, *gammas, *betas, *used, *([] if recompute else ys))
        ctx.eps, ctx.reduce, ctx.training, ctx.parts = eps, reduce, not moments, n
        ctx.mark_non_differentiable(*used)
        ctx.set_materialize_grads(False)
        return *outs, *used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, ops = ctx.parts, torch.ops.rfdarts
        given = grads[:n]
        if all(grad is None for grad in given):
            return (None,) * (6 + 2 * n)
        x, *lists = ctx.saved_tensors
        weights, gammas, betas, used, ys = (lists[i * n : (i + 1) * n] for i in range(5))
        if not ys:
            ys = ops.relu_conv_bn_forward(x, weights, gammas, betas, used, ctx.eps, ctx.reduce)[1]
        dense = [
            torch.zeros_like(y) if grad is None else channels_last(grad)
            for grad, y in zip(given, ys, strict=True)
        ]
        dx, grad_gammas, grad_betas = ops.relu_conv_bn_backward(
            dense,
            x,
            ys,
            weights,
            gammas,
            betas,
            used,
            ctx.eps,
            ctx.training,
            ctx.reduce,
            ctx.needs_input_grad[5],
        )
        return *(None,) * 5, dx if ctx.needs_input_grad[5] else None, *grad_gammas, *grad_betas


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
    return relu_conv_bns(x, [(convs, norm)], memory)[0]


def relu_conv_bns(x: Tensor, layers: Sequence[Layer], memory: Memory = "fast") -> list[Tensor]:
    """`relu_conv_bn` for several layers of one `kind` (see there) that read x, with one read of it."""
    norms = [norm for _, norm in layers]
    stride = len(layers[0][0])
    training = _uses_batch(norms[0])
    count = x.shape[0] * (x.shape[2] // stride) * (x.shape[3] // stride)
    if training and count == 1:
        raise ValueError("batch: BatchNorm in training mode needs more than one value per channel")
    weights = [_weights(convs) for convs, _ in layers]
    like = weights[0]
    gammas = [norm.weight if norm.affine else like.new_ones(norm.num_features) for norm in norms]
    betas = [norm.bias if norm.affine else like.new_zeros(norm.num_features) for norm in norms]
    moments = []
    if not training:
        moments = [torch.stack([norm.running_mean, norm.running_var]).double() for norm in norms]  # type: ignore[list-item]
    found = ConvNormFunction.apply(
        weights, moments, norms[0].eps, stride == 2, memory == "recompute", x, *gammas, *betas
    )
    for norm, used in zip(norms, found[len(layers) :], strict=True):
        if norm.training and norm.running_mean is not None:
            torch.ops.rfdarts.update_running_stats(
                [norm.running_mean],
                [norm.running_var],
                [norm.num_batches_tracked],
                used.unsqueeze(1),
                float(norm.momentum or 0.0),
                count,
            )
    return list(found[: len(layers)])


def _uses_batch(norm: nn.BatchNorm2d) -> bool:
    return norm.training or norm.running_mean is None


def kind(layer: Layer) -> tuple:
    """What layers must have in common to share a read: stride, eps, whether statistics are the batch's."""
    convs, norm = layer
    return len(convs), norm.eps, _uses_batch(norm)
