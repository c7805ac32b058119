"""The mixed op, computed by one engine per device. Nothing else in the package computes one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from rfdarts_fast.ops import cuda, native, reference
from rfdarts_fast.ops.backend import Backend, BackendError, Memory, fall_back, use_backend
from rfdarts_fast.ops.reference import Edge

__all__ = ["Backend", "BackendError", "Edge", "Memory", "mixed_cell", "use_backend"]


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

    Raises:
        BackendError: if the backend that `use_backend` names cannot run.
    """
    # on the meta device only shapes matter
    if use_backend.name != "reference" and inputs[0].device.type != "meta":
        engine = cuda if inputs[0].device.type == "cuda" else native
        reason = engine.why_not(edges, inputs)
        if reason is None:
            return engine.mixed_cell(edges, inputs, weights, edge_weights, memory=use_backend.memory)
        fall_back(reason, expected=_trains_convolutions(edges))
    return reference.mixed_cell(edges, inputs, weights, edge_weights)


def _trains_convolutions(edges: Sequence[Edge]) -> bool:
    """Whether the method is one that the engines are not made for (darts, pc-darts)."""
    return any(
        conv.weight.requires_grad
        for edge in edges
        for conv in edge._ops.modules()
        if isinstance(conv, nn.Conv2d)
    )
