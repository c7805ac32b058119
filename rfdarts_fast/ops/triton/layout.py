"""The layout of a cell's branches for the kernels, made once for each plan.

All branch outputs lie in one tensor y [slots, M, C]; a slot is the output of a pointwise convolution, of a
FactorizedReduce's, of a NOR_CONV, of a pool, or noise. Pools read one state whatever the edge, so that a
state has each once. The slots of a state: first halves of separable convolutions, dilated ones, reductions,
max pool, average pool, second halves, NOR_CONVs; all separable ones sorted by kernel size, so the dilated
ones, and the NOR_CONVs, 3x3 first. 1x1 ones have slots too: made again, they would read as many bytes.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.contract import Branch, CellPlan, Edge, Op
from rfdarts_fast.ops.triton.arguments import ROW, ConvGroup, EdgeRow, Span, TermRow

Row = TypeVar("Row", bound=tuple)


class Placed(NamedTuple):
    """A branch, and its place in the plan."""

    edge_index: int
    primitive: int
    edge: Edge
    branch: Branch

    @property
    def key(self) -> tuple[int, int]:
        return self.edge_index, self.primitive

    @property
    def kernel_and_dilation(self) -> tuple[int, int]:
        return self.branch.kernel, self.branch.dilation

    def term(self, slot: int) -> TermRow:
        return TermRow(slot, self.branch.norm, *self.key, self.edge.node)


@dataclass
class Source:
    """A state and the branches of all edges that leave it.

    Attributes:
        slot: the first one of the state.
        separable, dilated, reduces, nor_convs: branches of each operation.
        pools: operations of the pools, each once.
        groups: first depthwise convolutions of the separable branches, then of the dilated ones.
        nor_groups: NOR_CONVs of each kernel size.
        group_rows, nor_group_rows, edges: rows of the tables of groups and of edges.
        inner: terms of the BatchNorms inside separable branches.
        early: `inner`, and the terms of dilated branches, reductions and pools that have a BatchNorm; late:
            those of the separable ones; nor_terms: of NOR_CONVs.
        early_slots: the slots of `early`.
        gradients: spans of the terms that share a branch output: separable, dilated, reduces, pools,
            NOR_CONVs.
        inner_gradients: spans of each of `inner`.
    """

    stride: int
    slot: int
    separable: list[Branch]
    dilated: list[Branch]
    reduces: list[Branch]
    nor_convs: list[Branch]
    pools: list[Op]
    groups: list[ConvGroup]
    nor_groups: list[ConvGroup]
    group_rows: Span
    nor_group_rows: Span
    edges: Span
    inner: Span
    early: Span
    late: Span
    nor_terms: Span
    early_slots: Span
    gradients: Span
    inner_gradients: Span

    @property
    def separable_groups(self) -> list[ConvGroup]:
        return [group for group in self.groups if group.first < len(self.separable)]

    @property
    def depthwise(self) -> int:
        """Branches with depthwise convolutions."""
        return len(self.separable) + len(self.dilated)

    @property
    def outputs(self) -> int:
        """Branch outputs that nodes read."""
        return self.gradients.size

    def inner_of(self, group: ConvGroup) -> Span:
        """The terms inside a group of separable branches."""
        return Span(self.inner.first + group.first, self.inner.first + group.last)

    @property
    def reduce_slot(self) -> int:
        return self.slot + self.depthwise

    @property
    def pool_slot(self) -> int:
        return self.reduce_slot + len(self.reduces)

    @property
    def outer_slot(self) -> int:
        return self.pool_slot + len(self.pools)

    @property
    def nor_slot(self) -> int:
        return self.outer_slot + len(self.separable)


class Node(NamedTuple):
    """Rows of a node's terms and of its incoming edges; `passes`: some have an identity or a bypass."""

    terms: Span
    edges: Span
    passes: bool


@dataclass
class SourceWeights:
    """Frozen convolutions of a state's branches: depthwise ones flat, [branch, kernel^2, C]; pointwise ones
    [branch, out, in]; FactorizedReduce's two as one matrix, one below the other; NOR_CONVs flat, those of one
    kernel size [kernel^2, in, branch * out], and for the backward [branch, kernel^2, out, in] with their taps
    turned round."""

    depthwise: Tensor
    pointwise: Tensor
    outer_depthwise: Tensor
    outer_pointwise: Tensor
    reduces: Tensor
    nor_convs: Tensor
    nor_convs_backward: Tensor


@dataclass
class Constants:
    """On a device: the tables, edge weights of 1; identity, bool [edges, primitives]: which are one."""

    terms: Tensor
    edges: Tensor
    spans: Tensor
    groups: Tensor
    ones: Tensor
    identity: Tensor


