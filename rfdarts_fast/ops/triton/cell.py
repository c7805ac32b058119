"""The passes through a cell: the launches of kernels, and their arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from rfdarts_fast.ops.contract import CellPlan, Op
from rfdarts_fast.ops.synchronised import merge_means, merge_moments
from rfdarts_fast.ops.triton import kernels_backward as backward
from rfdarts_fast.ops.triton import kernels_forward as forward
from rfdarts_fast.ops.triton import kernels_nor_conv as nor_conv
from rfdarts_fast.ops.triton import tuning
from rfdarts_fast.ops.triton.arguments import (
    SIDE,
    Depthwise,
    NormBackward,
    Norms,
    Parts,
    Pools,
    Rows,
    Sizes,
    Span,
    State,
    States,
    View,
    Weights,
)
from rfdarts_fast.ops.triton.layout import Source, conv_weights, layout_of

Grid = Callable[[dict[str, int]], tuple[int, ...]]


@dataclass(frozen=True)
class Options:
    """The facts of a call that are not tensors.

    Attributes:
        size: N, H' and W' of the nodes.
        training: BatchNorms use the batch's statistics.
        concat: the nodes lie side by side, as their concatenation.
        recompute: branch outputs are made again for the backward; else they wait for it in dtype `stored`.
        all_images: of the batches of all processes, where BatchNorms are synchronised, else 0.
    """

    plan: CellPlan
    size: tuple[int, int, int]
    training: bool
    concat: bool
    recompute: bool
    stored: torch.dtype
    all_images: int

    @property
    def pixels(self) -> int:
        """M, the rows of a branch output."""
        return self.size[0] * self.size[1] * self.size[2]

    @property
    def all_pixels(self) -> int:
        """Those of all processes whose statistics BatchNorms share."""
        return (self.all_images or self.size[0]) * self.size[1] * self.size[2]


@dataclass
class Gradients:
    """Gradients of inputs [N, H, W, C * K] or None, gamma and beta [norms, C], and term weights [edges,
    primitives]; of identities' term weights, and of edge weights from the bypass, in edges [edges, 2]."""

    inputs: list[Tensor | None]
    gamma: Tensor
    beta: Tensor
    term_weights: Tensor
    edges: Tensor


