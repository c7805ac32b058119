"""Which primitive a module of another project is, told by its structure rather than by its class's home."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN, make_primitive

# what our primitives are built of; anything else, a subclass included, may compute something else
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_GEOMETRY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: (*_CONVOLUTION, "padding_mode"),
    nn.BatchNorm2d: ("num_features",),
    nn.ReLU: ("inplace",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: (
        "kernel_size",
        "stride",
        "padding",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
    ),
}
_WITH_CHANNELS = (
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
    "nor_conv_1x1",
    "nor_conv_3x3",
)
_POOLS = ("max_pool_3x3", "avg_pool_3x3")


@dataclass(frozen=True)
class Found:
    """A primitive: its name, its stride and the channels it works on, None where it works on any number."""

    name: str
    stride: int
    width: int | None


class Unrecognised(Exception):
    """Why a module is not what we can replace."""


def recognise(op: nn.Module) -> Found:
    """The primitive that `op` is.

    Raises:
        Unrecognised: if it is none, with a description of it.
    """
    kind = type(op).__name__
    if not list(op.children()) and not list(op.parameters()):
        stride = int(getattr(op, "stride", 1)) if isinstance(getattr(op, "stride", 1), int) else 0
        if kind == "Zero" and stride in (1, 2):
            return Found("none", stride, None)
        if kind == "Identity":
            return Found("skip_connect", 1, None)
        standard = getattr(op, "mean", 0.0) == 0.0 and getattr(op, "std", 1.0) == 1.0
        if kind in ("Noise", "NoiseOp") and stride in (1, 2) and standard:
            return Found("noise", stride, None)
    norms = [m.num_features for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    found = _known(norms[-1] if norms else None).get(_fingerprint(op))
    if found is None:
        raise Unrecognised(f"{_describe(op)} is none of the published operations")
    return found


def preprocessing(module: nn.Module) -> type[ReLUConvBN] | type[FactorizedReduce] | None:
    """Which of the two modules in front of a cell this is, if one."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(convs) not in (1, 2):
        return None
    c_in, c_out = convs[0].in_channels, sum(conv.out_channels for conv in convs)
    with torch.device("meta"):
        ours = ReLUConvBN(c_in, c_out, 1) if len(convs) == 1 else FactorizedReduce(c_in, c_out + c_out % 2)
    return type(ours) if _fingerprint(module) == _fingerprint(ours) else None


def plain(op: nn.Module) -> nn.Module:
    """PyTorch's own module where a fork has a parameter-free one that does the same, else `op` itself.

    Every fork has an Identity of its own; AutoDL-Projects wraps a pool as `.op` beside a `.preprocess` that
    is None in search cells.
    """
    if type(op).__name__ == "Identity" and not list(op.children()):
        return nn.Identity()
    wrapped = getattr(op, "op", None)
    if isinstance(wrapped, (nn.MaxPool2d, nn.AvgPool2d)) and getattr(op, "preprocess", 0) is None:
        return wrapped
    return op


def _fingerprint(op: nn.Module) -> tuple[Any, ...]:
    parts: list[Any] = []
    for name, module in op.named_modules():
        if next(module.children(), None) is not None:
            continue
        geometry = _GEOMETRY.get(type(module), ())
        values = (getattr(module, attribute) for attribute in geometry)
        parts.append((name, type(module), *(_pair(v) if type(v) is int else v for v in values)))
    return tuple(parts)


@functools.cache
def _known(width: int | None) -> dict[tuple[Any, ...], Found]:
    known = {}
    with torch.device("meta"):
        for stride in (1, 2):
            for name in _POOLS:
                pool = make_primitive(name, 0, stride)
                if width is None:
                    known[_fingerprint(pool)] = Found(name, stride, None)
                else:
                    with_norm = nn.Sequential(pool, nn.BatchNorm2d(width))
                    known[_fingerprint(with_norm)] = Found(name, stride, width)
            for name in _WITH_CHANNELS if width is not None else ():
                assert width is not None
                # an Identity has no structure to know it by; a FactorizedReduce needs an even width
                if name == "skip_connect" and (stride == 1 or width % 2):
                    continue
                known[_fingerprint(make_primitive(name, width, stride))] = Found(name, stride, width)
    return known


def _describe(op: nn.Module) -> str:
    text = " ".join(repr(op).split())
    return text if len(text) <= 160 else text[:157] + "..."
