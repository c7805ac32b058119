"""The primitive that a module of another project is: by its layers, or by what it does without any.

Names and wrappers do not matter. What is recognised here is a guess, which `probe` proves.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from rfdarts_fast.nn.primitives import PRIMITIVES, FactorizedReduce, Primitive, ReLUConvBN
from rfdarts_fast.ops import ReLUConvBNLayer

# layers that primitives are built of; any other module, a subclass included, may compute something else
_CONVOLUTION = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
_GEOMETRY: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: (*_CONVOLUTION, "padding_mode"),
    nn.BatchNorm2d: ("num_features",),
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
_OF_EVERY_MODULE = {*vars(nn.Module())}
_PLAIN = (int, float, bool, str, type(None))


@dataclass(frozen=True)
class Recognised:
    """A primitive.

    Attributes:
        name: of the primitive.
        stride: 1 or 2.
        width: the channels it works on, None where it works on any number.
        module: the same layers, laid out as the primitive's own module has them.
    """

    name: str
    stride: int
    width: int | None
    module: nn.Module | None = field(default=None, compare=False)


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
            return Recognised(primitive.name, stride, None, _bare(primitive.name, op))
    behaviour = _behaviour(op)
    if behaviour is not None:
        name, stride = behaviour
        return Recognised(name, stride, None, _bare(name, op))
    structures = _structures(_width(op), tuple(PRIMITIVES.values()))
    structure = structures.get(_fingerprint(op))
    if structure is None:
        raise Unrecognised(f"{' '.join(repr(op).split())} is none of the registered primitives")
    assert structure.module is not None
    module = _with_layers(structure.module, op)
    return Recognised(structure.name, structure.stride, structure.width, module)


def preprocessing(module: nn.Module) -> ReLUConvBNLayer | None:
    """The ReLU, convolution, BatchNorm that `module`, in front of a cell, looks like, or None."""
    convs = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    if len(convs) not in (1, 2):
        return None
    c_in, c_out = convs[0].in_channels, sum(conv.out_channels for conv in convs)
    with torch.device("meta"):
        ours = ReLUConvBN(c_in, c_out, 1) if len(convs) == 1 else FactorizedReduce(c_in, c_out + c_out % 2)
    if _fingerprint(module) != _fingerprint(ours):
        return None
    theirs: Any = _with_layers(ours, module)
    return theirs.layer()


def settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes, and lists of such: when one changes, a forward may compute something else."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE}
    return {name: copy.deepcopy(value) for name, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def _bare(name: str, op: nn.Module) -> nn.Module:
    # every project has an Identity of its own; others are as good as ours
    return nn.Identity() if name == "skip_connect" else op


def _behaviour(op: nn.Module) -> tuple[str, int] | None:
    """`none` or `skip_connect`, and the stride, if a module without layers does what they do.

    A fraction or a switch among its attributes may make it do something else tomorrow.
    """
    switches = [value for value in settings(op).values() if type(value) in (float, bool)]
    if type(op).__module__.startswith("torch.") or any(map(list, (op.children(), op.state_dict(), switches))):
        return None
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.random.fork_rng([]):
        try:
            y = copy.deepcopy(op)(x.clone())
        except Exception:
            return None
    if not isinstance(y, Tensor):
        return None
    if torch.equal(y, x):
        return "skip_connect", 1
    strides = [stride for stride in (1, 2) if y.shape == x[:, :, ::stride, ::stride].shape]
    return ("none", strides[0]) if strides and not y.any() else None


def _width(op: nn.Module) -> int | None:
    """Output channels by the last layer that tells them, None if none does."""
    told = [m.num_features for m in op.modules() if isinstance(m, nn.BatchNorm2d)]
    told = told or [m.out_channels for m in op.modules() if isinstance(m, nn.Conv2d)]
    return told[-1] if told else None


def _layers(op: nn.Module) -> dict[Any, list[tuple[nn.Module, str, nn.Module]]]:
    """Layers by type, in order: the module they are in, their name there, and themselves.

    Identities and ReLUs are left out, as they hold nothing, but for a first ReLU that would change its input.
    """
    layers: dict[Any, list[tuple[nn.Module, str, nn.Module]]] = defaultdict(list)
    wrapped = nn.ModuleList([op])
    for parent in wrapped.modules():
        for name, layer in parent.named_children():
            if next(layer.children(), None) is not None:
                continue
            empty = type(layer) in (nn.Identity, nn.ReLU)
            if not empty or (getattr(layer, "inplace", False) and not layers):
                layers[type(layer)].append((parent, name, layer))
    return layers


def _fingerprint(op: nn.Module) -> tuple[Any, ...]:
    parts: list[Any] = []
    inside = set()
    for layer_type, layers in _layers(op).items():
        for _, _, layer in layers:
            names = _GEOMETRY.get(layer_type)
            values = {n: getattr(layer, n) for n in names} if names else settings(layer)
            parts.append((layer_type.__name__, layer_type, *((n, _geometry(v)) for n, v in values.items())))
            inside |= {*map(id, layer.parameters())}
    # what a module has beside its layers is unknown here
    parts += [("parameter", name) for name, p in op.named_parameters() if id(p) not in inside]
    return tuple(sorted(parts, key=lambda part: part[0]))


def _geometry(value: Any) -> Any:
    return _pair(value) if type(value) is int else repr(value) if type(value) is list else value


def _with_layers(form: nn.Module, op: nn.Module) -> nn.Module:
    """A copy of `form` with the layers of `op` in place of its own; `op` itself where it is a layer."""
    wrapped = nn.ModuleList([_with_own_children(form)])
    theirs = _layers(op)
    for layer_type, places in _layers(wrapped[0]).items():
        for (parent, name, layer), (_, _, their_layer) in zip(places, theirs[layer_type], strict=True):
            if layer is wrapped[0]:
                return their_layer
            setattr(parent, name, their_layer)
    return wrapped[0]


def _with_own_children(form: nn.Module) -> nn.Module:
    """A copy that shares all but its containers."""
    if next(form.children(), None) is None:
        return form
    copied = copy.copy(form)
    vars(copied)["_modules"] = {name: _with_own_children(child) for name, child in form.named_children()}
    return copied


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
                forms.append(nn.Sequential(module, nn.BatchNorm2d(width, device="meta")))
            for form in forms:
                known.setdefault(_fingerprint(form), Recognised(primitive.name, stride, width, form))
    return known
