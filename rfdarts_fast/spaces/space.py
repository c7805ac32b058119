"""Search spaces as data: which primitives compete on which edge.

Sources: DARTS, quark0/darts cnn/genotypes.py; S1 to S4, automl/RobustDARTS src/spaces.py; NAS-Bench-201,
D-X-Y/AutoDL-Projects xautodl/models/cell_operations.py.
"""

from __future__ import annotations

from dataclasses import dataclass

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
NASBENCH201_PRIMITIVES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")

# primitives without a convolution, counted to see a search collapse
PARAMETER_FREE = frozenset({"none", "noise", "max_pool_3x3", "avg_pool_3x3", "skip_connect"})

EdgePrimitives = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Space:
    """One search space.

    Attributes:
        name: what `--space` calls it.
        inputs: states that enter a cell (2 in the DARTS family, 1 in NAS-Bench-201).
        nodes: states that a cell computes.
        cells: cell type -> the candidate primitives of each edge. Edges are ordered by node, then by input;
            node i takes inputs 0 .. i + inputs - 1. All edges of one cell type have equally many candidates.
    """

    name: str
    inputs: int
    nodes: int
    cells: dict[str, EdgePrimitives]

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


def _uniform(name: str, primitives: tuple[str, ...]) -> Space:
    edges = (primitives,) * 14
    return Space(name, inputs=2, nodes=4, cells={"normal": edges, "reduce": edges})


def _edges(table: str) -> EdgePrimitives:
    names = {
        "skip": "skip_connect",
        "max": "max_pool_3x3",
        "avg": "avg_pool_3x3",
        "sep3": "sep_conv_3x3",
        "dil3": "dil_conv_3x3",
        "dil5": "dil_conv_5x5",
    }
    return tuple(tuple(names[word] for word in edge.split()) for edge in table.split(","))


_S1 = Space(
    "s1",
    inputs=2,
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

SPACES: dict[str, Space] = {
    space.name: space
    for space in (
        _uniform("darts", DARTS_PRIMITIVES),
        _S1,
        _uniform("s2", ("skip_connect", "sep_conv_3x3")),
        _uniform("s3", ("none", "skip_connect", "sep_conv_3x3")),
        _uniform("s4", ("noise", "sep_conv_3x3")),
        Space("nasbench201", inputs=1, nodes=3, cells={"cell": (NASBENCH201_PRIMITIVES,) * 6}),
    )
}


def get_space(name: str) -> Space:
    """The space called `name`; ValueError if there is none."""
    if name not in SPACES:
        raise ValueError(f"space: expected one of {', '.join(SPACES)}, got {name!r}")
    return SPACES[name]
