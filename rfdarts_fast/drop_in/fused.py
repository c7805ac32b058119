"""Subclasses of foreign classes with a fused `forward`, which `accelerate` turns foreign modules into.

A module keeps its identity, its tensors, its names in `state_dict()` and its class for `isinstance`. Its own
forward goes on to run wherever kernels would compute something else: see `Understood`.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.drop_in.edges import RULES, Call, Edge, Unchanged, outer_hooks
from rfdarts_fast.drop_in.look_ahead import forget_gradients, loss_of_frozen
from rfdarts_fast.ops.reference import channel_shuffle


class Understood:
    """The meaning of a foreign module: the calls that `compute` answers as its own forward would.

    Attributes:
        edges: its mixed ops.
        call: its forward's arguments.
        rule: one of `RULES`.
    """

    def __init__(self, module: nn.Module, edges: Sequence[Edge], call: Call, rule: str = "all") -> None:
        self.edges, self.call, self.rule = [*edges], call, rule
        self._unchanged, self._hooks = Unchanged(module), outer_hooks(module, edges)

    def arguments(self, given: Sequence[Any], named: dict[str, Any]) -> Any:
        """The arguments of `compute`, or None where the module's own forward has to run."""
        taken = self.call.arguments(given, named)
        if taken is None or self._hooks or not self._unchanged:
            return None
        read, others = taken
        return read if self.call.is_neutral(others) and all(isinstance(x, Tensor) for x in read) else None

    def compute(self, *arguments: Tensor) -> Tensor | None:
        """The output; None where the module's own forward has to run."""
        raise NotImplementedError

    def active(self, op_weights: Tensor, channels: int) -> Any:
        """The edges with the operations that these weights [edges, primitives] leave; None if they do not
        fit."""
        shape = len(self.edges), len(self.edges[0].primitives)
        edges = [edge.on(channels) for edge in self.edges]
        if op_weights.shape != shape or None in edges:
            return None
        rule = RULES[self.rule]
        if rule is None:
            return edges
        masks = rule(op_weights.detach()).tolist()
        return [edge and edge.subset(mask) for edge, mask in zip(edges, masks, strict=True)]


class UnderstoodMixedOp(Understood):
    """forward(x, weights)."""

    def compute(self, x: Tensor, op_weights: Tensor) -> Tensor | None:  # type: ignore[override]
        edges = self.active(op_weights[None], x.shape[1])
        if edges is None:
            return None
        y = ops.mixed_cell(edges, [x], op_weights[None])[0]
        [edge] = edges
        return y if edge.shuffle or edge.K == 1 else channel_shuffle(y, edge.channels // edge.K)

    def __str__(self) -> str:
        return str(self.edges[0])


class UnderstoodCell(Understood):
    """forward(s0, s1, weights), with PC-DARTS's edge weights in one more argument; or forward(x, weights).

    Attributes:
        front: the modules that s0 and s1 go through; none for a cell of one input.
        channels: of its states; None if those of its input.
        nodes: how many nodes it has, `outputs` of which, counted from the last, are concatenated.
        edge_weights: name of the argument with PC-DARTS's edge weights, or None.
    """

    def __init__(
        self,
        module: nn.Module,
        edges: Sequence[Edge],
        call: Call,
        rule: str,
        front: Sequence[nn.Module],
        channels: int | None,
        nodes: int,
        outputs: int,
        edge_weights: str | None,
    ) -> None:
        super().__init__(module, edges, call, rule)
        self.front, self.channels = front, channels
        self.nodes, self.outputs, self.edge_weights = nodes, outputs, edge_weights

    def arguments(self, given: Sequence[Any], named: dict[str, Any]) -> Any:
        taken = self.call.arguments(given, named)
        if taken is None:
            return None
        read, others = taken
        weights = others.get(self.edge_weights)
        if not isinstance(weights, Tensor) or weights.shape != (len(self.edges),):
            return super().arguments(given, named)
        fitting = super().arguments(read, {name: x for name, x in others.items() if x is not weights})
        return fitting and [*fitting, weights]

    def compute(self, *arguments: Tensor) -> Tensor | None:
        count = len(self.front) or 1
        inputs, (op_weights, *edge_weights) = [*arguments[:count]], arguments[count:]
        edges = self.active(op_weights, self.channels or inputs[0].shape[1])
        if edges is None:
            return None
        if self.front:
            inputs = [module(x) for module, x in zip(self.front, inputs, strict=True)]
        if self.nodes == self.outputs > 1:
            return ops.concat_cell(edges, inputs, op_weights, *edge_weights)
        states = ops.mixed_cell(edges, inputs, op_weights, *edge_weights)[-self.outputs :]
        return states[0] if self.outputs == 1 else torch.cat(states, dim=1)

    def __str__(self) -> str:
        return f"cell of {len(self.edges)} mixed ops"


class UnderstoodFront(Understood):
    """ReLU, convolution, BatchNorm in front of a cell: forward(x)."""

    def __init__(self, module: nn.Module, layer: ops.ReLUConvBNLayer) -> None:
        super().__init__(module, [], Call(module, 1))
        self.layer = layer

    def compute(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return ops.relu_conv_bn(x, *self.layer)

    def __str__(self) -> str:
        return "preprocessing"


class Fused:
    """A mixin. A fused class has no name to import: pickles name mixin and foreign class."""

    rfdarts: Understood

    def __reduce__(self) -> Any:
        mixin, foreign = type(self).__bases__
        return _restore, (mixin, foreign), self.__dict__.copy()


class FusedModule(Fused):
    """A module that is computed by what was understood of it."""

    def forward(self, *given: Any, **named: Any) -> Any:
        arguments = self.rfdarts.arguments(given, named)
        output = None if arguments is None else self.rfdarts.compute(*arguments)
        return super().forward(*given, **named) if output is None else output  # type: ignore[misc]


class FusedNetwork(Fused):
    """A supernet with frozen parameters that the published second-order Architect works on."""

    def _loss(self, *given: Any, **named: Any) -> Any:
        return loss_of_frozen(super()._loss(*given, **named))  # type: ignore[misc]

    def new(self) -> Any:
        """A copy: the published Architect overwrites the weights, whatever they are."""
        return forget_gradients(copy.deepcopy(self))


@functools.cache
def _fused_class(mixin: Any, foreign: Any) -> Any:
    return type(f"Fused{foreign.__name__}", (mixin, foreign), {"__module__": foreign.__module__})


def fuse(module: nn.Module, understood: Understood) -> None:
    """Gives `module` the `forward` of what was understood of it, in place."""
    foreign: Any = type(module)
    module.__class__ = _fused_class(FusedModule, foreign)
    vars(module)["rfdarts"] = understood


def fuse_network(model: nn.Module) -> None:
    """Lets the published Architect work on `model`, if it has the methods that are called there."""
    if all(callable(getattr(model, name, None)) for name in ("_loss", "new")):
        foreign: Any = type(model)
        model.__class__ = _fused_class(FusedNetwork, foreign)


def _restore(mixin: Any, foreign: Any) -> Any:
    cls = _fused_class(mixin, foreign)
    return cls.__new__(cls)