class Layout:
    """See the module. `sources` and `nodes` are in the order of the states; `noise`: the slots of noise."""

    def __init__(self, plan: CellPlan) -> None:
        self.slots = 0
        self.terms: list[TermRow] = []
        self.spans: list[Span] = []
        self.groups: list[ConvGroup] = []
        identity = [_identity(edge) for edge in plan.edges]
        # all edges in their order, then those that leave each state
        self.edges = [EdgeRow(i, e.source, e.node, identity[i]) for i, e in enumerate(plan.edges)]
        self._identity = torch.tensor([[j == i for j in range(plan.primitives)] for i in identity])
        self._constants: dict[tuple[torch.device, torch.dtype], Constants] = {}
        self._norms: dict[tuple, Tensor] = {}
        # of the last output of each branch
        self._slot_of: dict[tuple[int, int], int] = {}
        branches = [
            Placed(i, j, edge, branch)
            for i, edge in enumerate(plan.edges)
            for j, branch in enumerate(edge.branches)
        ]
        self.sources = [self._source(plan, state, branches) for state in range(plan.inputs + plan.nodes - 1)]
        self.noise = [self._slot([b]) for b in branches if b.branch.op is Op.NOISE]
        self.nodes = [self._node(plan, node, branches) for node in range(plan.nodes)]

    def constants(self, device: torch.device, dtype: torch.dtype) -> Constants:
        key = device, dtype
        if key not in self._constants:
            self._constants[key] = Constants(
                terms=_table(self.terms).to(device),
                edges=_table(self.edges).to(device),
                spans=_table(self.spans).to(device),
                groups=_table(self.groups).to(device),
                ones=torch.ones(len(self._identity), device=device, dtype=dtype),
                identity=self._identity.to(device),
            )
        return self._constants[key]

    def norms(self, terms: Sequence[Span], device: torch.device) -> Tensor:
        """The rows of the terms' BatchNorms."""
        key = (device, *terms)
        if key not in self._norms:
            rows = [self.terms[i].norm for span in terms for i in range(*span)]
            self._norms[key] = torch.tensor(sorted({*rows} - {-1}), device=device)
        return self._norms[key]

    def _source(self, plan: CellPlan, state: int, branches: list[Placed]) -> Source:
        def of(op: Op) -> list[Placed]:
            # a stable sort: edges stay in order; what no BatchNorm reads is last
            return sorted(
                (b for b in leaving if b.branch.op is op),
                key=lambda b: (*b.kernel_and_dilation, b.branch.norm < 0),
            )

        leaving = [b for b in branches if b.edge.source == state]
        separable, dilated, reduces = of(Op.SEP_CONV), of(Op.DIL_CONV), of(Op.REDUCE)
        # the longest work first
        nor_convs = sorted(of(Op.NOR_CONV), key=lambda b: -b.branch.kernel)
        pools = {op: own for op in (Op.MAX_POOL, Op.AVG_POOL) if (own := of(op))}
        slot = self.slots
        self.slots += len(separable)
        inner = _add(
            self.terms,
            [TermRow(slot + i, b.branch.inner_norm, *b.key, i) for i, b in enumerate(separable)],
        )
        early = [self._terms(own) for own in [*([b] for b in dilated + reduces), *pools.values()]]
        read = [term for term in self.terms[inner.first :] if term.norm >= 0]
        late, last = self._each(separable)
        ordinary, nor_terms = self._each(nor_convs)
        groups = _groups([separable, dilated], plan.mixed_channels)
        nor_groups = _groups([nor_convs], plan.mixed_channels**2)
        return Source(
            stride=plan.stride if state < plan.inputs else 1,
            slot=slot,
            separable=[b.branch for b in separable],
            dilated=[b.branch for b in dilated],
            reduces=[b.branch for b in reduces],
            nor_convs=[b.branch for b in nor_convs],
            pools=[*pools],
            groups=groups,
            nor_groups=nor_groups,
            group_rows=_add(self.groups, groups),
            nor_group_rows=_add(self.groups, nor_groups),
            edges=_add(self.edges, [row for row in self.edges[: len(plan.edges)] if row.source == state]),
            inner=inner,
            early=Span(inner.first, inner.first + len(read)),
            late=last,
            nor_terms=nor_terms,
            early_slots=Span(slot, read[-1].slot + 1 if read else slot),
            gradients=_add(self.spans, late + early + ordinary),
            inner_gradients=_add(self.spans, [Span(i, i + 1) for i in range(*inner)]),
        )

    def _slot(self, branches: list[Placed]) -> int:
        """A new slot, the last output of each of the branches."""
        self._slot_of |= {b.key: self.slots for b in branches}
        self.slots += 1
        return self.slots - 1

    def _terms(self, branches: list[Placed]) -> Span:
        """The terms of branches that share a new slot."""
        slot = self._slot(branches)
        return _add(self.terms, [b.term(slot) for b in branches])

    def _each(self, branches: list[Placed]) -> tuple[list[Span], Span]:
        """The term of each of the branches, and all of them, with a new slot each."""
        first = len(self.terms)
        spans = [self._terms([b]) for b in branches]
        return spans, Span(first, len(self.terms))

    def _node(self, plan: CellPlan, node: int, branches: list[Placed]) -> Node:
        entering = [b for b in branches if b.edge.node == node and b.key in self._slot_of]
        edges = [row for row in self.edges[: len(plan.edges)] if row.node == node]
        return Node(
            terms=_add(self.terms, [b.term(self._slot_of[b.key]) for b in entering]),
            edges=Span(edges[0].index, edges[-1].index + 1),
            passes=plan.K > 1 or any(row.identity >= 0 for row in edges),
        )


