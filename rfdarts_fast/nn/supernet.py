"""The supernet of the DARTS family: `model_search.py` of quark0/darts (cnn/) and of yuhuixu1993/PC-DARTS."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rfdarts_fast import ops
from rfdarts_fast.nn.primitives import (
    PRIMITIVES,
    FactorizedReduce,
    ReLUConvBN,
    make_primitive,
    preprocess,
    runs_only,
)
from rfdarts_fast.nn.sequential import FusedSequential
from rfdarts_fast.nn.stems import cifar_stem, imagenet_stem
from rfdarts_fast.spaces import AnyGenotype, GenotypeRule, Space, derive

ARCH_INIT_STD = 1e-3


class MixedOp(nn.Module):
    """One edge: all candidate operations side by side, on the first channels / K channels.

    Args:
        primitives: names of the candidates.
        channels: channels of the edge's input and output.
        stride: 1, or 2 on an edge that reduces.
        K: partial channels (PC-DARTS); 1 sends all channels through. Must divide `channels`.
        batch_norm: put a BatchNorm behind primitives registered so (DARTS does, NAS-Bench-201 does not).
    """

    def __init__(
        self,
        primitives: Sequence[str],
        channels: int,
        stride: int,
        K: int = 1,
        affine: bool = True,
        track: bool = True,
        batch_norm: bool = True,
    ) -> None:
        super().__init__()
        if K < 1 or channels % K:
            raise ValueError(f"K: expected a divisor of the edge's {channels} channels, got {K}")
        self.primitives = tuple(primitives)
        self.channels = channels
        self.stride = stride
        self.K = K
        self._ops = nn.ModuleList()
        width = channels // K
        for name in self.primitives:
            op = make_primitive(name, width, stride, affine, track)
            if batch_norm and PRIMITIVES[name].batch_norm:
                op = nn.Sequential(op, nn.BatchNorm2d(width, affine=affine, track_running_stats=track))
            self._ops.append(op)

    def forward(self, x: Tensor, op_weights: Tensor) -> Tensor:
        """x [N, C, H, W], op_weights [primitives] -> [N, C, H / stride, W / stride]."""
        return ops.mixed_cell([self], [x], op_weights[None])[0]


def cell_output(
    cell: Any, inputs: Sequence[Tensor], op_weights: Tensor, edge_weights: Tensor | None = None
) -> Tensor:
    """A cell without its preprocessing: its last nodes, concatenated, [N, multiplier * C, H', W'].

    Args:
        cell: a `SearchCell`, or a foreign cell with mixed ops in `_ops`, `nodes` and `multiplier`.
        inputs: the preprocessed states, [N, C, H, W] each.
        op_weights, edge_weights: as of `ops.mixed_cell`.
    """
    edges = list(cell._ops)
    if cell.multiplier == cell.nodes:
        return ops.concat_cell(edges, inputs, op_weights, edge_weights)
    return torch.cat(ops.mixed_cell(edges, inputs, op_weights, edge_weights)[-cell.multiplier :], dim=1)


class SearchCell(nn.Module):
    """Two preprocessed inputs, then nodes of mixed ops; the last `multiplier` nodes are concatenated."""

    def __init__(
        self,
        space: Space,
        cell_type: str,
        c_prev_prev: int,
        c_prev: int,
        c: int,
        reduction_prev: bool,
        K: int = 1,
        affine: bool = True,
        track: bool = True,
        multiplier: int | None = None,
    ) -> None:
        super().__init__()
        self.reduction = cell_type == "reduce"
        self.nodes = space.nodes
        self.multiplier = space.nodes if multiplier is None else multiplier
        if reduction_prev:
            self.preprocess0: nn.Module = FactorizedReduce(c_prev_prev, c, affine, track)
        else:
            self.preprocess0 = ReLUConvBN(c_prev_prev, c, 1, affine=affine, track=track)
        self.preprocess1 = ReLUConvBN(c_prev, c, 1, affine=affine, track=track)
        self._ops = nn.ModuleList()
        edges = iter(space.cells[cell_type])
        for node in range(space.nodes):
            for j in range(space.inputs + node):
                stride = 2 if self.reduction and j < space.inputs else 1
                self._ops.append(self.make_edge(next(edges), c, stride, K, affine, track))

    def make_edge(self, *args: Any) -> MixedOp:
        """The mixed op of an edge, which subclasses may replace; takes the arguments of `MixedOp`."""
        return MixedOp(*args)

    def forward(
        self, s0: Tensor, s1: Tensor, op_weights: Tensor, edge_weights: Tensor | None = None
    ) -> Tensor:
        """The outputs s0, s1 of the two cells before -> [N, multiplier * C, H', W']."""
        return cell_output(self, [self.preprocess0(s0), self.preprocess1(s1)], op_weights, edge_weights)


class Supernet(nn.Module):
    """A network with architecture parameters apart from its weights, and the genotype that they stand for.

    As in the published code, `parameters()` holds the weights only and `arch_parameters()` the alphas and
    betas; both are in `state_dict()` and follow `.to()`.
    """

    def __init__(self, space: Space, edge_norm: bool = False) -> None:
        super().__init__()
        self.space = space
        self.arch_names: dict[str, tuple[str, str | None]] = {}
        for cell, edges in space.cells.items():
            suffix = "" if len(space.cells) == 1 else f"_{cell}"
            alpha = nn.Parameter(ARCH_INIT_STD * torch.randn(len(edges), len(edges[0])))
            self.register_parameter(f"alphas{suffix}", alpha)
            if edge_norm:
                beta = nn.Parameter(ARCH_INIT_STD * torch.randn(len(edges)))
                self.register_parameter(f"betas{suffix}", beta)
            self.arch_names[cell] = (f"alphas{suffix}", f"betas{suffix}" if edge_norm else None)

    def named_arch_parameters(self) -> dict[str, nn.Parameter]:
        names = [name for pair in self.arch_names.values() for name in pair if name is not None]
        # alphas first, then betas, as PC-DARTS lists them
        return {name: getattr(self, name) for name in sorted(names)}

    def arch_parameters(self) -> list[nn.Parameter]:
        return list(self.named_arch_parameters().values())

    def named_parameters(self, *args, **kwargs) -> Iterator[tuple[str, nn.Parameter]]:
        arch = {id(p) for p in self.arch_parameters()}
        for name, parameter in super().named_parameters(*args, **kwargs):
            if id(parameter) not in arch:
                yield name, parameter

    def cell_weights(self, cell: str) -> tuple[Tensor, Tensor | None]:
        """The op weights [edges, primitives] of a cell type, and its edge weights [edges] or None.

        The softmax of the betas runs over the incoming edges of each node (PC-DARTS, eq. 2).
        """
        alpha_name, beta_name = self.arch_names[cell]
        op_weights = getattr(self, alpha_name).softmax(dim=-1)
        if beta_name is None:
            return op_weights, None
        betas = getattr(self, beta_name)
        return op_weights, torch.cat([betas[node].softmax(dim=0) for node in self.space.node_slices()])

    @torch.no_grad()
    def genotype(self, rule: GenotypeRule = "published") -> AnyGenotype:
        """The genotype that the current architecture weights stand for, by a rule of the space's family."""
        term_weights = {}
        for cell in self.space.cells:
            op_weights, edge_weights = self.cell_weights(cell)
            weights = op_weights if edge_weights is None else op_weights * edge_weights[:, None]
            term_weights[cell] = weights.tolist()
        return derive(self.space, term_weights, rule)


