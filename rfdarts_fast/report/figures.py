"""The common part of all figures: the library, the look, and files that are never seen half written."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rfdarts_fast.runs.config import require_package
from rfdarts_fast.runs.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Outside = Literal["outside lower center", "outside right center"]
"""Places of a legend."""
# by primitive: one colour in cells and curves; what has no parameters is warm (skip) or grey to green
_COLOURS = {
    "none": "#9aa0a6",
    "skip_connect": "#d1495b",
    "noise": "#8d6e63",
    "avg_pool_3x3": "#3a9e6f",
    "max_pool_3x3": "#8cbf3f",
    "nor_conv_1x1": "#6db1e0",
    "nor_conv_3x3": "#1f5fa8",
    "sep_conv_3x3": "#1f5fa8",
    "sep_conv_5x5": "#6db1e0",
    "dil_conv_3x3": "#6a3d9a",
    "dil_conv_5x5": "#b598d6",
}
_OTHERS = ("#e6a117", "#17becf", "#e377c2", "#7f7f7f")

STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    # the same figure gives the same file
    "svg.hashsalt": "rfdarts_fast",
}


def colour(primitive: str) -> str:
    """The colour of a primitive; others than the published ones share a few."""
    return _COLOURS.get(primitive) or _OTHERS[sum(primitive.encode()) % len(_OTHERS)]


def matplotlib() -> Any:
    """The package; ConfigError that names the extra if it is not installed."""
    modules = "matplotlib.figure", "matplotlib.patches"
    return require_package("figures", "matplotlib", "report", *modules)


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, Any]:
    """A figure of a size in inches, and its axes: an array [rows, columns]."""
    with matplotlib().rc_context(STYLE):
        figure = matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False)


def legend_outside(figure: Figure, axes: Any, loc: Outside, columns: int = 1) -> None:
    """One legend for these axes, each name once, outside them."""
    handles = {}
    for axis in axes:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            handles[name] = handle
    options = {"ncols": columns, "fontsize": 8, "frameon": False}
    figure.legend(list(handles.values()), list(handles), loc=loc, **options)


def rendered(figure: Figure, file_format: str) -> bytes:
    """The bytes of an svg or png file."""
    content = io.BytesIO()
    with matplotlib().rc_context(STYLE):
        metadata = {"Date": None} if file_format == "svg" else None
        figure.savefig(content, format=file_format, dpi=150, bbox_inches="tight", metadata=metadata)
    return content.getvalue()


def write_figures(folder: Path, figures: dict[str, Figure]) -> list[Path]:
    """Writes each figure as NAME.svg and NAME.png; the files."""
    files = []
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        for file_format in ("svg", "png"):
            files.append(folder / f"{name}.{file_format}")
            write_atomic(files[-1], rendered(figure, file_format))
    return files
