"""The candidate operations. Parameter names are those of quark0/darts cnn/operations.py.

Convolutions have no bias; every BatchNorm has momentum 0.1 and eps 1e-5, PyTorch's defaults.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast import ops


class Zero(nn.Module):
    """`none`: zeros of the output's shape."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class Noise(nn.Module):
    """`noise` of S4: a fresh standard normal tensor of the output's shape (RobustDARTS, NoiseOp)."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])


class ReLUConvBN(nn.Module):
    """ReLU, convolution, BatchNorm: the 1x1 preprocessing of a cell and the convolutions of NAS-Bench-201."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        affine: bool = True,
        track: bool = True,
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(c_out, affine=affine, track_running_stats=track),
        )

    def layer(self) -> ops.ReLUConvBNLayer:
        return ops.ReLUConvBNLayer((self.op[1],), self.op[2])  # type: ignore[arg-type]

    # self may be a foreign module of the same layout: see drop_in/fused.py
    def forward(self, x: Tensor) -> Tensor:
        return ops.relu_conv_bn(x, *ReLUConvBN.layer(self))


class DilConv(nn.Module):
    """ReLU, dilated depthwise, pointwise, BatchNorm."""

    def __init__(
        self, c: int, kernel: int, stride: int, dilation: int, affine: bool = True, track: bool = True
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            nn.BatchNorm2d(c, affine=affine, track_running_stats=track),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise, BatchNorm, twice; the stride is in the first half."""

    def __init__(self, c: int, kernel: int, stride: int, affine: bool = True, track: bool = True) -> None:
        super().__init__()
        padding = kernel // 2
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c, c, kernel, stride, padding, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            nn.BatchNorm2d(c, affine=affine, track_running_stats=track),
            nn.ReLU(),
            nn.Conv2d(c, c, kernel, 1, padding, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            nn.BatchNorm2d(c, affine=affine, track_running_stats=track),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves the resolution: two 1x1 convolutions of stride 2, one pixel apart, concatenated; BatchNorm."""

    def __init__(self, c_in: int, c_out: int, affine: bool = True, track: bool = True) -> None:
        super().__init__()
        if c_out % 2:
            raise ValueError(f"channels: a reduction needs an even number of channels, got {c_out}")
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine, track_running_stats=track)

    def layer(self) -> ops.ReLUConvBNLayer:
        return ops.ReLUConvBNLayer((self.conv_1, self.conv_2), self.bn)

    # as in ReLUConvBN
    def forward(self, x: Tensor) -> Tensor:
        return ops.relu_conv_bn(x, *FactorizedReduce.layer(self))


def preprocess(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """[module(x) for module in modules], with as few reads of x as there are kinds of modules.

    Only for this package's own modules without hooks: others are called.
    """
    together: list[Any] = [m for m in modules if type(m) in (ReLUConvBN, FactorizedReduce) and not _hooked(m)]
    found = dict(zip(together, ops.relu_conv_bns(x, [m.layer() for m in together]), strict=True))
    return [found[m] if m in found else m(x) for m in modules]


def _hooked(module: nn.Module) -> bool:
    forward, backward = module._forward_hooks, module._backward_hooks
    return bool(forward or backward or module._forward_pre_hooks or module._backward_pre_hooks)


def make_primitive(name: str, c: int, stride: int, affine: bool = True, track: bool = True) -> nn.Module:
    """The candidate operation `name`, from [N, c, H, W] to [N, c, H / stride, W / stride].

    Pools come bare: a supernet of the DARTS family puts a BatchNorm behind them, a derived network does not.
    """
    match name:
        case "none":
            return Zero(stride)
        case "noise":
            return Noise(stride)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine, track)
        case "max_pool_3x3":
            return nn.MaxPool2d(3, stride, padding=1)
        case "avg_pool_3x3":
            return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
        case "sep_conv_3x3":
            return SepConv(c, 3, stride, affine, track)
        case "sep_conv_5x5":
            return SepConv(c, 5, stride, affine, track)
        case "dil_conv_3x3":
            return DilConv(c, 3, stride, 2, affine, track)
        case "dil_conv_5x5":
            return DilConv(c, 5, stride, 2, affine, track)
        case "nor_conv_1x1":
            return ReLUConvBN(c, c, 1, stride, 0, affine, track)
        case "nor_conv_3x3":
            return ReLUConvBN(c, c, 3, stride, 1, affine, track)
    raise ValueError(f"primitive: there is none called {name!r}")
