"""Frozen convolutions in the order in which compiled kernels read them: one vector for a cell or a layer."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.contract import Branch, CellPlan, FrozenConvs, Op, ReLUConvBNLayer


def cell_weights(plan: CellPlan, dtype: torch.dtype) -> Tensor:
    """All convolutions of a cell, branch after branch, for C mixed channels. A pair is [k * k, C], then
    [C, C] from input to output, then its transpose, and FactorizedReduce these two alone. NOR_CONV: [k * k, C, C]
    from input to output, then of the transposed convolution; of 3x3 ones both again as `winograd` makes them."""

    def pack() -> Tensor:
        parts = [part.reshape(-1) for branch in plan.branches() for part in _branch(branch)]
        # without convolutions there is no dtype to keep
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    return plan.frozen.packed(("compiled", None if plan.frozen.convs else dtype), pack)


_layers: weakref.WeakKeyDictionary[nn.Module, FrozenConvs] = weakref.WeakKeyDictionary()


def layer_weights(layer: ReLUConvBNLayer) -> Tensor:
    """The matrix [C, C'] and its transpose."""
    frozen = _layers.get(layer.convs[0])
    if frozen is None or frozen.convs != layer.convs:
        frozen = _layers[layer.convs[0]] = FrozenConvs(layer.convs)

    def pack() -> Tensor:
        matrix = _matrix(*layer.convs)
        return torch.cat([matrix.reshape(-1), matrix.t().reshape(-1)])

    return frozen.packed("compiled", pack)


def _matrix(*convs: nn.Conv2d) -> Tensor:
    """Convolutions as one matrix from input to output, the outputs of one beside those of the next."""
    return torch.cat([conv.weight.flatten(1) for conv in convs]).t()


# Lavin and Gray, arXiv 1509.09308, section 4.1: what 3x3 weights are multiplied with from both sides
_WINOGRAD = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)


def winograd(taps: Tensor) -> Tensor:
    """Weights [9, C in, C out] as F(2x2, 3x3) multiplies them, [16, C in, C out]."""
    both = torch.kron(_WINOGRAD, _WINOGRAD).to(taps.device)
    return torch.einsum("pt,tio->pio", both, taps.double()).to(taps.dtype)


def nor_conv(conv: nn.Conv2d) -> list[Tensor]:
    """An ordinary convolution and its transpose, tap by tap, and 3x3 ones for `winograd` too."""
    taps = conv.weight.flatten(2).permute(2, 1, 0)
    both = [taps, taps.flip(0).mT]
    return both if len(taps) == 1 else [*both, *map(winograd, both)]


def _branch(branch: Branch) -> list[Tensor]:
    convs = branch.convs
    if branch.op is Op.REDUCE:
        return [_matrix(*convs), _matrix(*convs).t()]
    if branch.op is Op.NOR_CONV:
        return nor_conv(convs[0])
    parts = []
    for depthwise, pointwise in zip(convs[::2], convs[1::2], strict=True):
        parts += [_matrix(depthwise), _matrix(pointwise), _matrix(pointwise).t()]
    return parts
