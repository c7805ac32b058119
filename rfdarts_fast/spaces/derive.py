"""The published rules that turn trained architecture weights into a genotype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from rfdarts_fast.spaces.genotype import AnyGenotype, CellGenotype, Gene, Genotype

if TYPE_CHECKING:
    from rfdarts_fast.spaces.space import Space

GenotypeRule = Literal["published", "without-none"]
"""published: that of the space's authors. without-none: NAS-Bench-201's, `none` left out of the argmax."""

# [edges][primitives], in the space's order
TermWeights = Sequence[Sequence[float]]


def derive(
    space: Space, term_weights: Mapping[str, TermWeights], rule: GenotypeRule = "published"
) -> AnyGenotype:
    """The strongest genotype, by a rule of the space's family.

    Args:
        space: the space.
        term_weights: cell type -> weights [edges][primitives] of that cell's edges, in the space's order: the
            softmax of the alphas, in PC-DARTS multiplied by the edge's weight (alpha x beta).
    """
    return space.family.rules[rule](space, term_weights)


def two_strongest_edges(space: Space, term_weights: Mapping[str, TermWeights]) -> Genotype:
    """DARTS's rule (quark0/darts model_search.py, `genotype`); ties go to the first.

    Each node keeps the two edges whose best primitive other than `none` weighs most, with that primitive.
    """
    concat = tuple(range(space.inputs, space.inputs + space.nodes))
    normal, reduce = (_genes(space, cell, term_weights[cell]) for cell in ("normal", "reduce"))
    return Genotype(normal, concat, reduce, concat)


def strongest_primitives(space: Space, term_weights: Mapping[str, TermWeights]) -> CellGenotype:
    """NAS-Bench-201's rule (AutoDL-Projects): the best primitive of each edge, `none` included."""
    return _each_edge(space, term_weights)


def strongest_without_none(space: Space, term_weights: Mapping[str, TermWeights]) -> CellGenotype:
    """The best primitive of each edge other than `none`, which the DARTS space never chooses either."""
    return _each_edge(space, term_weights, leave_out="none")


def _each_edge(space: Space, term_weights: Mapping[str, TermWeights], leave_out: str = "") -> CellGenotype:
    edges = zip(space.cells["cell"], term_weights["cell"], strict=True)
    return CellGenotype(tuple(_strongest(names, weights, leave_out)[0] for names, weights in edges))


def _genes(space: Space, cell: str, term_weights: TermWeights) -> tuple[Gene, ...]:
    genes: list[Gene] = []
    for edges in space.node_slices():
        pairs = zip(space.cells[cell][edges], term_weights[edges], strict=True)
        best = [_strongest(names, weights, leave_out="none") for names, weights in pairs]
        # sorted is stable, so equal weights keep the order of the inputs
        inputs = sorted(range(len(best)), key=lambda j: -best[j][1])[:2]
        genes += [(best[j][0], j) for j in inputs]
    return tuple(genes)


def _strongest(names: Sequence[str], weights: Sequence[float], leave_out: str = "") -> tuple[str, float]:
    candidates = [pair for pair in zip(names, weights, strict=True) if pair[0] != leave_out]
    return max(candidates, key=lambda pair: pair[1])
