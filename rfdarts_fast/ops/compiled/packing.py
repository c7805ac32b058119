"""Frozen convolutions in the order in which compiled kernels read them: one vector for a cell or a layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.contract import Branch, CellPlan, FrozenConvs, Op, ReLUConvBNLayer


def cell_weights(plan: CellPlan, dtype: torch.dtype, bfloat16_products: bool = False) -> Tensor:
    """All convolutions of a cell, branch after branch, for C mixed channels. A depthwise and a 1x1 one are
    [k * k, C], then [C, C] from input to output, then its transpose, and FactorizedReduce these two alone;
    NOR_CONV is what `nor_conv` makes. For products of bfloat16 each matrix [C, C] is what `pairs` makes."""

    def pack() -> Tensor:
        form = pairs if bfloat16_products else _as_it_is
        parts = [part.reshape(-1) for branch in plan.branches() for part in _branch(branch, form)]
        # without convolutions there is no dtype to keep
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    key = "compiled", None if plan.frozen.convs else dtype, bfloat16_products
    return plan.frozen.packed(key, pack)


_layers: weakref.WeakKeyDictionary[nn.Module, FrozenConvs] = weakref.WeakKeyDictionary()


def layer_weights(layer: ReLUConvBNLayer, bfloat16_products: bool = False) -> Tensor:
    """The matrix [C, C'] and its transpose, for products of bfloat16 as `pairs` makes them."""
    frozen = _layers.get(layer.convs[0])
    if frozen is None or frozen.convs != layer.convs:
        frozen = _layers[layer.convs[0]] = FrozenConvs(layer.convs)

    def pack() -> Tensor:
        form = pairs if bfloat16_products else _as_it_is
        matrix = _matrix(*layer.convs)
        return torch.cat([form(matrix).reshape(-1), form(matrix.t()).reshape(-1)])

    return frozen.packed(("compiled", bfloat16_products), pack)


def _matrix(*convs: nn.Conv2d) -> Tensor:
    """Convolutions as one matrix from input to output, the outputs of one beside those of the next."""
    return torch.cat([conv.weight.flatten(1) for conv in convs]).t()


def _as_it_is(matrices: Tensor) -> Tensor:
    return matrices


def pairs(matrices: Tensor) -> Tensor:
    """Matrices [..., C, C'] of float32 for products of bfloat16, C even: the first half of the rows of each
    becomes [C / 2, C'] pairs of bfloat16 of two consecutive inputs, in the place of a float; the rest 0."""
    two = matrices.bfloat16().unflatten(-2, (-1, 2)).mT.contiguous().view(torch.float32).squeeze(-1)
    return torch.cat([two, torch.zeros_like(two)], -2)


# Lavin and Gray, arXiv 1509.09308, section 4.1: what 3x3 weights are multiplied with from both sides
_WINOGRAD = [1.0, 0.0, 0.0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0.0, 0.0, 1.0]


def winograd(taps: Tensor) -> Tensor:
    """Weights [9, C in, C out] as F(2x2, 3x3) multiplies them, [16, C in, C out]."""
    one = torch.tensor(_WINOGRAD, dtype=torch.float64, device=taps.device)
    return torch.einsum("pt,tio->pio", torch.kron(one, one), taps.double()).to(taps.dtype)


def nor_conv(conv: nn.Conv2d) -> list[Tensor]:
    """A convolution [k * k, C in, C out] and its transpose [k * k, C out, C in]; of a 3x3 one both again as
    `winograd` makes them."""
    taps = conv.weight.flatten(2).permute(2, 1, 0)
    both = [taps, taps.flip(0).mT]
    return both if len(taps) == 1 else [*both, *map(winograd, both)]


def _branch(branch: Branch, form: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """form: of matrices that are multiplied with."""
    convs = branch.convs
    if branch.op is Op.REDUCE:
        return [form(_matrix(*convs)), form(_matrix(*convs).t())]
    if branch.op is Op.NOR_CONV:
        return [*map(form, nor_conv(convs[0]))]
    parts = []
    for depthwise, pointwise in zip(convs[::2], convs[1::2], strict=True):
        parts += [_matrix(depthwise), form(_matrix(pointwise)), form(_matrix(pointwise).t())]
    return parts
