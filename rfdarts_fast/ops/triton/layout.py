"""How a cell's branches are laid out for the kernels: found once per plan.

All branch outputs lie in one tensor y [slots, M, W]; a slot is the output of a pointwise convolution, of a
FactorizedReduce's, of a pool, or noise. Pools read one state whatever the edge, so that a state has each
once. The slots of a state: inner halves of separable convolutions, dilated ones, reductions, max pool,
average pool, outer halves; all separable ones sorted by kernel size, and so the dilated ones.

Rows of the table, four numbers each:
    term of a node      slot, norm (-1: none), edge, primitive
    edge                source, edge, primitive of the identity (-1: none), node
    norm                slot, norm, its place among its kind
    gradient            first and last row of the terms that add up to the gradient of one slot
    term of a gradient  slot, norm, node
    kind                first and last branch, first weight
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rfdarts_fast.ops.compiled.plan import Op, Plan, pack_reduce

Range = tuple[int, int]


@dataclass
class Kind:
    """First depthwise convolutions of one kernel size and dilation among those of a state."""

    kernel: int
    dilation: int
    first: int
    last: int
    weight: int


@dataclass
class Source:
    """A state and the branches of all edges that leave it. Ranges are rows of the table."""

    stride: int = 1
    separable: int = 0
    dilated: int = 0
    reduces: int = 0
    pools: list[Op] = field(default_factory=list)
    slot: int = 0
    kinds: list[Kind] = field(default_factory=list)
    kind_row: int = 0
    edges: Range = (0, 0)
    inner: Range = (0, 0)
    early_norms: Range = (0, 0)
    late_norms: Range = (0, 0)
    gradients: Range = (0, 0)
    inner_gradients: Range = (0, 0)
    pairs: list[list[nn.Conv2d]] = field(default_factory=list)
    halves: list[tuple[nn.Conv2d, nn.Conv2d]] = field(default_factory=list)

    @property
    def branches(self) -> int:
        return self.separable + self.dilated

    @property
    def pool_slot(self) -> int:
        return self.slot + self.branches + self.reduces

    @property
    def outer_slot(self) -> int:
        return self.pool_slot + len(self.pools)


@dataclass
class Node:
    """Rows of its terms and of its incoming edges."""

    terms: Range
    edges: Range
    summed: bool


@dataclass
class SourceWeights:
    """Frozen convolutions of a state's branches: depthwise ones flat, [branch, kernel^2, W]; pointwise ones
    [branch, out, in]; FactorizedReduce's two as one matrix [branch, out, 2 W]."""

    depthwise: Tensor
    pointwise: Tensor
    outer_depthwise: Tensor
    outer_pointwise: Tensor
    reduces: Tensor


@dataclass
class Constants:
    """On a device: the table, edge weights of 1, which primitive is the identity [edges, primitives]."""

    table: Tensor
    ones: Tensor
    identity: Tensor


@dataclass
class _Branch:
    op: Op
    kernel: int
    dilation: int
    norm: int
    inner: int
    edge: int
    primitive: int
    node: int
    convs: list[nn.Conv2d]


