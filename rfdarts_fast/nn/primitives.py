"""The candidate operations; `register_primitive` adds one.

Parameters are named as in quark0/darts cnn/operations.py. Convolutions have no bias; every BatchNorm has
momentum 0.1 and eps 1e-5, PyTorch's defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from rfdarts_fast import ops
from rfdarts_fast.ops.hooks import Hooks


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
        self.kernel = kernel
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
            nn.BatchNorm2d(c_out, affine=affine, track_running_stats=track),
        )

    def layer(self) -> ops.ReLUConvBNLayer:
        return ops.ReLUConvBNLayer((self.op[1],), self.op[2])  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        # kernels for others, on an edge of NAS-Bench-201, are those of its cell
        if self.kernel != 1 or Hooks(self.op.modules()):
            return self.op(x)
        return ops.relu_conv_bn(x, *self.layer())


def _separable(
    c: int, kernel: int, stride: int, dilation: int, affine: bool, track: bool
) -> tuple[nn.Module, ...]:
    """ReLU, depthwise, pointwise, BatchNorm."""
    padding = dilation * (kernel - 1) // 2
    return (
        nn.ReLU(),
        nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False),
        nn.Conv2d(c, c, 1, bias=False),
        nn.BatchNorm2d(c, affine=affine, track_running_stats=track),
    )


class DilConv(nn.Module):
    """ReLU, dilated depthwise, pointwise, BatchNorm."""

    def __init__(
        self, c: int, kernel: int, stride: int, dilation: int, affine: bool = True, track: bool = True
    ) -> None:
        super().__init__()
        self.op = nn.Sequential(*_separable(c, kernel, stride, dilation, affine, track))

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class SepConv(nn.Module):
    """ReLU, depthwise, pointwise, BatchNorm, twice; the stride is in the first half."""

    def __init__(self, c: int, kernel: int, stride: int, affine: bool = True, track: bool = True) -> None:
        super().__init__()
        halves = [_separable(c, kernel, s, 1, affine, track) for s in (stride, 1)]
        self.op = nn.Sequential(*halves[0], *halves[1])

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves the resolution: two 1x1 convolutions of stride 2, one pixel apart, concatenated; BatchNorm."""

    def __init__(self, c_in: int, c_out: int, affine: bool = True, track: bool = True) -> None:
        super().__init__()
        if c_out % 2:
            raise ValueError(f"channels: a reduction needs an even number of channels, got {c_out}")
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=affine, track_running_stats=track)

    def layer(self) -> ops.ReLUConvBNLayer:
        return ops.ReLUConvBNLayer((self.conv_1, self.conv_2), self.bn)

    def forward(self, x: Tensor) -> Tensor:
        return ops.relu_conv_bn(x, *self.layer())


def runs_only(module: nn.Module, *classes: type[nn.Module]) -> bool:
    """True if a call of `module` is a call of the `forward` of one of these classes and nothing else.

    False with hooks, with a forward of a subclass's or the instance's own, and after `module.compile()`.
    """
    hooked = Hooks([module]) or _has_any_global_hook()
    own = "forward" in vars(module) or module._compiled_call_impl is not None
    return type(module).forward in [cls.forward for cls in classes] and not own and not hooked


def preprocess(x: Tensor, modules: Sequence[nn.Module]) -> list[Tensor]:
    """[module(x) for module in modules]; ReLUConvBN and FactorizedReduce share one read of x."""
    shared: list[Any] = [
        m for m in modules if runs_only(m, ReLUConvBN, FactorizedReduce) and not Hooks(m.modules())
    ]
    outputs = dict(zip(shared, ops.relu_conv_bns(x, [m.layer() for m in shared]), strict=True))
    return [outputs[m] if m in outputs else m(x) for m in modules]


