"""Search spaces as data: which primitives compete on which edge. `register_space` adds one.

Sources: DARTS, quark0/darts cnn/genotypes.py; S1 to S4, automl/RobustDARTS src/spaces.py; NAS-Bench-201,
D-X-Y/AutoDL-Projects xautodl/models/cell_operations.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rfdarts_fast.spaces.derive import (
    GenotypeRule,
    TermWeights,
    strongest_primitives,
    strongest_without_none,
    two_strongest_edges,
)
from rfdarts_fast.spaces.genotype import AnyGenotype, CellGenotype, Genotype

EdgePrimitives = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Family:
    """Spaces whose cells stand in the same networks and whose results have the same form.

    Attributes:
        name: key of its supernet in `search/build.py`.
        inputs: states that enter a cell.
        cells: its cell types.
        genotype: the form of its results; the derived network follows from it (`retrain/run.py`).
        rules: by name, what derives a genotype; see `derive`. Each family has "published".
        nodes: states that a cell computes, where the family fixes it.
    """

    name: str
    inputs: int
    cells: tuple[str, ...]
    genotype: type[AnyGenotype]
    rules: Mapping[GenotypeRule, Callable[[Space, Mapping[str, TermWeights]], AnyGenotype]]
    nodes: int | None = None


DARTS = Family("darts", 2, ("normal", "reduce"), Genotype, {"published": two_strongest_edges})
"""DARTS and its variants: pairs of cells, two inputs, two edges kept for each node."""
NASBENCH201 = Family(
    "nasbench201",
    1,
    ("cell",),
    CellGenotype,
    {"published": strongest_primitives, "without-none": strongest_without_none},
    nodes=3,
)
"""NAS-Bench-201: one cell of three nodes, all six edges kept."""


@dataclass(frozen=True)
class Space:
    """One search space.

    Attributes:
        name: the choice of `--space`.
        nodes: states that a cell computes.
        cells: cell type -> the candidate primitives of each edge. Edges are ordered by node, then by input;
            node i takes inputs 0 .. i + inputs - 1. All edges of a cell type have equally many candidates.
        family: the networks around the cells, and the rule that derives a genotype.

    Raises:
        ValueError: if `cells` do not fit the nodes and the family.
    """

    name: str
    nodes: int
    cells: dict[str, EdgePrimitives]
    family: Family = DARTS

    def __post_init__(self) -> None:
        self._require(self.name.replace("-", "_").isidentifier(), "a name of letters and digits")
        nodes = self.family.nodes or self.nodes
        self._require(self.nodes == nodes >= 1, f"{max(nodes, 1)} nodes, got {self.nodes}")
        self._require(
            set(self.cells) == set(self.family.cells),
            f"the cells {', '.join(self.family.cells)}, got {', '.join(self.cells)}",
        )
        for cell, edges in self.cells.items():
            self._require(
                len(edges) == self.num_edges, f"{self.num_edges} edges in cells[{cell!r}], got {len(edges)}"
            )
            for names in edges:
                self._require(
                    isinstance(names, tuple)
                    and len(names) == len(set(names)) == len(edges[0])
                    and names != ("none",),
                    f"tuples of {len(edges[0])} different primitives in cells[{cell!r}], not `none` alone, "
                    f"got {names!r}",
                )

    def _require(self, condition: bool, expected: str) -> None:
        if not condition:
            raise ValueError(f"space {self.name!r}: expected {expected}")

    @property
    def inputs(self) -> int:
        """States that enter a cell."""
        return self.family.inputs

    @property
    def num_edges(self) -> int:
        return sum(self.inputs + i for i in range(self.nodes))

    def node_slices(self) -> list[slice]:
        """The edges that enter each node, as slices of the edge list."""
        slices, start = [], 0
        for i in range(self.nodes):
            slices.append(slice(start, start + self.inputs + i))
            start += self.inputs + i
        return slices

    def primitives(self) -> tuple[str, ...]:
        """All candidates, each once."""
        return tuple(
            dict.fromkeys(name for edges in self.cells.values() for names in edges for name in names)
        )


SPACES: dict[str, Space] = {}
"""Registered spaces by name."""


def register_space(space: Space) -> None:
    """Makes `space` a choice of `--space`, and its primitives known to `parse`.

    Raises:
        ValueError: if there is a space of that name.
    """
    if space.name in SPACES:
        raise ValueError(f"space: expected a new name, got {space.name!r}, which is registered")
    SPACES[space.name] = space


def get_space(name: str) -> Space:
    """The space called `name`; ValueError if there is none."""
    if name not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(SPACES)}, got {name!r}")
    return SPACES[name]


def uniform_space(name: str, primitives: tuple[str, ...], nodes: int = 4) -> Space:
    """A space of the DARTS family with the same candidates on every edge of both cells."""
    edges = (primitives,) * sum(DARTS.inputs + i for i in range(nodes))
    return Space(name, nodes, {"normal": edges, "reduce": edges})


SHORT_NAMES = {
    "skip": "skip_connect",
    "max": "max_pool_3x3",
    "avg": "avg_pool_3x3",
    "sep3": "sep_conv_3x3",
    "sep5": "sep_conv_5x5",
    "dil3": "dil_conv_3x3",
    "dil5": "dil_conv_5x5",
}
"""Primitives by the words for them in the tables of spaces and published genotypes."""


def _edges(table: str) -> EdgePrimitives:
    return tuple(tuple(SHORT_NAMES[word] for word in edge.split()) for edge in table.split(","))


DARTS_PRIMITIVES = (
    "none",
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
"""Candidates in the DARTS space (quark0/darts genotypes.py)."""
NASBENCH201_PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
"""Candidates in NAS-Bench-201 (AutoDL-Projects)."""

register_space(uniform_space("darts", DARTS_PRIMITIVES))
register_space(
    Space(
        "s1",
        nodes=4,
        cells={
            "normal": _edges(
                "skip dil3,skip dil5,"
                "skip dil5,skip sep3,skip dil3,"
                "max skip,skip sep3,skip sep3,skip dil3,"
                "skip sep3,max skip,skip dil3,dil3 dil5,dil3 dil5"
            ),
            "reduce": _edges(
                "max avg,max dil3,"
                "max avg,max avg,skip dil5,"
                "max avg,max sep3,skip dil3,skip dil5,"
                "max avg,max avg,skip dil5,skip dil5,skip dil5"
            ),
        },
    )
)
register_space(uniform_space("s2", ("skip_connect", "sep_conv_3x3")))
register_space(uniform_space("s3", ("none", "skip_connect", "sep_conv_3x3")))
register_space(uniform_space("s4", ("noise", "sep_conv_3x3")))
register_space(Space("nasbench201", 3, {"cell": (NASBENCH201_PRIMITIVES,) * 6}, NASBENCH201))
