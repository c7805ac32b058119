"""Shapes of the compiled ops, for tracing; one function per op that returns tensors.

csrc/README.md has the table of arguments that these and the C++ checks follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, library

from rfdarts_fast.ops.contract import CellShape


def _expect(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """Raises ValueError unless x has the shape; None stands for any size."""
    if len(x.shape) != len(shape) or any(e not in (None, s) for s, e in zip(x.shape, shape, strict=True)):
        expected = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected [{expected}], got {[*x.shape]}")


def _expect_count(name: str, tensors: Sequence[Tensor], count: int) -> None:
    if len(tensors) != count:
        raise ValueError(f"{name}: expected {count}, got {len(tensors)}")


def _state(x: Tensor, channels: int, h: int, w: int) -> Tensor:
    """An empty [N, channels, h, w] in channels_last order."""
    return x.new_empty_strided((x.shape[0], channels, h, w), (h * w * channels, 1, w * channels, channels))


class _Cell:
    """An encoded cell with its inputs; the shapes of what goes in are checked."""

    def __init__(self, inputs: list[Tensor], cell: list[int]) -> None:
        self.shape = shape = CellShape.of(cell)
        _expect_count("inputs", inputs, max(shape.inputs, 1))
        self.x = x = inputs[0]
        _expect("inputs", x, (None,) * 4)
        self.n, self.channels, h, w = x.shape
        self.mixed = self.channels // shape.K
        self.h, self.w = h // shape.stride, w // shape.stride
        for state in inputs:
            _expect("inputs", state, (self.n, self.channels, None, None))

    def expect(
        self,
        conv_weights: Tensor,
        gamma: Tensor,
        beta: Tensor,
        op_weights: Tensor,
        edge_weights: Tensor | None = None,
        moments: Tensor | None = None,
        noise: Sequence[Tensor] = (),
        nodes: Sequence[Tensor] | None = None,
    ) -> None:
        packed = sum(branch.packed_size(self.mixed) for branch in self.shape.branches)
        _expect("conv_weights", conv_weights, (packed,))
        _expect("gamma", gamma, (self.shape.norms, self.mixed))
        _expect("beta", beta, (self.shape.norms, self.mixed))
        _expect("op_weights", op_weights, (self.shape.edges, self.shape.primitives))
        if edge_weights is not None:
            _expect("edge_weights", edge_weights, (self.shape.edges,))
        if moments is not None:
            _expect("moments", moments, (2, self.shape.norms, self.mixed))
        for drawn in noise:
            _expect("noise", drawn, (self.n, self.mixed, self.h, self.w))
        if nodes is not None:
            _expect_count("nodes", nodes, self.shape.nodes)
            for node in nodes:
                _expect("nodes", node, (self.n, self.channels, self.h, self.w))

    def branch_outputs(self, bfloat16: bool) -> Tensor:
        outputs = sum(branch.outputs for branch in self.shape.branches)
        # an image is a whole number of vectors
        image = (self.h * self.w * self.mixed + 31) // 32 * 32
        dtype = torch.bfloat16 if bfloat16 and self.x.dtype == torch.float32 else self.x.dtype
        return self.x.new_empty(outputs * self.n * image, dtype=dtype)


def _cell_forward(
    inputs, noise, conv_weights, gamma, beta, op_weights, edge_weights, moments, cell, eps, bfloat16,
    bfloat16_products, concat, all_images=0,
):  # fmt: skip
    c = _Cell(inputs, cell)
    c.expect(conv_weights, gamma, beta, op_weights, edge_weights, moments, noise)
    nodes = [] if concat else [_state(c.x, c.channels, c.h, c.w) for _ in range(c.shape.nodes)]
    whole = _state(c.x, c.shape.nodes * c.channels, c.h, c.w) if concat else c.x.new_empty(0)
    used_moments = c.x.new_empty(2, c.shape.norms, c.mixed, dtype=torch.float64)
    return nodes, whole, c.branch_outputs(bfloat16), used_moments


def _cell_branch_outputs(
    inputs, nodes, conv_weights, gamma, beta, op_weights, moments, cell, eps, bfloat16, bfloat16_products
):
    c = _Cell(inputs, cell)
    c.expect(conv_weights, gamma, beta, op_weights, None, moments, (), nodes)
    return c.branch_outputs(bfloat16)


def _cell_backward(
    grads, grad_nodes, inputs, nodes, noise, conv_weights, gamma, beta, op_weights, edge_weights, moments,
    branch_outputs, cell, training, eps, bfloat16, bfloat16_products, needs_input_grad, all_images=0,
):  # fmt: skip
    c = _Cell(inputs, cell)
    c.expect(conv_weights, gamma, beta, op_weights, edge_weights, moments, noise, nodes)
    _expect_count("grads", grads, len(grad_nodes))
    for grad in grads:
        _expect("grads", grad, (c.n, c.channels, c.h, c.w))
    _expect("branch_outputs", branch_outputs, c.branch_outputs(bfloat16).shape)
    return (
        [_state(inputs[i], c.channels, *inputs[i].shape[2:]) for i in needs_input_grad],
        torch.empty_like(gamma),
        torch.empty_like(beta),
        torch.empty_like(op_weights),
        op_weights.new_empty(0 if edge_weights is None else c.shape.edges),
    )


def _expect_layers(
    x: Tensor,
    conv_weights: list[Tensor],
    gammas: list[Tensor],
    betas: list[Tensor],
    moments: list[Tensor],
) -> None:
    _expect("x", x, (None,) * 4)
    _expect_count("gammas", gammas, len(conv_weights))
    _expect_count("betas", betas, len(conv_weights))
    if moments:
        _expect_count("moments", moments, len(conv_weights))
    for i, (weights, gamma, beta) in enumerate(zip(conv_weights, gammas, betas, strict=True)):
        _expect("gammas", gamma, (None,))
        _expect("betas", beta, gamma.shape)
        # the matrix and its transpose
        _expect("conv_weights", weights, (2 * x.shape[1] * gamma.shape[0],))
        if moments:
            _expect("moments", moments[i], (2, gamma.shape[0]))


def _layer_outputs(x: Tensor, gammas: list[Tensor], reduce: bool) -> list[Tensor]:
    stride = 2 if reduce else 1
    return [_state(x, gamma.shape[0], x.shape[2] // stride, x.shape[3] // stride) for gamma in gammas]


def _grad_of(x: Tensor, needed: bool) -> Tensor:
    # nothing else says "no gradient" in a schema of one Tensor
    return _state(x, *x.shape[1:]) if needed else x.new_empty_strided((0, 1, 1, 1), (1, 1, 1, 1))


def _relu_conv_bn_forward(
    x, conv_weights, gammas, betas, moments, eps, reduce, bfloat16_products, all_images=0
):
    _expect_layers(x, conv_weights, gammas, betas, moments)
    used_moments = [x.new_empty(2, gamma.shape[0], dtype=torch.float64) for gamma in gammas]
    return _layer_outputs(x, gammas, reduce), _layer_outputs(x, gammas, reduce), used_moments


def _relu_conv_bn_backward(
    grads, x, conv_outputs, conv_weights, gammas, betas, moments, eps, training, reduce, bfloat16_products,
    needs_input_grad, all_images=0,
):  # fmt: skip
    _expect_layers(x, conv_weights, gammas, betas, moments)
    for name, tensors in (("grads", grads), ("conv_outputs", conv_outputs)):
        _expect_count(name, tensors, len(conv_weights))
        for tensor, output in zip(tensors, _layer_outputs(x, gammas, reduce), strict=True):
            _expect(name, tensor, output.shape)
    return (
        _grad_of(x, needs_input_grad),
        [torch.empty_like(g) for g in gammas],
        [torch.empty_like(b) for b in betas],
    )


def _expect_norm(x: Tensor, gamma: Tensor, beta: Tensor, moments: Tensor | None) -> None:
    _expect("x", x, (None,) * 4)
    _expect("gamma", gamma, (x.shape[1],))
    _expect("beta", beta, (x.shape[1],))
    if moments is not None:
        _expect("moments", moments, (2, x.shape[1]))


def _batch_norm_forward(x, gamma, beta, moments, eps, relu):
    _expect_norm(x, gamma, beta, moments)
    return _state(x, *x.shape[1:]), x.new_empty(2, x.shape[1], dtype=torch.float64)


def _batch_norm_backward(grad, x, gamma, beta, moments, eps, training, relu, needs_input_grad):
    _expect_norm(x, gamma, beta, moments)
    _expect("grad", grad, x.shape)
    return _grad_of(x, needs_input_grad), torch.empty_like(gamma), torch.empty_like(beta)


def _update_running_stats(running_means, running_vars, num_batches_tracked, moments, momentum, count):
    _expect("moments", moments, (2, len(running_means), None))
    for name, tensors in (("running_means", running_means), ("running_vars", running_vars)):
        _expect_count(name, tensors, moments.shape[1])
        for tensor in tensors:
            _expect(name, tensor, moments.shape[2:])
    _expect_count("num_batches_tracked", num_batches_tracked, moments.shape[1])


FAKES: dict[str, Callable] = {
    "cell_forward": _cell_forward,
    "cell_branch_outputs": _cell_branch_outputs,
    "cell_backward": _cell_backward,
    "relu_conv_bn_forward": _relu_conv_bn_forward,
    "relu_conv_bn_backward": _relu_conv_bn_backward,
    "batch_norm_forward": _batch_norm_forward,
    "batch_norm_backward": _batch_norm_backward,
    "update_running_stats": _update_running_stats,
}


def register() -> None:
    """Registers the fakes, once the ops are loaded. Raises RuntimeError where these take other arguments."""
    for name, fake in FAKES.items():
        schema = getattr(torch.ops.rfdarts, name).default._schema
        if [argument.name for argument in schema.arguments] != [*inspect.signature(fake).parameters]:
            raise RuntimeError(f"other arguments: {schema}")
        library.register_fake(f"rfdarts::{name}", fake)