@dataclass
class Cell:
    """The tensors of a cell: M rows of C mixed channels.

    Attributes:
        states: inputs [inputs, M * stride^2, C * K], then the nodes: one after the other, or with `concat`
            side by side.
        branch_outputs: [slots, M, C].
        argmax: of the max pools, uint8 [sources, M, C]; of none where the cell has none.
        moments: mean and biased variance [2, norms, C], in the dtype of all arithmetic.
        rstd, gamma, beta: [norms, C].
        op_weights: [edges, primitives].
        edge_weights: [edges], or None for 1.
    """

    options: Options
    states: Tensor
    branch_outputs: Tensor
    argmax: Tensor
    moments: Tensor
    rstd: Tensor
    gamma: Tensor
    beta: Tensor
    op_weights: Tensor
    edge_weights: Tensor | None

    def __post_init__(self) -> None:
        self.plan = plan = self.options.plan
        self.layout = layout_of(plan)
        self.constants = self.layout.constants(self.states.device, self.op_weights.dtype)
        self.conv_weights = conv_weights(plan, self.states.dtype)
        self.M, self.C, self.K = self.options.pixels, plan.mixed_channels, plan.K
        self.sizes, self.parts = Sizes(self.M, self.C, *self.options.size[1:]), tuning.parts(self.M)
        self.input_size = self.M * plan.stride**2 * plan.channels
        self.all_states = States(self.states, *node_places(self.options))
        self.norms = Norms(self.moments[0], self.rstd, self.gamma, self.beta)
        edge_weights = self.constants.ones if self.edge_weights is None else self.edge_weights
        self.weights = Weights(self.op_weights, edge_weights, plan.primitives)
        self.BC = tuning.channel_block(self.C)
        self.blocks = triton.cdiv(self.C, self.BC)
        # outputs of FactorizedReduce's two convolutions
        self.halves = slice(self.C // 2), slice(self.C // 2, self.C)
        self.ACC = tl.float64 if self.op_weights.dtype == torch.float64 else tl.float32

    def launch(self, kernel: Any, grid: Grid, **arguments: Any) -> None:
        """Runs a kernel on the arguments, and on those that all kernels have."""
        tuning.launch(kernel, grid, **arguments, sizes=self.sizes, ACC=self.ACC, BC=self.BC)

    def tiles(self, rows: int, programs: int = 1, lanes: int = 1) -> Grid:
        """The grid of a kernel whose program has a tile of [rows, lanes, channels]."""
        return lambda meta: (triton.cdiv(rows, meta["TILE"] // (lanes * self.BC)), self.blocks, programs)

    def over_parts(self, programs: int) -> Grid:
        """The grid of a kernel that sums over the rows of one part."""
        return lambda meta: (programs, self.parts.count, self.blocks)

    def state(self, index: int) -> State:
        if index < self.plan.inputs:
            return State(self.states[index * self.input_size :], self.plan.channels)
        _, first, step, row = self.all_states
        return State(self.states[first + (index - self.plan.inputs) * step :], row)

    def terms(self, rows: Span) -> Rows:
        return Rows(self.constants.terms, *rows)

    def edges(self, rows: Span) -> Rows:
        return Rows(self.constants.edges, *rows)

    def empty(self, *shape: int) -> Tensor:
        return self.states.new_empty(shape)

    def partial(self, *shape: int) -> Tensor:
        """Room for partial sums, in the dtype of all arithmetic."""
        return self.gamma.new_empty(shape)

    def forward(self, statistics: bool) -> None:
        """The states of all nodes, and with `statistics` all moments."""
        inputs = self.plan.inputs
        # inputs wait for nothing: one message for all
        first = inputs if self.options.all_images else 1
        steps = [range(first), *(range(i, i + 1) for i in range(first, inputs + self.plan.nodes))]
        for states in steps:
            for node in range(states.start - inputs, states.stop - inputs):
                if node >= 0:
                    self.node_forward(node)
            leaving = [state for state in states if state < len(self.layout.sources)]
            sources = [self.layout.sources[state] for state in leaving]
            for state in leaving:
                self.first_convs(state, statistics)
            if statistics:
                self.merge_over_processes([span for s in sources for span in (s.early, s.nor_terms)])
            for state in leaving:
                self.second_convs(state, statistics)
            if statistics:
                self.merge_over_processes([source.late for source in sources])

    def merge_over_processes(self, terms: Sequence[Span]) -> None:
        """The moments of the terms' BatchNorms become those of all processes."""
        norms = self.layout.norms(terms, self.states.device) if self.options.all_images else ()
        if not len(norms):
            return
        merged = merge_moments(self.moments[:, norms], self.M, self.options.all_pixels)
        self.moments[:, norms] = merged
        self.rstd[norms] = (merged[1] + self.plan.eps).rsqrt()

    def recompute_branch_outputs(self) -> None:
        """The branch outputs once more, from the states and the moments."""
        for state in range(len(self.layout.sources)):
            self.first_convs(state, statistics=False)
            self.second_convs(state, statistics=False)

    def first_convs(self, index: int, statistics: bool) -> None:
        """The first convolutions of all edges that leave a state, and its pools; with `statistics` also
        the moments of the BatchNorms behind them."""
        source, weights = self.layout.sources[index], self.conv_weights[index]
        x, y = self.state(index), self.branch_outputs
        depthwise = self.empty(source.depthwise, self.M, self.C)
        for group in source.groups:
            lanes = triton.next_power_of_2(group.size)
            self.launch(
                forward.depthwise_kernel, self.tiles(self.M, 1, lanes),
                x=x, x_group=0, weights=weights.depthwise[group.weight :], out=depthwise[group.first :],
                terms=self.terms(source.inner), norms=self.norms, branches=group.size,
                KERNEL=group.kernel, DILATION=group.dilation, STRIDE=source.stride, NORM=False, NB=lanes,
            )  # fmt: skip
        if source.depthwise:
            torch.bmm(depthwise, weights.pointwise.mT, out=y[source.slot : source.reduce_slot])
        if source.reduces:
            self.reduce(x, weights.reduces, y[source.reduce_slot : source.pool_slot])
        if source.pools:
            self.launch(
                forward.pools_kernel, self.tiles(self.M),
                x=x, y=y[source.pool_slot :], argmax=self.argmax[index:], STRIDE=source.stride,
                MAX=Op.MAX_POOL in source.pools, AVERAGE=Op.AVG_POOL in source.pools,
            )  # fmt: skip
        if source.nor_convs:
            self.nor_convs(x, source, weights.nor_convs, statistics)
        if statistics:
            self.statistics(source.early_slots, source.early)

    def second_convs(self, index: int, statistics: bool) -> None:
        """The second halves of separable convolutions, likewise."""
        source, weights, y = self.layout.sources[index], self.conv_weights[index], self.branch_outputs
        if not source.separable:
            return
        depthwise = self.empty(len(source.separable), self.M, self.C)
        for group in source.separable_groups:
            inner = State(y[source.slot + group.first :], self.C)
            self.launch(
                forward.depthwise_kernel, self.tiles(self.M, group.size),
                x=inner, x_group=self.M * self.C, weights=weights.outer_depthwise[group.weight :],
                out=depthwise[group.first :], terms=self.terms(source.inner_of(group)), norms=self.norms,
                branches=1, KERNEL=group.kernel, DILATION=group.dilation, STRIDE=1, NORM=True, NB=1,
            )  # fmt: skip
        slots = Span(source.outer_slot, source.nor_slot)
        torch.bmm(depthwise, weights.outer_pointwise.mT, out=y[slots.first : slots.last])
        if statistics:
            self.statistics(slots, source.late)

    def nor_convs(self, x: State, source: Source, weights: Tensor, statistics: bool) -> None:
        """NOR_CONVs of x, a launch for each kernel size, and with `statistics` their BatchNorms' moments."""
        y, parts = self.branch_outputs, tuning.product_parts(self.M)
        partial = self.partial(len(source.nor_convs) * statistics, parts.count, 2, self.C)
        for group in source.nor_groups:
            self.launch(
                nor_conv.nor_conv_kernel,
                lambda meta: (triton.cdiv(meta["branches"] * self.C, meta["BN"]), parts.count),
                x=x, weights=weights[group.weight :], y=y[source.nor_slot + group.first :],
                partial=partial[group.first :], branches=group.size, parts=parts, KERNEL=group.kernel,
                STATISTICS=statistics,
                **tuning.product_blocks(self.C, group.size * self.C, y.element_size()),
            )  # fmt: skip
        if statistics:
            self.merge_moments(partial, source.nor_slot, source.nor_terms, parts)

    def reduce(self, x: State, weights: Tensor, out: Tensor) -> None:
        """FactorizedReduce's convolutions: of the first and of the last pixel of each 2x2 window."""
        n, h, w = self.options.size
        image, line = 4 * h * w * x.row, 2 * w * x.row
        windows = x.data.as_strided((n, h, 2, w, 2, self.C), (image, 2 * line, line, 2 * x.row, x.row, 1))
        for place, half in enumerate(self.halves):
            pixels = windows[:, :, place, :, place].relu().view(1, self.M, self.C)
            torch.bmm(pixels.expand(len(weights), -1, -1), weights[:, half].mT, out=out[..., half])

    def reduce_backward(self, grads: Tensor, weights: Tensor) -> Tensor:
        """Gradients [branches, M, 2, C] of these two pixels, from those of the outputs [branches, M, C]."""
        out = self.empty(*grads.shape[:2], 2, self.C)
        if len(grads):
            for place, half in enumerate(self.halves):
                torch.bmm(grads[..., half], weights[:, half], out=out[:, :, place])
        return out

    def statistics(self, slots: Span, terms: Span) -> None:
        """The moments of the terms' BatchNorms, which are behind the slots."""
        if not terms.size:
            return
        partial = self.partial(slots.size, self.parts.count, 2, self.C)
        self.launch(
            forward.statistics_kernel, self.over_parts(slots.size),
            y=self.branch_outputs[slots.first :], partial=partial, parts=self.parts,
        )  # fmt: skip
        self.merge_moments(partial, slots.first, terms, self.parts)

    def merge_moments(self, partial: Tensor, first_slot: int, terms: Span, parts: Parts) -> None:
        """The moments of the terms' BatchNorms, from those of the parts of the slots from `first_slot` on."""
        mean, variance = self.moments
        self.launch(
            forward.moments_kernel, lambda meta: (terms.size, self.blocks),
            partial=partial, mean=mean, variance=variance, rstd=self.rstd, terms=self.terms(terms),
            first_slot=first_slot, parts=parts, EPS=self.plan.eps,
        )  # fmt: skip

    def node_forward(self, index: int) -> None:
        """A node's state from the branches of the edges that enter it."""
        node = self.layout.nodes[index]
        self.launch(
            forward.node_kernel, self.tiles(self.M, 1, self.K),
            states=self.all_states, y=self.branch_outputs, out=self.state(self.plan.inputs + index),
            terms=self.terms(node.terms), edges=self.edges(node.edges), weights=self.weights,
            norms=self.norms, INPUTS=self.plan.inputs, STRIDE=self.plan.stride, K=self.K,
        )  # fmt: skip

    def backward(self, grads: Sequence[Tensor | None], needs_input_grad: Sequence[bool]) -> Gradients:
        """Gradients of everything from those of the nodes, [N, C, H, W] each, of any strides."""
        plan = self.plan
        n, oh, ow = self.options.size
        h, w = plan.stride * oh, plan.stride * ow
        made = Gradients(
            [self.empty(n, h, w, plan.channels) if needed else None for needed in needs_input_grad],
            torch.empty_like(self.gamma),
            torch.empty_like(self.gamma),
            torch.zeros_like(self.op_weights),
            self.op_weights.new_zeros(len(plan.edges), 2),
        )
        self.norm_backward = NormBackward(self.partial(3, *self.gamma.shape), len(self.gamma))
        # gradients of the nodes, in their order of channels, and of their mixed channels alone
        self.node_grads = self.empty(plan.nodes, self.M, plan.channels)
        self.mixed_grads = self.node_grads if self.K == 1 else self.empty(plan.nodes, self.M, self.C)
        zero = self.states.new_zeros(1)
        outside = [zero.expand(n, plan.channels, h, w)] * plan.inputs
        outside += [zero.expand(n, plan.channels, oh, ow) if grad is None else grad for grad in grads]
        # no edge leaves the last node
        self.node_grads[-1].view(n, oh, ow, -1).copy_(outside.pop().permute(0, 2, 3, 1))
        self.node_backward(plan.nodes - 1, made)
        for state in reversed(range(len(outside))):
            node = state - plan.inputs
            out = self.node_grads[node] if node >= 0 else made.inputs[state]
            self.source_backward(state, outside[state], out, made)
            if node >= 0:
                self.node_backward(node, made)
        return made

    def node_backward(self, index: int, made: Gradients) -> None:
        """From the gradient of a node's state, those of the terms and edges that enter it."""
        node, g = self.layout.nodes[index], self.node_grads[index]
        if self.K > 1:
            self.mixed_grads[index].copy_(g.view(self.M, self.C, self.K)[..., 0])
        terms, edges = node.terms.size, node.edges.size
        if terms:
            partial = self.partial(terms, self.parts.count, 2, self.C)
            self.launch(
                backward.sums_kernel, self.over_parts(terms),
                g=self.mixed_grads[index], y=self.branch_outputs, partial=partial,
                terms=self.terms(node.terms), norms=self.norms, parts=self.parts,
            )  # fmt: skip
            self.norms_backward(partial, node.terms, made, weighted=True)
        if node.passes:
            partial = self.partial(self.blocks, self.parts.count, edges, 2)
            self.launch(
                backward.edge_sums_kernel, self.over_parts(edges),
                g=g, states=self.all_states, partial=partial, edges=self.edges(node.edges),
                parts=self.parts, INPUTS=self.plan.inputs, STRIDE=self.plan.stride, K=self.K,
            )  # fmt: skip
            torch.sum(partial, (0, 1), out=made.edges[node.edges.first : node.edges.last])

    def norms_backward(self, partial: Tensor, terms: Span, made: Gradients, weighted: bool) -> None:
        """Parameters' gradients and `norm_backward` of the terms, from partial sums."""
        self.launch(
            backward.norm_backward_kernel, lambda meta: (terms.size,),
            partial=partial, norm_backward=self.norm_backward, grad_gamma=made.gamma, grad_beta=made.beta,
            grad_term_weights=made.term_weights, terms=self.terms(terms), weights=self.weights,
            norms=self.norms, parts=self.parts, WEIGHTED=weighted, TRAINING=self.options.training,
        )  # fmt: skip
        norms = self.layout.norms([terms], self.states.device) if self.options.all_images else ()
        if len(norms):
            # slope and shift are means over the rows
            means = self.norm_backward.rows[1:, norms]
            self.norm_backward.rows[1:, norms] = merge_means(means, self.M, self.options.all_pixels)

    def branch_gradients(self, g: Tensor, out: Tensor, spans: Span) -> None:
        """Gradients of branch outputs [spans, M, C], from those behind their BatchNorms."""
        self.launch(
            backward.branch_gradient_kernel, self.tiles(self.M, spans.size),
            g=g, y=self.branch_outputs, out=out, terms=self.constants.terms,
            spans=Rows(self.constants.spans, *spans), weights=self.weights,
            norm_backward=self.norm_backward, norms=self.norms,
        )  # fmt: skip

    def source_backward(self, index: int, outside: Tensor, out: Tensor | None, made: Gradients) -> None:
        """The gradient of a state into `out`, if it is needed, and those of BatchNorms inside branches."""
        source, weights = self.layout.sources[index], self.conv_weights[index]
        separable, reduces, outputs = len(source.separable), len(source.reduces), source.outputs
        grad_y = self.empty(outputs, self.M, self.C)
        if outputs:
            self.branch_gradients(self.mixed_grads, grad_y, source.gradients)
        if separable:
            inner = self.product(grad_y[:separable], weights.outer_pointwise)
            inner = self.inner_backward(source, inner, weights.outer_depthwise, made)
            if out is not None:
                self.branch_gradients(inner, grad_y, source.inner_gradients)
        if out is None:
            return
        of_depthwise, of_reduces, of_pools, of_nor_convs = grad_y.split(
            [source.depthwise, reduces, len(source.pools), len(source.nor_convs)]
        )
        depthwise = Depthwise(
            self.product(of_depthwise, weights.pointwise),
            weights.depthwise,
            Rows(self.constants.groups, *source.group_rows),
        )
        rows = self.M * source.stride**2
        shared = dict(
            x=self.state(index), out=out, outside=View(outside, *outside.stride()),
            edges=self.edges(source.edges), weights=self.weights, STRIDE=source.stride, K=self.K,
        )  # fmt: skip
        self.launch(
            backward.input_gradient_kernel, self.tiles(rows),
            depthwise=depthwise, reduce_grads=self.reduce_backward(of_reduces, weights.reduces),
            nor_conv_grads=self.nor_convs_backward(source, of_nor_convs, weights.nor_convs_backward),
            pools=Pools(of_pools, self.argmax[index:]), g=self.mixed_grads,
            KERNELS=tuple((group.kernel, group.dilation) for group in source.groups), REDUCES=reduces,
            NOR_CONVS=len(source.nor_convs) > 0,
            MAX=Op.MAX_POOL in source.pools, AVERAGE=Op.AVG_POOL in source.pools, **shared,
        )  # fmt: skip
        if self.K > 1:
            grid = self.tiles(rows, 1, self.K)
            self.launch(backward.bypass_backward_kernel, grid, g=self.node_grads, **shared)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a [branches, M, out] by b [branches, out, in]."""
        # an `out` keeps autocast away
        return torch.bmm(a, b, out=self.empty(len(a), self.M, b.shape[2])) if len(a) else a

    def nor_convs_backward(self, source: Source, grads: Tensor, weights: Tensor) -> Tensor:
        """The gradient [M, C] of relu(x) from those of all NOR_CONVs that read it, [convolutions, M, C]."""
        if not source.nor_convs:
            return grads
        out = self.empty(self.M, self.C)
        self.launch(
            nor_conv.nor_conv_backward_kernel,
            lambda meta: (
                triton.cdiv(self.M, meta["TILE"] // SIDE.value),
                triton.cdiv(self.C, meta["BN"]),
            ),
            grads=grads, weights=weights, out=out, groups=Rows(self.constants.groups, *source.nor_group_rows),
            KERNELS=tuple(group.kernel for group in source.nor_groups),
            **tuning.product_blocks(self.C, self.C, out.element_size()),
        )  # fmt: skip
        return out

    def inner_backward(self, source: Source, grads: Tensor, weights: Tensor, made: Gradients) -> Tensor:
        """Gradients [separable, M, C] behind the BatchNorms inside separable branches, from those behind the
        second depthwise convolutions."""
        out = torch.empty_like(grads)
        partial = self.partial(len(source.separable), self.parts.count, 2, self.C)
        for group in source.separable_groups:
            self.launch(
                backward.inner_gradient_kernel, self.over_parts(group.size),
                grads=grads[group.first :], weights=weights[group.weight :], y=self.branch_outputs,
                out=out[group.first :], partial=partial[group.first :],
                terms=self.terms(source.inner_of(group)), norms=self.norms, parts=self.parts,
                KERNEL=group.kernel, DILATION=group.dilation,
            )  # fmt: skip
        self.norms_backward(partial, source.inner, made, weighted=False)
        return out


def node_places(options: Options) -> tuple[int, int, int]:
    """The place of the first node's state, and the distances of nodes and of rows; see `States`."""
    plan, M = options.plan, options.pixels
    # aligned as a fresh allocation is
    first = triton.cdiv(plan.inputs * M * plan.stride**2 * plan.channels, 16) * 16
    if options.concat:
        return first, plan.channels, plan.nodes * plan.channels
    return first, M * plan.channels, plan.channels
