"""A cell's forward and backward pass: which kernel runs on what, and the autograd node around both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from rfdarts_fast.ops.compiled.plan import Op
from rfdarts_fast.ops.triton.kernels_backward import (
    branch_gradient_kernel,
    bypass_gradient_kernel,
    coefficients_kernel,
    edge_sums_kernel,
    inner_gradient_kernel,
    input_gradient_kernel,
    sums_kernel,
)
from rfdarts_fast.ops.triton.kernels_forward import (
    depthwise_kernel,
    moments_kernel,
    node_kernel,
    pools_kernel,
    statistics_kernel,
)
from rfdarts_fast.ops.triton.layout import Layout, Range, Source
from rfdarts_fast.ops.triton.tuning import channel_block, interpreted, launch, parts

__all__ = ["CellFunction", "Options", "interpreted"]


@dataclass
class Cell:
    """One pass through a cell, M rows of W mixed channels; all tensors of states are NHWC.

    Attributes:
        states: inputs [inputs, M * stride^2, W * K], then the nodes: one after the other, or side by side.
        y: branch outputs [slots, M, W].
        places: of the max pools [sources, M, W].
        gamma, beta, mean, invstd: [norms, W], in the dtype of all arithmetic.
    """

    layout: Layout
    shape: tuple[int, int, int]
    together: bool
    training: bool
    eps: float
    states: Tensor
    y: Tensor
    places: Tensor
    gamma: Tensor
    beta: Tensor
    mean: Tensor
    variance: Tensor
    invstd: Tensor
    mix: Tensor
    edge_weights: Tensor

    def __post_init__(self) -> None:
        layout = self.layout
        n, self.OH, self.OW = self.shape
        self.M, self.W, self.K = n * self.OH * self.OW, layout.width, layout.K
        self.channels = self.W * self.K
        self.input_size = self.M * layout.stride**2 * self.channels
        self.nodes_at, self.node_step, self.node_row = node_places(layout, self.M, self.together)
        self.constants = layout.constants(self.states.device, self.mix.dtype)
        self.weights = layout.weights(self.states.dtype)
        self.rows_each, self.parts = parts(self.M)
        self.BW = channel_block(self.W)
        self.blocks = triton.cdiv(self.W, self.BW)
        self.ACC = tl.float64 if self.mix.dtype == torch.float64 else tl.float32

    def state(self, index: int) -> tuple[Tensor, int]:
        """A state, and the distance of its rows."""
        if index < self.layout.inputs:
            return self.states[index * self.input_size :], self.channels
        return self.states[self.nodes_at + (index - self.layout.inputs) * self.node_step :], self.node_row

    def tiles(self, rows: int, programs: int = 1, lanes: int = 1):
        """The grid of a kernel whose program has a tile of [rows, lanes, channels]."""
        return lambda meta: (triton.cdiv(rows, meta["TILE"] // (lanes * self.BW)), self.blocks, programs)

    def over_parts(self, programs: int):
        """The grid of a kernel that sums over the rows of one part."""
        return lambda meta: (programs, self.parts, self.blocks)

    def empty(self, *shape: int, like: Tensor | None = None) -> Tensor:
        return (self.states if like is None else like).new_empty(shape)

    def stage(self, index: int, statistics: bool) -> None:
        """All branches of the edges that leave a state, and with `statistics` their BatchNorms' moments."""
        source, weights = self.layout.sources[index], self.weights[index]
        x, row = self.state(index)
        z = self.empty(source.branches, self.M, self.W)
        norms = self.mean, self.invstd, self.gamma, self.beta
        sizes = self.M, self.W, self.OH, self.OW
        shared = {"ACC": self.ACC, "BW": self.BW}
        for kind in source.kinds:
            count = kind.last - kind.first
            lanes = triton.next_power_of_2(count)
            launch(
                depthwise_kernel, self.tiles(self.M, 1, lanes),
                x, weights.depthwise[kind.weight :], z[kind.first :], self.constants.table, 0, *norms,
                0, row, *sizes, count,
                KERNEL=kind.kernel, DILATION=kind.dilation, STRIDE=source.stride, NORM=False, NB=lanes,
                **shared,
            )  # fmt: skip
        at = source.slot
        if source.branches:
            torch.bmm(z, weights.pointwise.mT, out=self.y[at : at + source.branches])
        at += source.branches
        if source.reduces:
            self.reduce(index, weights.reduces, self.y[at : at + source.reduces])
        if source.pools:
            launch(
                pools_kernel, self.tiles(self.M),
                x, self.y[source.pool_slot :], self.places[index], row, *sizes,
                STRIDE=source.stride, MAX=Op.MAX_POOL in source.pools, AVERAGE=Op.AVG_POOL in source.pools,
                **shared,
            )  # fmt: skip
        if statistics:
            self.statistics(source.slot, source.outer_slot, source.early_norms)
        if not source.separable:
            return
        z = z[: source.separable]
        for kind in source.kinds:
            if kind.first >= source.separable:
                continue
            launch(
                depthwise_kernel, self.tiles(self.M, kind.last - kind.first),
                self.y[source.slot + kind.first :], weights.outer_depthwise[kind.weight :], z[kind.first :],
                self.constants.table, source.inner[0] + kind.first, *norms, self.M * self.W, self.W, *sizes,
                1,
                KERNEL=kind.kernel, DILATION=kind.dilation, STRIDE=1, NORM=True, NB=1, **shared,
            )  # fmt: skip
        last = source.outer_slot + source.separable
        torch.bmm(z, weights.outer_pointwise.mT, out=self.y[source.outer_slot : last])
        if statistics:
            self.statistics(source.outer_slot, last, source.late_norms)

    def reduce(self, index: int, weights: Tensor, out: Tensor) -> None:
        """FactorizedReduce's convolutions: one product with the two pixels of each window that they read."""
        n, h, w = self.shape
        x, row = self.state(index)
        x = x.as_strided(
            (n, h, 2, w, 2, self.W), (4 * h * w * row, 4 * w * row, 2 * w * row, 2 * row, row, 1)
        )
        pair = torch.cat([x[:, :, 0, :, 0], x[:, :, 1, :, 1]], dim=-1).relu_().view(1, self.M, 2 * self.W)
        torch.bmm(pair.expand(len(weights), -1, -1), weights.mT, out=out)

    def statistics(self, first: int, last: int, norms: Range) -> None:
        """The moments of the BatchNorms of the slots from `first` to `last`."""
        if norms[0] == norms[1]:
            return
        partial = self.empty(last - first, self.parts, 2, self.W, like=self.mean)
        shared = {"ACC": self.ACC, "BW": self.BW}
        launch(
            statistics_kernel, self.over_parts(last - first),
            self.y, partial, first, self.M, self.W, self.rows_each, self.parts, **shared,
        )  # fmt: skip
        launch(
            moments_kernel, lambda meta: (norms[1] - norms[0], self.blocks),
            partial, self.mean, self.variance, self.invstd, self.constants.table, norms[0], first,
            self.M, self.W, self.rows_each, self.parts, EPS=self.eps, **shared,
        )  # fmt: skip

    def node(self, index: int) -> None:
        """A node's state from the branches of the edges that enter it."""
        node = self.layout.nodes[index]
        out, _ = self.state(self.layout.inputs + index)
        launch(
            node_kernel, self.tiles(self.M, 1, self.K),
            self.states, self.y, out, self.constants.table, *node.terms, *node.edges, self.mix,
            self.edge_weights, self.mean, self.invstd, self.gamma, self.beta, self.M, self.W, self.OH,
            self.OW,
            self.layout.primitives, self.nodes_at, self.node_step, self.node_row,
            INPUTS=self.layout.inputs, STRIDE=self.layout.stride, K=self.K, ACC=self.ACC, BW=self.BW,
        )  # fmt: skip

    def forward(self) -> None:
        inputs, nodes = self.layout.inputs, self.layout.nodes_count
        for state in range(inputs + nodes):
            if state >= inputs:
                self.node(state - inputs)
            if state < inputs + nodes - 1:
                self.stage(state, self.training)

    def again(self) -> None:
        """The branch outputs once more, from the states and the moments."""
        for state in range(len(self.layout.sources)):
            self.stage(state, statistics=False)

    def backward(self, grads: Sequence[Tensor | None], wanted: Sequence[bool]) -> Gradients:
        """Gradients of everything from those of the nodes, [N, C, H, W] each, of any strides."""
        layout, M = self.layout, self.M
        h, w = layout.stride * self.OH, layout.stride * self.OW
        zero = self.states.new_zeros(1)
        found = Gradients(
            [self.empty(self.shape[0], h, w, self.channels) if want else None for want in wanted],
            torch.empty_like(self.gamma),
            torch.empty_like(self.gamma),
            torch.zeros_like(self.mix),
            self.mix.new_zeros(layout.edges, 2),
        )
        self.coefficients = self.empty(3, *self.gamma.shape, like=self.gamma)
        # gradients of the nodes, in their order of channels, and of their mixed channels alone
        self.grads = self.empty(layout.nodes_count, M, self.channels)
        self.mixed_grads = self.grads if self.K == 1 else self.empty(layout.nodes_count, M, self.W)
        outside = [zero.expand(self.shape[0], self.channels, h, w) for _ in range(layout.inputs)]
        for grad in grads:
            absent = zero.expand(self.shape[0], self.channels, self.OH, self.OW)
            outside.append(absent if grad is None else grad)
        for state in reversed(range(layout.inputs + layout.nodes_count)):
            node = state - layout.inputs
            if node == layout.nodes_count - 1:
                place = self.grads[node].view(self.shape[0], self.OH, self.OW, self.channels)
                place.copy_(outside[state].permute(0, 2, 3, 1))
            else:
                self.source(
                    state, outside[state], self.grads[node] if node >= 0 else found.inputs[state], found
                )
            if node >= 0:
                self.node_backward(node, found)
        return found

    def node_backward(self, index: int, found: Gradients) -> None:
        """What the gradient of a node's state says of the terms and edges that enter it."""
        node = self.layout.nodes[index]
        if self.K > 1:
            self.mixed_grads[index].copy_(self.grads[index].view(self.M, self.W, self.K)[..., 0])
        count = node.terms[1] - node.terms[0]
        shared = {"ACC": self.ACC, "BW": self.BW}
        if count:
            partial = self.empty(count, self.parts, 2, self.W, like=self.gamma)
            launch(
                sums_kernel, self.over_parts(count),
                self.mixed_grads[index], self.y, partial, self.constants.table, node.terms[0], self.mean,
                self.M, self.W, self.rows_each, self.parts, **shared,
            )  # fmt: skip
            self.finish(partial, node.terms, found, weighted=True)
        if node.summed:
            edges = node.edges[1] - node.edges[0]
            partial = self.empty(self.blocks, self.parts, edges, 2, like=self.gamma)
            launch(
                edge_sums_kernel, self.over_parts(edges),
                self.grads[index], self.states, partial, self.constants.table, node.edges[0], self.M, self.W,
                self.OH, self.OW, self.nodes_at, self.node_step, self.node_row, self.rows_each, self.parts,
                INPUTS=self.layout.inputs, STRIDE=self.layout.stride, K=self.K, **shared,
            )  # fmt: skip
            first = sum(self.layout.inputs + i for i in range(index))
            torch.sum(partial, (0, 1), out=found.edges[first : first + edges])

    def finish(self, partial: Tensor, terms: Range, found: Gradients, weighted: bool) -> None:
        """Coefficients and parameters' gradients from partial sums."""
        launch(
            coefficients_kernel, lambda meta: (terms[1] - terms[0],),
            partial, self.coefficients, found.gamma, found.beta, found.weights, self.constants.table,
            terms[0],
            self.mix, self.edge_weights, self.invstd, self.gamma, self.beta, self.M, self.W, len(self.gamma),
            self.layout.primitives, self.parts,
            WEIGHTED=weighted, TRAINING=self.training, ACC=self.ACC, BW=self.BW,
        )  # fmt: skip

    def branch_gradients(self, g: Tensor, out: Tensor, rows: Range) -> None:
        launch(
            branch_gradient_kernel, self.tiles(self.M, rows[1] - rows[0]),
            g, self.y, out, self.constants.table, rows[0], self.coefficients, self.mean, self.M, self.W,
            len(self.gamma), ACC=self.ACC, BW=self.BW,
        )  # fmt: skip

    def source(self, index: int, given: Tensor, out: Tensor | None, found: Gradients) -> None:
        """The gradient of a state into `out`, if it is wanted, and those of BatchNorms inside branches."""
        source, weights = self.layout.sources[index], self.weights[index]
        count = source.gradients[1] - source.gradients[0]
        d = self.empty(count, self.M, self.W)
        if count:
            self.branch_gradients(self.mixed_grads, d, source.gradients)
        if source.separable:
            u = self.inner(source, self.product(d[: source.separable], weights.outer_pointwise), index, found)
            if out is not None:
                self.branch_gradients(u, d, source.inner_gradients)
        if out is None:
            return
        x, row = self.state(index)
        last = source.branches + source.reduces
        z = self.product(d[: source.branches], weights.pointwise) if source.branches else d
        reduced = self.product(d[source.branches : last], weights.reduces) if source.reduces else d
        strides = given.stride(0), given.stride(1), given.stride(2), given.stride(3)
        sizes = self.M, self.W, self.OH, self.OW
        shared = {"STRIDE": source.stride, "ACC": self.ACC, "BW": self.BW}
        rows = self.M * source.stride**2
        launch(
            input_gradient_kernel, self.tiles(rows),
            x, z, weights.depthwise, d[last:], self.places[index], reduced, self.mixed_grads, given, out,
            self.constants.table, source.kind_row, *source.edges, self.mix, self.edge_weights, row, *sizes,
            self.layout.primitives, self.channels, *strides,
            KINDS=tuple((kind.kernel, kind.dilation) for kind in source.kinds),
            MAX=Op.MAX_POOL in source.pools, AVERAGE=Op.AVG_POOL in source.pools, REDUCES=source.reduces,
            **shared,
        )  # fmt: skip
        if self.K > 1:
            launch(
                bypass_gradient_kernel, self.tiles(rows, 1, self.K),
                x, self.grads, given, out, self.constants.table, *source.edges, self.edge_weights, row,
                *sizes,
                *strides, K=self.K, **shared,
            )  # fmt: skip

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        # an `out` keeps autocast away
        return torch.bmm(a, b, out=self.empty(len(a), self.M, b.shape[2]))

    def inner(self, source: Source, z: Tensor, index: int, found: Gradients) -> Tensor:
        """Gradients at the outputs of the BatchNorms inside separable convolutions [separable, M, W]."""
        u = torch.empty_like(z)
        partial = self.empty(source.separable, self.parts, 2, self.W, like=self.gamma)
        for kind in source.kinds:
            if kind.first >= source.separable:
                continue
            launch(
                inner_gradient_kernel, self.over_parts(kind.last - kind.first),
                z[kind.first :], self.weights[index].outer_depthwise[kind.weight :], self.y, u[kind.first :],
                partial[kind.first :], self.constants.table, source.inner[0] + kind.first, self.mean,
                self.invstd, self.gamma, self.beta, self.M, self.W, self.OH, self.OW, self.rows_each,
                self.parts, KERNEL=kind.kernel, DILATION=kind.dilation, ACC=self.ACC, BW=self.BW,
            )  # fmt: skip
        self.finish(partial, source.inner, found, weighted=False)
        return u


