"""The primitive that a module of another project is, by what the registry of primitives says of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.utils import _pair

from rfdarts_fast.nn.primitives import PRIMITIVES, FactorizedReduce, Primitive, ReLUConvBN

# what primitives are built of; any other module, a subclass included, may compute something else
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


@dataclass(frozen=True)
class Recognised:
    """A primitive: its name, its stride and the channels it works on, None where it works on any number."""

    name: str
    stride: int
    width: int | None


class Unrecognised(Exception):
    """A module cannot be replaced; the message says why."""


def recognise(op: nn.Module) -> Recognised:
    """The primitive that `op` is.

    Raises:
        Unrecognised: if it is none, with a description of it.
    """
    for primitive in PRIMITIVES.values():
        stride = primitive.recognise(op) if primitive.recognise else None
        if stride is not None:
            return Recognised(primitive.name, stride, None)
    structures = _structures(_width(op), tuple(PRIMITIVES.values()))
    if _fingerprint(op) not in structures:
        raise Unrecognised(f"{_describe(op)} is none of the registered primitives")
    return structures[_fingerprint(op)]


def preprocessing(module: nn.Module) -> type[ReLUConvBN] | type[FactorizedReduce] | None:
    """The class of ours that `module`, in front of a cell, is built like, or None."""
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


def _width(op: nn.Module) -> int | None:
    """Output channels by the last layer that tells them, None if none does."""
    told = [m.num_features for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    told = told or [m.out_channels for m in op.modules() if isinstance(m, nn.Conv2d)]
    return told[-1] if told else None


def _fingerprint(op: nn.Module) -> tuple[Any, ...]:
    parts: list[Any] = []
    for name, module in op.named_modules():
        if next(module.children(), None) is not None:
            continue
        geometry = _GEOMETRY.get(type(module))
        values = settings(module) if geometry is None else [getattr(module, name) for name in geometry]
        parts.append((name, type(module), *(_pair(v) if type(v) is int else v for v in values)))
    return tuple(parts)


def settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Plain attributes: two modules of one class that differ in one may compute different things."""
    plain = (int, float, bool, str, type(None))
    return tuple(
        sorted((k, repr(v)) for k, v in vars(module).items() if isinstance(v, plain) and k != "training")
    )


@functools.cache
def _structures(width: int | None, primitives: tuple[Primitive, ...]) -> dict[tuple[Any, ...], Recognised]:
    """Fingerprint -> primitive, for all that work on `width` channels, or on any number if that is None."""
    known: dict[tuple[Any, ...], Recognised] = {}
    for stride in (1, 2):
        for primitive in primitives:
            try:
                with torch.device("meta"):
                    module = primitive.make(2 if width is None else width, stride, True, True)
            except ValueError:
                # a FactorizedReduce needs an even width
                continue
            if width is None and _width(module) is not None:
                continue
            forms = [module]
            if primitive.batch_norm and width is not None:
                forms.append(nn.Sequential(module, nn.BatchNorm2d(width)))
            for form in forms:
                known.setdefault(_fingerprint(form), Recognised(primitive.name, stride, width))
    return known


def _describe(op: nn.Module) -> str:
    text = " ".join(repr(op).split())
    return text if len(text) <= 160 else text[:157] + "..."
