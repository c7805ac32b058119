"""Figures of a run over its epochs: learning curves, architecture weights, diagnostics."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from rfdarts_fast.report.figures import colour, legend_outside, new_figure
from rfdarts_fast.results import RunResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = {"train": "#1f5fa8", "arch": "#e6a117", "val": "#d1495b", "test": "#d1495b"}
_NAMES = {"train": "training", "arch": "architecture's batches", "val": "validation", "test": "test"}


def learning_curves(run: RunResults) -> Figure:
    """Loss and accuracy over the epochs, of all sets of images that the run has measured."""
    figure, axes = new_figure(8.4, 2.9, columns=2)
    for axis, quantity, unit in zip(axes[0], ("loss", "accuracy"), ("nats", "%"), strict=True):
        series = {
            _NAMES[part]: (run.metrics[f"{part}/{quantity}"], line_colour)
            for part, line_colour in _LINES.items()
            if f"{part}/{quantity}" in run.metrics
        }
        _panel(axis, f"{quantity} ({unit})", series)
    return figure


def mean_weights(run: RunResults) -> Figure:
    """The softmax of the alphas by primitive, a mean over the edges of each cell type that have it."""
    cells = run.space.cells
    figure, axes = new_figure(4.2 * len(cells) + 1.6, 3.1, columns=len(cells))
    for axis, (cell, edges) in zip(axes[0], cells.items(), strict=True):
        weights = run.op_weights(cell)
        by_name: dict[str, list[np.ndarray]] = {}
        for edge, names in enumerate(edges):
            for k, name in enumerate(names):
                by_name.setdefault(name, []).append(weights[:, edge, k])
        title = (
            f"mean weight of each primitive, {cell}" if len(cells) > 1 else "mean weight of each primitive"
        )
        _panel(axis, title, {n: (np.mean(v, axis=0), colour(n)) for n, v in by_name.items()}, legend=False)
    legend_outside(figure, axes[0], "outside right center")
    return figure


def edge_weights(run: RunResults, cell: str) -> Figure:
    """The softmax of the alphas of every edge of a cell type, a small panel each."""
    weights, edges = run.op_weights(cell), run.space.cells[cell]
    columns = 3 if len(edges) <= 6 else 5
    rows = math.ceil(len(edges) / columns)
    figure, axes = new_figure(2.0 * columns + 1.6, 1.5 * rows + 0.3, rows, columns)
    pairs = [
        (node + run.space.inputs, source)
        for node, edges_in in enumerate(run.space.node_slices())
        for source in range(edges_in.stop - edges_in.start)
    ]
    for edge, axis in enumerate(axes.flat):
        if edge >= len(edges):
            axis.axis("off")
            continue
        series = {name: (weights[:, edge, k], colour(name)) for k, name in enumerate(edges[edge])}
        _panel(axis, f"state {pairs[edge][1]} to {pairs[edge][0]}", series, legend=False, label=False)
        axis.set_ylim(0, float(weights.max()) * 1.05)
    legend_outside(figure, axes.flat, "outside right center")
    return figure


def diagnostics(run: RunResults) -> Figure:
    """A panel for each diagnostic that a search has measured."""
    panels = {title: series for title, series in _diagnostics(run).items() if series}
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(3.6 * columns, 2.6 * rows, rows, columns)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (title, series) in zip(axes.flat, panels.items(), strict=False):
        _panel(axis, title, series)
    return figure


def _diagnostics(run: RunResults) -> dict[str, dict[str, Any]]:
    def named(prefix: str, suffix: str = "", label: str = "", coloured: bool = False) -> dict[str, Any]:
        """Label -> values and colour of the metrics PREFIX LABEL SUFFIX, or of the one called so."""
        series = {
            label or name.removeprefix(prefix).removesuffix(suffix): values
            for name, values in run.metrics.items()
            if name.startswith(prefix) and name.endswith(suffix) and np.isfinite(values).any()
        }
        return {name: (values, colour(name) if coloured else None) for name, values in series.items()}

    panels = {
        "entropy of the weights (nats)": named("entropy/"),
        "operations in the genotype": {
            **named("skip_connects", label="skip connections"),
            **named("parameter_free_ops", label="without parameters"),
        },
        "table: test accuracy of the cell (%)": named("table/", "/test"),
        "Kendall's tau, supernet and table": named("diagnostics/kendall_tau"),
        "largest Hessian eigenvalue in alpha": named("diagnostics/hessian_eigenvalue"),
        "accuracy, batch statistics (%)": named("diagnostics/", "_accuracy"),
        "mean |gamma| of the last BatchNorm": named("gamma/", "/mean", coloured=True),
    }
    for cell in run.space.cells:
        panels[f"norm of alpha's gradient, {cell}"] = named(f"alpha_gradient/{cell}/", coloured=True)
    return panels


def _panel(
    axis: Any,
    title: str,
    series: Mapping[str, tuple[np.ndarray, str | None]],
    legend: bool = True,
    label: bool = True,
) -> None:
    """Draws label -> (values at epochs 0, 1, ..., colour); epochs without a value are left out."""
    for name, (values, line_colour) in series.items():
        there = np.isfinite(values)
        marker = "o" if there.sum() < 12 else None
        axis.plot(
            np.flatnonzero(there), values[there], color=line_colour, label=name, marker=marker, markersize=3
        )
    axis.set_title(title, loc="left", fontsize=9.5)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.margins(x=0.02)
    if label:
        axis.set_xlabel("epoch")
    if legend and list(series) != [""]:
        axis.legend(fontsize=7, frameon=False)
