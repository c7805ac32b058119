"""Subclasses of foreign classes with a fused `forward`, which `accelerate` turns foreign modules into.

A module keeps its identity, its tensors, its names in `state_dict()` and its class for `isinstance`.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import FactorizedReduce, ReLUConvBN
from rfdarts_fast.nn.supernet import cell_output


class Fused:
    """Base of the mixins below. A fused class has no name to import: pickles name mixin and foreign class."""

    def __reduce__(self) -> Any:
        mixin, foreign = type(self).__bases__
        return _restore, (mixin, foreign), self.__dict__.copy()


class FusedMixedOp(Fused):
    """One edge; has the attributes of `rfdarts_fast.ops.EdgeModule`."""

    def forward(self, x: Tensor, op_weights: Tensor) -> Tensor:
        return ops.mixed_cell([self], [x], op_weights[None])[0]  # type: ignore[list-item]


class FusedCell(Fused):
    """A cell of the DARTS family: `forward(s0, s1, weights)`, with PC-DARTS's edge weights as a fourth
    argument. RobustDARTS's drop path, if it is not 0, takes the foreign `forward`, edge by edge."""

    _steps: int
    _multiplier: int
    preprocess0: nn.Module
    preprocess1: nn.Module

    @property
    def nodes(self) -> int:
        return self._steps

    @property
    def multiplier(self) -> int:
        return self._multiplier

    def forward(self, s0: Tensor, s1: Tensor, op_weights: Tensor, *extra: Any, **named: Any) -> Tensor:
        fourth = next(iter((*extra, *named.values())), None)
        edge_weights = fourth if isinstance(fourth, Tensor) and fourth.ndim == 1 else None
        if edge_weights is None and fourth not in (None, 0.0):
            return super().forward(s0, s1, op_weights, *extra, **named)  # type: ignore[misc]
        return cell_output(self, [self.preprocess0(s0), self.preprocess1(s1)], op_weights, edge_weights)


class FusedReLUConvBN(Fused):
    """The 1x1 convolution in front of a cell, computed as this package's own."""

    def forward(self, x: Tensor) -> Tensor:
        return ReLUConvBN.forward(self, x)  # type: ignore[arg-type]


class FusedFactorizedReduce(Fused):
    """The two convolutions in front of a cell behind a reduction cell."""

    def forward(self, x: Tensor) -> Tensor:
        return FactorizedReduce.forward(self, x)  # type: ignore[arg-type]


class EdgeList(nn.ModuleList):
    """The candidates of an edge of NAS-Bench-201, with the attributes of `rfdarts_fast.ops.EdgeModule`."""

    primitives: tuple[str, ...]
    channels: int
    stride: int
    K: int

    @property
    def _ops(self) -> nn.ModuleList:
        return self


class FusedNasBench201Cell(Fused):
    """A search cell of AutoDL-Projects; other forward functions stay as they are."""

    edges: nn.ModuleDict

    def forward(self, inputs: Tensor, weightss: Tensor) -> Tensor:
        edges: Any = list(self.edges.values())
        return ops.mixed_cell(edges, [inputs], weightss)[-1]


class FusedNasBench201JointCell(FusedNasBench201Cell):
    """A search cell whose `forward_joint` computes the same."""

    def forward_joint(self, inputs: Tensor, weightss: Tensor) -> Tensor:
        return self.forward(inputs, weightss)


@functools.cache
def _fused_class(mixin: Any, foreign: Any) -> Any:
    return type(f"Fused{foreign.__name__}", (mixin, foreign), {"__module__": foreign.__module__})


def fuse(module: nn.Module, mixin: Any) -> None:
    """Gives `module` the `forward` of `mixin`, in place."""
    foreign: Any = type(module)
    module.__class__ = _fused_class(mixin, foreign)


def _restore(mixin: Any, foreign: Any) -> Any:
    cls = _fused_class(mixin, foreign)
    return cls.__new__(cls)