@dataclass
class Gradients:
    """Of the inputs [N, H, W, C] or None; gamma, beta [norms, W]; products of mix and edge weights [edges,
    primitives], the identity's apart: its sum with the state, and that of the bypass, in edges [edges, 2]."""

    inputs: list[Tensor | None]
    gamma: Tensor
    beta: Tensor
    weights: Tensor
    edges: Tensor


def node_places(layout: Layout, M: int, together: bool) -> tuple[int, int, int]:
    """Where the nodes' states begin, and the distances of nodes and of rows."""
    channels = layout.width * layout.K
    # aligned as a fresh allocation is
    at = -(-layout.inputs * M * layout.stride**2 * channels // 16) * 16
    if together:
        return at, channels, layout.nodes_count * channels
    return at, M * channels, channels


@dataclass
class Options:
    """How a call differs from another with the same layout."""

    together: bool
    training: bool
    eps: float
    recompute: bool
    kept: torch.dtype


class CellFunction(torch.autograd.Function):
    """All nodes of a cell, and the moments of its BatchNorms [2, norms, W]: mean and biased variance."""

    @staticmethod
    def forward(
        ctx: Any,
        layout: Layout,
        options: Options,
        moments: Tensor | None,
        noise: list[Tensor],
        gamma: Tensor,
        beta: Tensor,
        mix: Tensor,
        edge_weights: Tensor | None,
        *inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        x = inputs[0]
        n, _, h, w = x.shape
        shape = n, h // layout.stride, w // layout.stride
        M, channels = shape[0] * shape[1] * shape[2], layout.width * layout.K
        at, _, _ = node_places(layout, M, options.together)
        states = x.new_empty(at + layout.nodes_count * M * channels)
        size = M * layout.stride**2 * channels
        for i, state in enumerate(inputs):
            place = states[i * size : (i + 1) * size].view(n, h, w, channels)
            place.copy_(state.permute(0, 2, 3, 1))
        mean, variance = (torch.empty_like(gamma) for _ in range(2)) if moments is None else moments
        invstd = torch.empty_like(gamma) if moments is None else (variance + options.eps).rsqrt()
        y = x.new_empty(layout.slots, M, layout.width)
        places = x.new_empty((len(layout.sources), M, layout.width), dtype=torch.uint8)
        ones = layout.constants(x.device, mix.dtype).ones
        cell = Cell(
            layout, shape, options.together, options.training, options.eps, states, y, places, gamma, beta,
            mean, variance, invstd, mix, ones if edge_weights is None else edge_weights,
        )  # fmt: skip
        with on_device(x):
            fill_noise(cell, noise)
            cell.forward()
        ctx.layout, ctx.shape, ctx.options = layout, shape, options
        kept: tuple[Tensor, ...] = (y.to(options.kept), places)
        if options.recompute:
            kept = tuple(noise)
        ctx.save_for_backward(states, gamma, beta, mean, invstd, mix, edge_weights, *kept)
        ctx.set_materialize_grads(False)
        used = torch.stack([mean, variance])
        ctx.mark_non_differentiable(used)
        nodes = states[at:]
        if options.together:
            whole = nodes.view(*shape, layout.nodes_count * channels)
            return whole.permute(0, 3, 1, 2), used
        return *(node.permute(0, 3, 1, 2) for node in nodes.view(layout.nodes_count, *shape, channels)), used

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        layout, options = ctx.layout, ctx.options
        states, gamma, beta, mean, invstd, mix, edge_weights, *kept = ctx.saved_tensors
        M = ctx.shape[0] * ctx.shape[1] * ctx.shape[2]
        if options.recompute:
            y = states.new_empty(layout.slots, M, layout.width)
            places = states.new_empty((len(layout.sources), M, layout.width), dtype=torch.uint8)
        else:
            y, places = kept
        ones = layout.constants(states.device, mix.dtype).ones
        cell = Cell(
            layout, ctx.shape, options.together, options.training, options.eps, states, y, places, gamma,
            beta,
            mean, mean, invstd, mix, ones if edge_weights is None else edge_weights,
        )  # fmt: skip
        outside = list(grads[:-1])
        if options.together:
            whole = outside[0]
            absent = [None] * layout.nodes_count
            outside = absent if whole is None else list(whole.chunk(layout.nodes_count, dim=1))  # type: ignore[assignment]
        wanted = ctx.needs_input_grad[8:]
        with on_device(states):
            if options.recompute:
                fill_noise(cell, kept)
                cell.again()
            found = cell.backward(outside, wanted)
            weights = found.weights + cell.constants.identity * found.edges[:, :1]
            of_mix, of_edges = weights, None
            if edge_weights is not None:
                of_mix = weights * edge_weights[:, None]
                of_edges = (weights * mix).sum(1) + found.edges[:, 1]
        inputs = [None if x is None else x.permute(0, 3, 1, 2) for x in found.inputs]
        return (None, None, None, None, found.gamma, found.beta, of_mix, of_edges, *inputs)


def on_device(x: Tensor) -> torch.cuda.device_of:
    """Kernels are launched on the current device: that of x."""
    return torch.cuda.device_of(x)


def fill_noise(cell: Cell, noise: Sequence[Tensor]) -> None:
    """Noise [N, W, H, W] into its slots."""
    for slot, drawn in zip(cell.layout.noise, noise, strict=True):
        cell.y[slot].view(*cell.shape, cell.W).copy_(drawn.permute(0, 2, 3, 1))