class Layout:
    """See the module. `sources` and `nodes` are in the order of the states."""

    def __init__(self, plan: Plan) -> None:
        self.inputs, self.nodes_count, self.primitives = plan.spec[:3]
        self.norms = plan.norms
        self.stride, self.K = plan.stride, plan.K
        self.width = plan.channels // plan.K
        self.edges = len(plan.spec[5:]) // (1 + 7 * self.primitives)
        self.slots = 0
        self.noise: list[int] = []
        self.rows: list[tuple[int, ...]] = []
        self.sources: list[Source] = []
        self.nodes: list[Node] = []
        self._plan = plan
        self._constants: dict[tuple[torch.device, torch.dtype], Constants] = {}
        self._packed: dict[torch.dtype, tuple[tuple, list[SourceWeights]]] = {}
        branches, strides = self._read(plan)
        self._identity = [-1] * self.edges
        for b in branches:
            if b.op is Op.IDENTITY:
                self._identity[b.edge] = b.primitive
        slot_of: dict[tuple[int, int], int] = {}
        ends = self._ends()
        for state in range(self.inputs + self.nodes_count - 1):
            leaving = [b for b in branches if ends[b.edge][0] == state]
            stride = {strides[e] for e in range(self.edges) if ends[e][0] == state}.pop()
            self.sources.append(self._source(state, stride, leaving, ends, slot_of))
        for b in branches:
            if b.op is Op.NOISE:
                slot_of[b.edge, b.primitive] = self.slots
                self.noise.append(self.slots)
                self.slots += 1
        for node in range(self.nodes_count):
            entering = [b for b in branches if b.node == node and (b.edge, b.primitive) in slot_of]
            terms = [(slot_of[b.edge, b.primitive], b.norm, b.edge, b.primitive) for b in entering]
            edges = [(s, e, self._identity[e], i) for e, (s, i) in enumerate(ends) if i == node]
            summed = self.K > 1 or any(edge[2] >= 0 for edge in edges)
            self.nodes.append(Node(self._add(terms), self._add(edges), summed))

    def constants(self, device: torch.device, dtype: torch.dtype) -> Constants:
        key = device, dtype
        if key not in self._constants:
            table = torch.tensor([(*row, 0, 0, 0)[:4] for row in self.rows], dtype=torch.int32)
            identity = torch.zeros(self.edges, self.primitives, dtype=dtype)
            for edge, primitive in enumerate(self._identity):
                if primitive >= 0:
                    identity[edge, primitive] = 1
            self._constants[key] = Constants(
                table.to(device),
                torch.ones(self.edges, dtype=dtype, device=device),
                identity.to(device),
            )
        return self._constants[key]

    @torch.no_grad()
    def weights(self, dtype: torch.dtype) -> list[SourceWeights]:
        """The frozen convolutions in `dtype`, one for each source; packed again when one has changed."""
        state = self._plan.conv_state()
        found = self._packed.get(dtype)
        if found is None or found[0] != state:
            found = state, [self._pack(source, dtype) for source in self.sources]
            self._packed[dtype] = found
        return found[1]

    def _pack(self, source: Source, dtype: torch.dtype) -> SourceWeights:
        like = self._plan.convs[0].weight if self._plan.convs else torch.empty(0)

        def flat(convs: list[nn.Conv2d]) -> Tensor:
            parts = [conv.weight.flatten(1).t().reshape(-1) for conv in convs]
            return torch.cat(parts).to(dtype) if parts else like.new_empty(0, dtype=dtype)

        def stacked(matrices: list[Tensor]) -> Tensor:
            return torch.stack(matrices).to(dtype) if matrices else like.new_empty(0, dtype=dtype)

        outer = source.pairs[: source.separable]
        return SourceWeights(
            flat([pair[0] for pair in source.pairs]),
            stacked([pair[1].weight.flatten(1) for pair in source.pairs]),
            flat([pair[2] for pair in outer]),
            stacked([pair[3].weight.flatten(1) for pair in outer]),
            stacked([pack_reduce(*pair)[1] for pair in source.halves]),
        )

    def _add(self, rows: Sequence[tuple[int, ...]]) -> Range:
        first = len(self.rows)
        self.rows += rows
        return first, len(self.rows)

    def _ends(self) -> list[Range]:
        """Source and node of each edge."""
        return [(s, node) for node in range(self.nodes_count) for s in range(self.inputs + node)]

    def _read(self, plan: Plan) -> tuple[list[_Branch], list[int]]:
        """All branches with a term in a node, and the strides of the edges."""
        convs = iter(plan.convs)
        branches, strides = [], []
        body = iter(plan.spec[5:])
        for edge, (_, node) in enumerate(self._ends()):
            strides.append(next(body))
            for primitive in range(self.primitives):
                code, kernel, dilation, _, norm, inner, _ = (next(body) for _ in range(7))
                op = Op(code)
                count = {Op.SEP_CONV: 4, Op.DIL_CONV: 2, Op.REDUCE: 2}.get(op, 0)
                own = [next(convs) for _ in range(count)]
                if op is not Op.NONE:
                    branches.append(_Branch(op, kernel, dilation, norm, inner, edge, primitive, node, own))
        return branches, strides

    def _source(
        self, state: int, stride: int, leaving: list[_Branch], ends: list[Range], slot_of: dict
    ) -> Source:
        def of(op: Op) -> list[_Branch]:
            # a stable sort: edges stay in order
            return sorted((b for b in leaving if b.op is op), key=lambda b: (b.kernel, b.dilation))

        separable, dilated, reduces = of(Op.SEP_CONV), of(Op.DIL_CONV), of(Op.REDUCE)
        pools = {op: of(op) for op in (Op.MAX_POOL, Op.AVG_POOL)}
        source = Source(stride, len(separable), len(dilated), len(reduces), slot=self.slots)
        source.pools = [op for op, found in pools.items() if found]
        source.pairs = [b.convs for b in separable + dilated]
        source.halves = [(b.convs[0], b.convs[1]) for b in reduces]
        for i, b in enumerate(separable):
            slot_of[b.edge, b.primitive] = source.outer_slot + i
        for i, b in enumerate(dilated + reduces):
            slot_of[b.edge, b.primitive] = source.slot + source.separable + i
        for i, op in enumerate(source.pools):
            for b in pools[op]:
                slot_of[b.edge, b.primitive] = source.pool_slot + i
        self.slots = source.outer_slot + source.separable
        weight = 0
        for i, b in enumerate(separable + dilated):
            last = source.kinds[-1] if source.kinds else None
            # the kinds of separable and of dilated branches are apart even where they are equal
            if last is None or (last.kernel, last.dilation) != (b.kernel, b.dilation) or i == len(separable):
                last = Kind(b.kernel, b.dilation, i, i, weight)
                source.kinds.append(last)
            last.last = i + 1
            weight += b.kernel**2 * self.width
        source.kind_row = self._add([(k.first, k.last, k.weight) for k in source.kinds])[0]
        rows = [(s, e, self._identity[e], node) for e, (s, node) in enumerate(ends) if s == state]
        source.edges = self._add(rows)
        inner = [(source.slot + i, b.inner, i) for i, b in enumerate(separable)]
        source.inner = self._add(inner)
        early = [(slot_of[b.edge, b.primitive], b.norm) for b in dilated + reduces]
        early += [(slot_of[b.edge, b.primitive], b.norm) for op in source.pools for b in pools[op]]
        source.early_norms = self._add([*inner, *early])
        source.late_norms = self._add([(slot_of[b.edge, b.primitive], b.norm) for b in separable])
        groups = [[b] for b in separable + dilated + reduces] + [pools[op] for op in source.pools]
        ranges = [
            self._add([(slot_of[b.edge, b.primitive], b.norm, b.node) for b in group]) for group in groups
        ]
        source.gradients = self._add(ranges)
        start = source.inner[0]
        source.inner_gradients = self._add([(start + i, start + i + 1) for i in range(source.separable)])
        return source


_layouts: weakref.WeakKeyDictionary[nn.Module, tuple[Plan, Layout]] = weakref.WeakKeyDictionary()


def layout_of(plan: Plan, first_edge: nn.Module) -> Layout:
    """The layout of a plan, kept as long as the plan's first edge lives."""
    found = _layouts.get(first_edge)
    if found is None or found[0] is not plan:
        found = plan, Layout(plan)
        _layouts[first_edge] = found
    return found[1]


def uneven(plan: Plan, inputs: int) -> str | None:
    """Why a plan has no layout, or None: all edges that leave a state need one stride, those that leave the
    inputs the cell's, those that leave a node 1."""
    width = 1 + 7 * plan.spec[2]
    strides = plan.spec[5::width]
    edge = 0
    for node in range(plan.spec[1]):
        for state in range(inputs + node):
            if strides[edge] != (plan.stride if state < inputs else 1):
                return "edges of different strides from one state"
            edge += 1
    return None