def _table(rows: Sequence[tuple[int, ...]]) -> Tensor:
    return torch.tensor([[*row, *[0] * (ROW.value - len(row))] for row in rows], dtype=torch.int32)


def _identity(edge: Edge) -> int:
    """The primitive that is the identity, or -1."""
    return next((i for i, branch in enumerate(edge.branches) if branch.op is Op.IDENTITY), -1)


def _groups(halves: Sequence[list[Placed]], size: int) -> list[ConvGroup]:
    """Neighbours of one kernel size and dilation; separable and dilated branches apart even then. `size`:
    weights of a tap."""
    groups = []
    first = weight = 0
    for branches in halves:
        for (kernel, dilation), members in groupby(branches, lambda b: b.kernel_and_dilation):
            last = first + len([*members])
            groups.append(ConvGroup(kernel, dilation, first, last, weight))
            weight += (last - first) * kernel**2 * size
            first = last
    return groups


def _add(table: list[Row], rows: Sequence[Row]) -> Span:
    first = len(table)
    table += rows
    return Span(first, len(table))


_layouts: weakref.WeakKeyDictionary[CellPlan, Layout] = weakref.WeakKeyDictionary()


def layout_of(plan: CellPlan) -> Layout:
    """The layout of a plan, kept as long as the plan lives."""
    if plan not in _layouts:
        _layouts[plan] = Layout(plan)
    return _layouts[plan]


def conv_weights(plan: CellPlan, dtype: torch.dtype) -> list[SourceWeights]:
    """The frozen convolutions in `dtype`, for each source; packed again when one has changed."""
    sources = layout_of(plan).sources
    return plan.frozen.packed(("triton", dtype), lambda: [_pack(plan, source, dtype) for source in sources])


def _pack(plan: CellPlan, source: Source, dtype: torch.dtype) -> SourceWeights:
    like = next(iter(plan.frozen.weights()), torch.empty(0))

    def flat(convs: list[nn.Conv2d]) -> Tensor:
        parts = [conv.weight.flatten(1).t().reshape(-1) for conv in convs]
        return torch.cat(parts).to(dtype) if parts else like.new_empty(0, dtype=dtype)

    def stacked(matrices: list[Tensor]) -> Tensor:
        return torch.stack(matrices).to(dtype) if matrices else like.new_empty(0, dtype=dtype)

    def in_groups(pack: Callable[[list[Tensor]], Tensor]) -> Tensor:
        """NOR_CONVs, each [out, in, kernel^2]."""
        convs = [branch.convs[0].weight.flatten(2) for branch in source.nor_convs]
        parts = [pack(convs[group.first : group.last]).reshape(-1) for group in source.nor_groups]
        return torch.cat(parts).to(dtype) if parts else like.new_empty(0, dtype=dtype)

    first = source.separable + source.dilated
    return SourceWeights(
        flat([b.convs[0] for b in first]),
        stacked([b.convs[1].weight.flatten(1) for b in first]),
        flat([b.convs[2] for b in source.separable]),
        stacked([b.convs[3].weight.flatten(1) for b in source.separable]),
        stacked([torch.cat([conv.weight.flatten(1) for conv in b.convs]) for b in source.reduces]),
        in_groups(lambda convs: torch.cat(convs).permute(2, 1, 0)),
        in_groups(lambda convs: torch.stack(convs).flip(3).permute(0, 3, 1, 2)),
    )
