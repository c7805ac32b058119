"""The mixed op, computed by one engine per device. Nothing else in the package computes one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rfdarts_fast.ops import reference
from rfdarts_fast.ops.reference import Edge

__all__ = ["Edge", "mixed_cell"]


def mixed_cell(
    edges: Sequence[Edge], inputs: Sequence[Tensor], weights: Tensor, edge_weights: Tensor | None = None
) -> list[Tensor]:
    """All nodes of a cell: node i sums the mixed ops of inputs 0 .. i + len(inputs) - 1, a node's state being
    the input of every later node.

    Args:
        edges: the mixed ops, ordered by node, then by input. One node with one input is a single mixed op.
        inputs: the states that enter the cell, [N, C, H, W] each.
        weights: softmax weights [edges, primitives]; gradients flow to them.
        edge_weights: PC-DARTS's edge weights [edges], or None for 1.

    Returns:
        The states of all nodes, [N, C, H', W'] each, with H' = H / 2 in a reduction cell.
    """
    return reference.mixed_cell(edges, inputs, weights, edge_weights)