class SearchNetwork(Supernet):
    """The supernet of DARTS (K = 1) and PC-DARTS (K > 1, edge_norm).

    Args:
        space: a space of the DARTS family.
        C: channels of the first cells; doubled by each reduction cell, at layers // 3 and 2 * layers // 3.
        num_classes: classes of the data set.
        layers: number of cells.
        stem: "cifar" (resolution kept) or "imagenet" (divided by 8).
        K: partial channels; must divide C.
        edge_norm: learn PC-DARTS's edge weights.
        affine: trainable gamma and beta in the cells' BatchNorms. Off in DARTS, on with random features.
            The stem's BatchNorms always have them.
        track_running_stats: as of BatchNorm2d.
        stem_multiplier: the stem has stem_multiplier * C channels.
        multiplier: how many of a cell's nodes, counted from the last, are its output; None for all.
    """

    def __init__(
        self,
        space: Space,
        C: int = 16,
        num_classes: int = 10,
        layers: int = 8,
        stem: Literal["cifar", "imagenet"] = "cifar",
        K: int = 1,
        edge_norm: bool = False,
        affine: bool = True,
        track_running_stats: bool = True,
        stem_multiplier: int = 3,
        multiplier: int | None = None,
    ) -> None:
        super().__init__(space, edge_norm)
        if space.inputs != 2:
            raise ValueError(f"space: expected one of the DARTS family, got {space.name!r}")
        c_stem = stem_multiplier * C
        if stem == "cifar":
            self.stem = FusedSequential(*cifar_stem(c_stem))
        else:
            self.stem0, self.stem1 = (FusedSequential(*stem) for stem in imagenet_stem(c_stem))
        self.cells = nn.ModuleList()
        c_prev_prev, c_prev, c = c_stem, c_stem, C
        reduction_prev = stem == "imagenet"
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            c = 2 * c if reduction else c
            cell_type = "reduce" if reduction else "normal"
            widths = c_prev_prev, c_prev, c
            cell = self.make_cell(
                space, cell_type, *widths, reduction_prev, K, affine, track_running_stats, multiplier
            )
            self.cells.append(cell)
            reduction_prev = reduction
            c_prev_prev, c_prev = c_prev, cell.multiplier * c
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c_prev, num_classes)

    def _run_cells(
        self, s0: Tensor, s1: Tensor, cell_weights: dict[str, tuple[Tensor, Tensor | None]]
    ) -> Tensor:
        """The last cell's output, from the stem's; all preprocessing of a state shares one read of it."""
        cells: list[Any] = [*self.cells]
        weights = [cell_weights["reduce" if cell.reduction else "normal"] for cell in cells]
        if not all(runs_only(cell, SearchCell) for cell in cells):
            for cell, of_cell in zip(cells, weights, strict=True):
                s0, s1 = s1, cell(s0, s1, *of_cell)
            return s1
        # cell -> its preprocessed first input
        first = {} if s0 is s1 else {0: cells[0].preprocess0(s0)}
        for i, cell in enumerate(cells):
            # s1 is the second input of this cell and the first of the next one
            readers = [k for k in range(i, len(cells))[:2] if k not in first]
            second, *others = preprocess(s1, [cell.preprocess1, *(cells[k].preprocess0 for k in readers)])
            first.update(zip(readers, others, strict=True))
            s1 = cell_output(cell, [first.pop(i), second], *weights[i])
        return s1

    def make_cell(self, *args: Any) -> SearchCell:
        """A cell, which subclasses may replace; takes the arguments of `SearchCell`."""
        return SearchCell(*args)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] -> logits [N, num_classes]."""
        if hasattr(self, "stem"):
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        s1 = self._run_cells(s0, s1, {cell: self.cell_weights(cell) for cell in self.space.cells})
        return self.classifier(self.global_pooling(s1).flatten(1))
