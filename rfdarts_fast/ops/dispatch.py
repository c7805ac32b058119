"""From a call to the backend that computes it: the plan once, then the first backend that takes it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rfdarts_fast.ops import functional, hooks, reference
from rfdarts_fast.ops.backend import backend_name, fall_back, use_backend
from rfdarts_fast.ops.contract import (
    Backend,
    BatchNormBackend,
    CellCall,
    EdgeModule,
    Memory,
    ReLUConvBNLayer,
    backends,
)
from rfdarts_fast.ops.plan import plan_of
from rfdarts_fast.ops.synchronised import synchronised


def mixed_cell(
    edges: Sequence[EdgeModule],
    inputs: Sequence[Tensor],
    op_weights: Tensor,
    edge_weights: Tensor | None = None,
) -> list[Tensor]:
    """All nodes of a cell: node i sums the mixed ops of inputs 0 .. i + len(inputs) - 1, a node's state being
    the input of every later node.

    Args:
        edges: the mixed ops, ordered by node, then by input. One node with one input is a single mixed op.
        inputs: the states that enter the cell, [N, C, H, W] each.
        op_weights: softmax of the alphas [edges, primitives]; gradients flow to them.
        edge_weights: PC-DARTS's edge weights [edges], or None for 1.

    Returns:
        The states of all nodes, [N, C, H', W'] each, with H' = H / 2 in a reduction cell.

    Raises:
        ValueError: if the weights' shapes do not fit the edges.
        BackendError: if the backend that `use_backend` names cannot run.
    """
    return _cell(edges, inputs, op_weights, edge_weights, concat=False)


def concat_cell(
    edges: Sequence[EdgeModule],
    inputs: Sequence[Tensor],
    op_weights: Tensor,
    edge_weights: Tensor | None = None,
) -> Tensor:
    """The nodes of `mixed_cell` concatenated, [N, nodes * C, H', W'], for less than torch.cat costs."""
    return _cell(edges, inputs, op_weights, edge_weights, concat=True)[0]


def relu_conv_bns(x: Tensor, layers: Sequence[ReLUConvBNLayer]) -> list[Tensor]:
    """norm(conv(relu(x))) for each layer; a backend reads x as few times as it can, forward and backward.

    See `reference.relu_conv_bn`. Raises BackendError if the backend that `use_backend` names cannot run.
    """
    outputs: dict[int, Tensor] = {}
    members: dict[str, list[int]] = {}
    candidates = _candidates(x)
    for i, layer in enumerate(layers):
        hooked = hooks.REASON if hooks.Hooks([*layer.convs, layer.norm]) else None
        reasons = (hooked or _unsupported_layer(backend, x, layer) for backend in candidates)
        backend = _choose(candidates, reasons, lambda: True)
        if backend is None:
            outputs[i] = reference.relu_conv_bn(x, *layer)
        else:
            members.setdefault(backend.name, []).append(i)
    for name, indices in members.items():
        chosen = [layers[i] for i in indices]
        memory: Memory = use_backend.memory if _keeps_layers(x, chosen) else "recompute"
        computed = backends()[name].relu_conv_bns(x, chosen, memory)
        outputs.update(zip(indices, computed, strict=True))
    return [outputs[i] for i in range(len(layers))]


def batch_norm(x: Tensor, norm: nn.BatchNorm2d, relu: bool = False) -> Tensor:
    """norm(x), or its ReLU, [N, C, H, W]: in one op where a backend has it, else as PyTorch does it."""
    for backend in () if hooks.Hooks([norm]) else _candidates(x):
        if isinstance(backend, BatchNormBackend) and backend.unsupported_batch_norm(x, norm) is None:
            return backend.batch_norm(x, norm, relu)
    return reference.batch_norm(x, norm, relu)


def cell_call(
    edges: Sequence[EdgeModule],
    inputs: Sequence[Tensor],
    op_weights: Tensor,
    edge_weights: Tensor | None = None,
    memory: Memory = "fast",
    concat: bool = False,
) -> CellCall | str:
    """The call that a backend takes, or the reason why none can. Raises ValueError as `mixed_cell`."""
    _check_weights(edges, op_weights, edge_weights)
    plan = plan_of(edges, len(inputs))
    if isinstance(plan, str):
        return plan
    training = plan.uses_batch_statistics()
    if training is None:
        return "BatchNorms in training and in evaluation mode in one cell"
    shared = synchronised(plan.norms)
    if shared is None:
        return "BatchNorms of one and of several processes in one cell"
    return CellCall(plan, inputs, op_weights, edge_weights, training, memory, concat, synchronised=shared)


def reference_reason(edges: Sequence[EdgeModule], inputs: Sequence[Tensor]) -> str | None:
    """The reason why `mixed_cell` would leave these edges and inputs to the reference, or None."""
    op_weights = inputs[0].new_zeros(len(edges), len(edges[0].primitives))
    call = cell_call(edges, inputs, op_weights)
    return _reasons(inputs[0], lambda backend: _unsupported_cell(backend, call))


def layer_reference_reason(layer: ReLUConvBNLayer, x: Tensor) -> str | None:
    """The reason why `relu_conv_bns` would leave this layer to the reference, or None."""
    return _reasons(x, lambda backend: _unsupported_layer(backend, x, layer))


def _unsupported_cell(backend: Backend, call: CellCall | str) -> str | None:
    if isinstance(call, str):
        return call
    if call.synchronised and not backend.synchronises:
        return _alone(backend)
    return backend.unsupported_cell(call)


def _unsupported_layer(backend: Backend, x: Tensor, layer: ReLUConvBNLayer) -> str | None:
    if synchronised([layer.norm]) and not backend.synchronises:
        return _alone(backend)
    return backend.unsupported_layer(x, layer)


def _alone(backend: Backend) -> str:
    return f"no BatchNorm over several processes in the backend {backend.name}"


def _reasons(x: Tensor, against: Callable[[Backend], str | None]) -> str | None:
    name = backend_name()
    asked = [
        b for b in backends().values() if name == b.name or (name == "auto" and x.device.type in b.devices)
    ]
    reasons = [against(backend) for backend in asked]
    return (
        None
        if None in reasons
        else "; ".join(dict.fromkeys(map(str, reasons))) or f"no backend for {x.device}"
    )


def _cell(
    edges: Sequence[EdgeModule],
    inputs: Sequence[Tensor],
    op_weights: Tensor,
    edge_weights: Tensor | None,
    concat: bool,
) -> list[Tensor]:
    candidates = _candidates(inputs[0])
    if candidates:
        call = cell_call(edges, inputs, op_weights, edge_weights, use_backend.memory, concat)
        reasons = (_unsupported_cell(backend, call) for backend in candidates)
        backend = _choose(candidates, reasons, lambda: _trains_convolutions(edges))
        if backend is not None:
            assert isinstance(call, CellCall)
            return backend.mixed_cell(call if _keeps_cell(call, backend) else replace(call, recompute=True))
    else:
        _check_weights(edges, op_weights, edge_weights)
    nodes = reference.mixed_cell(edges, inputs, op_weights, edge_weights, _mixed_op(edges))
    return [torch.cat(nodes, dim=1)] if concat else nodes


def _keeps_cell(call: CellCall, backend: Backend) -> bool:
    if use_backend.budget is None:
        return True
    x, (n, h, w) = call.inputs[0], call.output_size
    outputs = backend.kept_outputs(call.plan)
    half = call.memory == "bfloat16" or torch.is_autocast_enabled(x.device.type)
    size = outputs * n * h * w * call.plan.mixed_channels * (2 if half else x.element_size())
    return use_backend.budget.keeps(call.plan, size)


def _keeps_layers(x: Tensor, layers: Sequence[ReLUConvBNLayer]) -> bool:
    if use_backend.budget is None:
        return True
    channels = sum(layer.norm.num_features for layer in layers)
    size = layers[0].pixels(x) * channels * x.element_size()
    return use_backend.budget.keeps(layers[0].convs[0], size)


def _mixed_op(edges: Sequence[EdgeModule]) -> reference.MixedOp:
    """The mixed op of the reference, but for an edge with hooks a call of its module."""

    def mixed_op(edge: EdgeModule, x: Tensor, op_weights: Tensor) -> Tensor:
        called = len(edges) > 1 and isinstance(edge, nn.Module) and hooks.Hooks([edge])
        return edge(x, op_weights) if called else reference.mixed_op(edge, x, op_weights)  # type: ignore

    return mixed_op


def _check_weights(edges: Sequence[EdgeModule], op_weights: Tensor, edge_weights: Tensor | None) -> None:
    expected = len(edges), len(edges[0].primitives)
    if op_weights.shape != expected:
        raise ValueError(f"op_weights: expected {[*expected]}, got {[*op_weights.shape]}")
    if edge_weights is not None and edge_weights.shape != expected[:1]:
        raise ValueError(f"edge_weights: expected {[*expected[:1]]}, got {[*edge_weights.shape]}")


def _candidates(x: Tensor) -> list[Backend]:
    """The backends to ask, in order; none for the reference."""
    name, device = backend_name(), x.device.type
    # on the meta device only shapes matter
    if name == "reference" or device == "meta":
        return []
    if functional.is_transformed():
        fall_back("kernels have no torch.func transforms and forward mode; use_backend('reference') has")
        return []
    if name != "auto":
        return [backends()[name]]
    candidates = [backend for backend in backends().values() if device in backend.devices]
    if not candidates:
        fall_back(f"no backend for device {device}")
    return candidates


def _choose(
    candidates: Sequence[Backend], reasons: Iterable[str | None], expected: Callable[[], bool]
) -> Backend | None:
    """The first backend with no reason against it, or None, which is told unless `expected`.

    Raises BackendError if a backend was asked for by name and there is a reason.
    """
    against: dict[str, None] = {}
    for backend, reason in zip(candidates, reasons, strict=True):
        if reason is None:
            return backend
        against[reason] = None
    if against:
        fall_back("; ".join(against), expected())
    return None


def _trains_convolutions(edges: Sequence[EdgeModule]) -> bool:
    """True for methods that backends are not made for (darts, pc-darts)."""
    return any(
        conv.weight.requires_grad
        for edge in edges
        for conv in edge._ops.modules()
        if isinstance(conv, nn.Conv2d)
    )
