"""The mixed op in plain PyTorch: the truth that every kernel is checked against, on any device and dtype.

A mixed op is a softmax-weighted sum of its candidate operations (DARTS, arXiv 1806.09055, eq. 2). PC-DARTS
(arXiv 1907.05737, eqs. 1 and 2) sends 1/K of the channels through it, lets the others bypass it, and weighs a
node's incoming edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rfdarts_fast.ops.contract import EdgeModule

MixedOp = Callable[[EdgeModule, Tensor, Tensor], Tensor]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel g * C/groups + c of x [N, C, H, W] becomes channel c * groups + g."""
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def relu_conv_bn(x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(relu(x))); FactorizedReduce has two convolutions, the second one pixel further on.

    x [N, C, H, W] -> [N, C', H', W']. Raises ValueError where two convolutions meet an odd height or width.
    """
    if len(convs) == 2 and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(
            f"image size: a reduction needs an even height and width, got {x.shape[2]}x{x.shape[3]}"
        )
    x = F.relu(x)
    if len(convs) == 1:
        return norm(convs[0](x))
    return norm(torch.cat([convs[0](x), convs[1](x[:, :, 1:, 1:])], dim=1))


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, relu: bool) -> Tensor:
    """norm(x), with `relu` its ReLU, [N, C, H, W]."""
    y = norm(x)
    return F.relu(y) if relu else y


def mixed_op(edge: EdgeModule, x: Tensor, op_weights: Tensor) -> Tensor:
    """One edge: x [N, C, H, W], op_weights [primitives] -> [N, C, H / stride, W / stride]."""
    mixed = x[:, : edge.channels // edge.K]
    total = None
    for name, op, weight in zip(edge.primitives, edge._ops, op_weights, strict=True):
        # `none` adds nothing, and its weight gets a zero gradient either way
        if name == "none":
            continue
        term = weight * op(mixed)
        total = term if total is None else total + term
    if total is None:
        total = torch.zeros_like(mixed[:, :, :: edge.stride, :: edge.stride])
    if edge.K == 1:
        return total
    bypass = x[:, edge.channels // edge.K :]
    if edge.stride == 2:
        bypass = F.max_pool2d(bypass, 2, 2)
    return channel_shuffle(torch.cat([total, bypass], dim=1), edge.K)


def mixed_cell(
    edges: Sequence[EdgeModule],
    inputs: Sequence[Tensor],
    op_weights: Tensor,
    edge_weights: Tensor | None = None,
    mixed_op: MixedOp = mixed_op,
) -> list[Tensor]:
    """All nodes of a cell, each the sum of its edges from the inputs and every earlier node.

    Arguments as of `ops.mixed_cell`: op_weights [edges, primitives], edge_weights [edges].
    """
    states = list(inputs)
    start = 0
    while start < len(edges):
        total = None
        entering = zip(edges[start : start + len(states)], states, strict=True)
        for e, (edge, x) in enumerate(entering, start):
            term = mixed_op(edge, x, op_weights[e])
            if edge_weights is not None:
                term = edge_weights[e] * term
            total = term if total is None else total + term
        start += len(states)
        assert total is not None
        states.append(total)
    return states[len(inputs) :]
