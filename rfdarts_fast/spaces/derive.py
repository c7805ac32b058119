"""From trained architecture weights to a genotype, by the published rules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rfdarts_fast.spaces.genotype import AnyGenotype, CellGenotype, Gene, Genotype
from rfdarts_fast.spaces.space import EdgePrimitives, Space

EdgeWeights = Sequence[Sequence[float]]


def derive(space: Space, weights: Mapping[str, EdgeWeights]) -> AnyGenotype:
    """The strongest genotype.

    Args:
        weights: cell type -> softmax weights [edges][primitives] of that cell's edges, in the space's order.
            PC-DARTS multiplies each edge's row by its edge weight first (alpha x beta).

    DARTS (quark0/darts model_search.py, `genotype`): each node keeps the two edges whose best primitive other
    than `none` weighs most, then on each the best primitive other than `none`. Ties go to the first.
    NAS-Bench-201 (AutoDL-Projects): the best primitive of each edge, `none` included.
    """
    if space.name == "nasbench201":
        best = [_best(names, row) for names, row in zip(space.cells["cell"], weights["cell"], strict=True)]
        return CellGenotype(tuple(best))
    concat = tuple(range(space.inputs, space.inputs + space.nodes))
    return Genotype(
        normal=_two_strongest(space, space.cells["normal"], weights["normal"]),
        normal_concat=concat,
        reduce=_two_strongest(space, space.cells["reduce"], weights["reduce"]),
        reduce_concat=concat,
    )


def _best(names: Sequence[str], row: Sequence[float]) -> str:
    return names[max(range(len(names)), key=lambda k: row[k])]


def _two_strongest(space: Space, primitives: EdgePrimitives, weights: EdgeWeights) -> tuple[Gene, ...]:
    genes: list[Gene] = []
    for edges in space.node_slices():
        candidates = []
        for j, (names, row) in enumerate(zip(primitives[edges], weights[edges], strict=True)):
            kept = [(name, w) for name, w in zip(names, row, strict=True) if name != "none"]
            name, weight = max(kept, key=lambda pair: pair[1])
            candidates.append((weight, name, j))
        # sorted is stable, so equal weights keep the order of the inputs
        strongest = sorted(candidates, key=lambda c: -c[0])[:2]
        genes += [(name, j) for _, name, j in strongest]
    return tuple(genes)