@dataclass(frozen=True)
class Primitive:
    """A candidate operation.

    Attributes:
        name: its name in spaces and genotypes.
        make: make(channels, stride, affine, track) -> a module from [N, channels, H, W] to
            [N, channels, H / stride, W / stride]; stride is 1 or 2. `affine` and `track` are those of its
            BatchNorms: trainable gamma and beta, running statistics.
        parameter_free: counted in metrics.jsonl, to see a search collapse.
        batch_norm: supernets of the DARTS family put a BatchNorm behind it; derived networks do not.
        recognise: for `accelerate`: the stride of another project's module that is this primitive, None for
            any other module. Modules of the layers or the class that `make` uses are recognised without it.
    """

    name: str
    make: Callable[[int, int, bool, bool], nn.Module]
    parameter_free: bool = False
    batch_norm: bool = False
    recognise: Callable[[nn.Module], int | None] | None = None


PRIMITIVES: dict[str, Primitive] = {}
"""Registered primitives by name."""


def register_primitive(primitive: Primitive) -> None:
    """Makes `primitive` known to supernets, derived networks and `accelerate`.

    Raises:
        ValueError: if its name is taken or no identifier, or `make` cannot be called.
    """
    name = primitive.name
    if name in PRIMITIVES or not name.isidentifier():
        raise ValueError(f"primitive: expected a new name, an identifier, got {name!r}")
    if not callable(primitive.make):
        raise ValueError(
            f"primitive {name}: expected make(channels, stride, affine, track), got {primitive.make!r}"
        )
    PRIMITIVES[name] = primitive


def make_primitive(name: str, c: int, stride: int, affine: bool = True, track: bool = True) -> nn.Module:
    """The candidate operation `name`, from [N, c, H, W] to [N, c, H / stride, W / stride].

    Raises:
        ValueError: if no primitive is called that.
    """
    if name not in PRIMITIVES:
        raise ValueError(f"primitive: expected one of {', '.join(PRIMITIVES)}, got {name!r}")
    return PRIMITIVES[name].make(c, stride, affine, track)


def class_named(*names: str) -> Callable[[nn.Module], int | None]:
    """Recognises a module without children and parameters by the name of its class."""

    def stride_of(module: nn.Module) -> int | None:
        stride = getattr(module, "stride", 1)
        bare = not list(module.children()) and not list(module.parameters())
        return stride if bare and type(module).__name__ in names and stride in (1, 2) else None

    return stride_of


def _standard_noise(module: nn.Module) -> int | None:
    standard = getattr(module, "mean", 0.0) == 0.0 and getattr(module, "std", 1.0) == 1.0
    return class_named("Noise", "NoiseOp")(module) if standard else None


def _skip(c: int, stride: int, affine: bool, track: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else FactorizedReduce(c, c, affine, track)


def _average_pool(c: int, stride: int, affine: bool, track: bool) -> nn.Module:
    return nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)


for _primitive in (
    Primitive("none", lambda c, s, *_: Zero(s), parameter_free=True, recognise=class_named("Zero")),
    Primitive("noise", lambda c, s, *_: Noise(s), parameter_free=True, recognise=_standard_noise),
    Primitive("skip_connect", _skip, parameter_free=True, recognise=class_named("Identity")),
    Primitive("max_pool_3x3", lambda c, s, *_: nn.MaxPool2d(3, s, 1), parameter_free=True, batch_norm=True),
    Primitive("avg_pool_3x3", _average_pool, parameter_free=True, batch_norm=True),
    Primitive("sep_conv_3x3", lambda c, s, affine, track: SepConv(c, 3, s, affine, track)),
    Primitive("sep_conv_5x5", lambda c, s, affine, track: SepConv(c, 5, s, affine, track)),
    Primitive("dil_conv_3x3", lambda c, s, affine, track: DilConv(c, 3, s, 2, affine, track)),
    Primitive("dil_conv_5x5", lambda c, s, affine, track: DilConv(c, 5, s, 2, affine, track)),
    Primitive("nor_conv_1x1", lambda c, s, affine, track: ReLUConvBN(c, c, 1, s, 0, affine, track)),
    Primitive("nor_conv_3x3", lambda c, s, affine, track: ReLUConvBN(c, c, 3, s, 1, affine, track)),
):
    register_primitive(_primitive)
