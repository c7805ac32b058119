"""The mixed op, computed by one engine per device. Nothing else in the package computes one."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor, nn

from rfdarts_fast.ops import reference, triton
from rfdarts_fast.ops.compiled import cpu, cuda, conv_bn
from rfdarts_fast.ops.backend import Backend, BackendError, Memory, backend_name, fall_back, use_backend
from rfdarts_fast.ops.reference import Edge, Layer

__all__ = [
    "Backend",
    "BackendError",
    "Edge",
    "Layer",
    "Memory",
    "concatenated_cell",
    "mixed_cell",
    "relu_conv_bn",
    "relu_conv_bns",
    "use_backend",
]


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
    states, memory = _under_autocast(inputs)
    engine = _engine(edges, states)
    if engine is not None:
        return engine.mixed_cell(edges, states, weights, edge_weights, memory=memory)
    return reference.mixed_cell(edges, inputs, weights, edge_weights)


def concatenated_cell(
    edges: Sequence[Edge], inputs: Sequence[Tensor], weights: Tensor, edge_weights: Tensor | None = None
) -> Tensor:
    """The nodes of `mixed_cell` concatenated, [N, nodes * C, H', W'], for less than what torch.cat costs."""
    states, memory = _under_autocast(inputs)
    engine = _engine(edges, states)
    if engine is not None:
        return engine.mixed_cell(edges, states, weights, edge_weights, memory=memory, concatenate=True)[0]
    return torch.cat(reference.mixed_cell(edges, inputs, weights, edge_weights), dim=1)


def relu_conv_bn(x: Tensor, convs: Sequence[nn.Conv2d], norm: nn.BatchNorm2d) -> Tensor:
    """ReLU, convolution, BatchNorm: a cell's preprocessing; with two convolutions a FactorizedReduce.

    See `reference.relu_conv_bn`. Frozen 1x1 convolutions are fused where an engine can.
    """
    return relu_conv_bns(x, [(tuple(convs), norm)])[0]


def relu_conv_bns(x: Tensor, layers: Sequence[Layer]) -> list[Tensor]:
    """`relu_conv_bn` for every pair of convolutions and BatchNorm in `layers`; what one engine can compute
    together reads x once, forward and backward."""
    [x], _ = _under_autocast([x])
    outs: dict[int, Tensor] = {}
    groups: dict[tuple, list[int]] = {}
    engine = cuda if x.device.type == "cuda" else cpu
    fused = backend_name() not in ("reference", "triton")
    for i, layer in enumerate(layers):
        if fused and engine.why_not_conv(x, *layer) is None:
            groups.setdefault(conv_bn.kind(layer), []).append(i)
        else:
            outs[i] = reference.relu_conv_bn(x, *layer)
    for group in groups.values():
        found = engine.relu_conv_bns(x, [layers[i] for i in group], memory=use_backend.memory)
        outs.update(zip(group, found, strict=True))
    return [outs[i] for i in range(len(layers))]


def _under_autocast(inputs: Sequence[Tensor]) -> tuple[Sequence[Tensor], Memory]:
    """On the CPU, autocast to bfloat16 means states in float32 and branch outputs kept in bfloat16."""
    memory = use_backend.memory
    on_cpu = inputs[0].device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not on_cpu or backend_name() in ("reference", "triton"):
        return inputs, memory
    half = torch.bfloat16, torch.float16
    states = [x.float() if x.dtype in half else x for x in inputs]
    return states, "bfloat16" if memory == "fast" else memory


def _engine(edges: Sequence[Edge], inputs: Sequence[Tensor]) -> ModuleType | None:
    """The engine that takes the cell, or None; says why there is none, or raises if it was named."""
    name = backend_name()
    # on the meta device only shapes matter
    if name == "reference" or inputs[0].device.type == "meta":
        return None
    on_gpu = inputs[0].device.type == "cuda"
    engines = {"native": [cuda if on_gpu else cpu], "triton": [triton]}
    engines["auto"] = [cuda, triton] if on_gpu else [cpu]
    reasons = []
    for engine in engines[name]:
        reason = engine.why_not(edges, inputs)
        if reason is None:
            return engine
        if reason not in reasons:
            reasons.append(reason)
    fall_back("; ".join(reasons), expected=_trains_convolutions(edges))
    return None


def _trains_convolutions(edges: Sequence[Edge]) -> bool:
    """Whether the method is one that the engines are not made for (darts, pc-darts)."""
    return any(
        conv.weight.requires_grad
        for edge in edges
        for conv in edge._ops.modules()
        if isinstance(conv, nn.Conv2d)
    )
