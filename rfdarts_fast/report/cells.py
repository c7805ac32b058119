"""Cells as drawings: states on a line, an arc for each primitive between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rfdarts_fast.report.figures import colour, matplotlib, new_figure
from rfdarts_fast.spaces import AnyGenotype, CellGenotype

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# (from, to, primitive)
Edge = tuple[int, int, str]

_RADIUS = 0.17


def draw_genotype(genotype: AnyGenotype) -> Figure:
    """A figure of the cell, or of the normal and the reduction cell one below the other.

    Arcs are the primitives on edges from state to state; an edge of `none` is left out.
    """
    if isinstance(genotype, CellGenotype):
        pairs = [(source, target) for target in (1, 2, 3) for source in range(target)]
        edges = [(*pair, op) for pair, op in zip(pairs, genotype.edges, strict=True)]
        figure, axes = new_figure(6.4, 3.2)
        _draw(axes[0, 0], ["input", "1", "2", "output"], edges, set())
        return figure
    figure, axes = new_figure(9.6, 7.6, rows=2)
    for axis, cell in zip(axes[:, 0], ("normal", "reduce"), strict=True):
        genes, concat = getattr(genotype, cell), set(getattr(genotype, f"{cell}_concat"))
        names = ["c(k-2)", "c(k-1)", *map(str, range(len(genes) // 2))]
        _draw(axis, names, [(j, k // 2 + 2, op) for k, (op, j) in enumerate(genes)], concat)
        axis.set_title(f"{cell} cell (shaded states make its output)")
    return figure


def _draw(axis: Any, names: Sequence[str], edges: Sequence[Edge], concat: set[int]) -> None:
    patches = matplotlib().patches
    circles = []
    for k, name in enumerate(names):
        inside = "#ffe8b0" if k in concat else "white"
        circle = patches.Circle((k, 0), _RADIUS, facecolor=inside, edgecolor="#444444", zorder=4)
        circles.append(axis.add_patch(circle))
        axis.text(k, 0, name, ha="center", va="center", fontsize=8, zorder=5)
    heights = [-0.5, 0.5]
    for k, (source, target, op) in enumerate(edges):
        if op == "none":
            continue
        span = target - source
        # every other edge goes below the line; longer ones leave room for the labels of shorter ones
        height = (-1 if k % 2 else 1) * (0.1 + 0.22 * span)
        heights.append(height)
        axis.add_patch(
            patches.FancyArrowPatch(
                (source, 0), (target, 0), patchA=circles[source], patchB=circles[target], shrinkA=0,
                # a curve rises half as high as its control point
                connectionstyle=f"arc3,rad={-2 * height / span}", arrowstyle="-|>", mutation_scale=12,
                linewidth=1.6, color=colour(op), zorder=1, linestyle="--" if op == "skip_connect" else "-",
            )
        )  # fmt: skip
        axis.text(
            (source + target) / 2, height, op, ha="center", va="center", fontsize=8, color="white", zorder=3,
            bbox={"boxstyle": "round,pad=0.25", "facecolor": colour(op), "edgecolor": "white"},
        )  # fmt: skip
    limits = min(heights) - 0.15, max(heights) + 0.15
    axis.set(xlim=(-0.3, len(names) - 0.7), ylim=limits, aspect="equal", anchor="W")
    axis.axis("off")
