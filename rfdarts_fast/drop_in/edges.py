"""Foreign mixed ops as kernels see them, and foreign calls as kernels take them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from rfdarts_fast.drop_in.recognise import Unrecognised, recognise, settings
from rfdarts_fast.ops.hooks import Hooks
from rfdarts_fast.ops.plan import Modules

# operation weights -> which operations run; a fork's `if w != 0`, or `if w > 0`, skips the others
RULES: dict[str, Callable[[Tensor], Tensor] | None] = {
    "all": None,
    "nonzero": lambda op_weights: op_weights != 0,
    "positive": lambda op_weights: op_weights > 0,
}
# subsets of an edge's operations for which its plan and packed weights are kept
_MAX_SUBSETS = 32


class Edge:
    """A list of candidate operations; follows `rfdarts_fast.ops.EdgeModule`.

    Attributes:
        primitives, _ops, channels, stride, K: as of `EdgeModule`; `_ops` holds the foreign layers.
        width: the channels that its operations work on; None for any number.
        shuffle: with K > 1, the channels that come out are shuffled.
    """

    channels: int

    def __init__(self, candidates: nn.ModuleList) -> None:
        recognised = []
        for i, op in enumerate(candidates):
            try:
                recognised.append(recognise(op))
            except Unrecognised as error:
                raise Unrecognised(f"operation {i}: {error}") from None
        strides = {each.stride for each in recognised}
        widths = {each.width for each in recognised if each.width is not None}
        if len(strides) != 1 or len(widths) > 1:
            raise Unrecognised(
                f"expected operations of one stride and width, got {sorted(strides)}, {sorted(widths)}"
            )
        self.primitives = tuple(each.name for each in recognised)
        self._ops = nn.ModuleList(each.module for each in recognised if each.module is not None)
        self.stride = strides.pop()
        self.width = widths.pop() if widths else None
        self.channels, self.K, self.shuffle = self.width or 0, 1, True
        self._subsets: dict[tuple[bool, ...], Edge] = {}

    def on(self, channels: int) -> Edge | None:
        """The edge for states of so many channels; None if its operations have others."""
        if self.channels != channels and self.width is None:
            self.channels, self._subsets = channels, {}
        return self if self.channels == channels else None

    def subset(self, active: Sequence[bool]) -> Edge:
        """The edge without the operations that are not active."""
        if all(active):
            return self
        key = tuple(active)
        if key not in self._subsets:
            if len(self._subsets) >= _MAX_SUBSETS:
                self._subsets.clear()
            part = self._subsets[key] = copy.copy(self)
            # of `none` nothing is computed, and its weight's gradient is 0
            part.primitives = tuple(
                name if on else "none" for name, on in zip(self.primitives, key, strict=True)
            )
        return self._subsets[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_subsets": {}}

    def __str__(self) -> str:
        partial = f", K={self.K}" if self.K > 1 else ""
        return f"mixed op of {len(self.primitives)}, {self.channels} channels, stride {self.stride}{partial}"


class Call:
    """The arguments of a foreign forward: those that kernels read, and others at which they compute the same.

    Args:
        module: the foreign module.
        read: how many of its first arguments kernels read.
        neutral: values of other required arguments, by name; those with a default have that.
    """

    def __init__(self, module: nn.Module, read: int, neutral: dict[str, Any] | None = None) -> None:
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = [
            p for p in inspect.signature(module.forward).parameters.values() if p.kind not in variable
        ]
        self.names = [p.name for p in parameters]
        self.read = read
        self.optional = self.names[read:]
        self.neutral = {p.name: p.default for p in parameters[read:]} | (neutral or {})
        self.missing = [name for name, value in self.neutral.items() if value is inspect.Parameter.empty]

    def arguments(self, given: Sequence[Any], named: dict[str, Any]) -> tuple[Sequence[Any], dict] | None:
        """The arguments that kernels read, and the others by name; None for a call that no forward takes."""
        if len(given) == self.read and not named:
            return given, {}
        values = dict(zip(self.names, given, strict=False))
        if len(given) > len(self.names) or values.keys() & named.keys():
            return None
        values |= named
        if not {*self.names[: self.read]} <= values.keys() <= {*self.names}:
            return None
        return [values.pop(name) for name in self.names[: self.read]], values

    def is_neutral(self, others: dict[str, Any]) -> bool:
        """True if the other arguments have the values at which kernels compute the same."""
        return all(_same(value, self.neutral[name]) for name, value in others.items())


def _same(value: Any, neutral: Any) -> bool:
    number = (int, float, bool, str)
    return value is neutral or (
        isinstance(value, number) and isinstance(neutral, number) and value == neutral
    )


class Unchanged:
    """The parts and the plain attributes of a module, to see whether one is another now."""

    def __init__(self, module: nn.Module) -> None:
        self._parts = Modules()
        self._settings = []
        for inner in module.modules():
            self._parts.add(inner, *inner._modules)
            values = settings(inner)
            # a layer's sizes say nothing that its tensors do not
            switch = any(type(value) in (float, bool) for value in values.values())
            lists = any(isinstance(child, nn.ModuleList) for child in inner.children())
            if not type(inner).__module__.startswith("torch.") and values and (switch or lists):
                self._settings.append((inner, values))

    def __bool__(self) -> bool:
        return self._parts.unchanged() and all(
            vars(inner).get(name, self) == value
            for inner, values in self._settings
            for name, value in values.items()
        )


def outer_hooks(module: nn.Module, edges: Sequence[Edge]) -> Hooks:
    """Hooks on modules inside `module` that its edges do not have."""
    inside = {module, *(m for edge in edges for m in edge._ops.modules())}
    return Hooks(m for m in module.modules() if m not in inside)
