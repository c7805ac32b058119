"""A study shown: as text, as figures, as a page."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rfdarts_fast.report.figures import legend_outside, new_figure, write_figures
from rfdarts_fast.report.page import Section, page
from rfdarts_fast.report.show import Shown
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.files import write_text
from rfdarts_fast.study.summary import StudyResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TITLES = {
    "test": "test accuracy after training (%)",
    "table": "test accuracy in the table (%)",
    "val": "validation accuracy of the supernet (%)",
    "skips": "skip connections in the genotype",
    "parameter_free": "operations without parameters",
}
_GROUPS = ("group", "runs", "mean", "sd", "best", "median rank")
_PAIRS = ("second - first", "measure", "seeds", "difference", "95 % interval")
_RUNS = ("run", "epochs", "test %", "val %", "table %", "rank", "skips", "rule", "genotype")
_COLOURS = ("#1f5fa8", "#d1495b", "#3a9e6f", "#e6a117", "#6a3d9a", "#17becf", "#8d6e63", "#7f7f7f")


# title, heading, rows
NamedTable = tuple[str, tuple[str, ...], list[tuple[str, ...]]]


class ShownStudy(Shown):
    """The groups of a study beside each other."""

    def __init__(self, study: StudyResults) -> None:
        self._study = study
        done = sum(row.finished for row in study.rows)
        self._state = f"{done} of {len(study.rows)} runs finished"

    def text(self) -> str:
        parts = [f"study {self._study.name} in {self._study.path}: {self._state}"]
        for title, heading, rows in self._tables():
            parts.append(f"{title}\n{_aligned([heading, *rows])}")
        errors = [f"{row.folder}: {row.error}" for row in self._study.rows if row.error]
        return "\n\n".join([*parts, *(["failed\n" + "\n".join(errors)] if errors else [])])

    def _tables(self) -> list[NamedTable]:
        groups = self._study.groups()
        tables: list[NamedTable] = []
        for measure in self._study.measures():
            rows = [
                (g.group, str(g.runs), *map(_number, (g.mean, g.deviation, g.best)), _rank(g.median_rank))
                for g in groups
                if g.measure == measure
            ]
            # of numbers that come without a table there are no ranks
            width = len(_GROUPS) if any(row[-1] != "-" for row in rows) else len(_GROUPS) - 1
            tables.append((_TITLES[measure], _GROUPS[:width], [row[:width] for row in rows]))
        pairs: list[tuple[str, ...]] = [
            (
                f"{p.second} - {p.first}", _TITLES[p.measure], str(p.seeds), f"{p.difference:+.2f}",
                "-" if p.low is None or p.high is None else f"{p.low:+.2f} to {p.high:+.2f}",
            )
            for p in self._study.pairs()
        ]  # fmt: skip
        runs: list[tuple[str, ...]] = [
            (
                row.folder, f"{row.epochs}{'' if row.finished else ' so far'}", _number(row.test),
                _number(row.val), _number(row.table), _number(row.rank), _number(row.skips),
                row.genotype_rule or "-", row.genotype or "-",
            )
            for row in self._study.rows
        ]  # fmt: skip
        pair_title = "paired over the seeds that both groups have; Student's t"
        if pairs:
            tables.append((pair_title, _PAIRS, pairs))
        return [*tables, ("runs", _RUNS, runs)]

    def figures(self) -> dict[str, Figure]:
        measures, groups = self._study.measures(), list(dict.fromkeys(row.group for row in self._study.rows))
        figures = {}
        if measures:
            figure, axes = new_figure(
                3.8 * len(measures) + 1.2, 0.45 * len(groups) + 1.2, columns=len(measures)
            )
            for axis, measure in zip(axes[0], measures, strict=True):
                _strip(axis, _TITLES[measure], self._study.by_group(measure), groups)
            for axis in axes[0][1:]:
                axis.set_yticklabels([])
            figures["groups"] = figure
        courses = self._courses()
        if courses:
            figure, axes = new_figure(4.6 * len(courses), 3.2, columns=len(courses))
            for axis, (title, lines) in zip(axes[0], courses.items(), strict=True):
                for group, line in lines:
                    k = groups.index(group)
                    axis.plot(line, color=_COLOURS[k % len(_COLOURS)], alpha=0.8, linewidth=1.2, label=group)
                axis.set_title(title, loc="left", fontsize=9.5)
                axis.set_xlabel("epoch")
                axis.xaxis.get_major_locator().set_params(integer=True)
            legend_outside(figure, axes[0, :1], "outside lower center", columns=4)
            figures["courses"] = figure
        return figures

    def _courses(self) -> dict[str, list[tuple[str, np.ndarray]]]:
        """Title -> a line over the epochs for each run."""
        courses: dict[str, list[tuple[str, np.ndarray]]] = {}
        for row in self._study.rows:
            run = self._study.runs.get(row.folder)
            names = {_TITLES["skips"]: "skip_connects", _TITLES["val"]: "val/accuracy"}
            if row.table_dataset:
                names = {_TITLES["table"]: f"table/{row.table_dataset}/test", **names}
            for title, name in names.items():
                if run is not None and name in run.metrics:
                    courses.setdefault(title, []).append((row.group, run.metrics[name]))
        return courses

    def page(self) -> str:
        sections = [
            Section(title[:1].upper() + title[1:], heading=h, table=rows) for title, h, rows in self._tables()
        ]
        for name, figure in self.figures().items():
            title = {"groups": "Groups: each run and the mean", "courses": "Every run over its epochs"}[name]
            sections.insert(0 if name == "groups" else 1, Section(title, figures={name: figure}))
        errors = [(row.folder, row.error) for row in self._study.rows if row.error]
        if errors:
            sections.append(Section("Failed", table=errors))
        return page(f"study: {self._study.name}", f"{self._state}; written by rfdarts show", sections)


def _strip(axis: Any, title: str, values: dict[str, dict[int, float]], groups: list[str]) -> None:
    """A row of points for each group, a line at their mean."""
    for k, group in enumerate(groups):
        points = list(values.get(group, {}).values())
        line_colour = _COLOURS[k % len(_COLOURS)]
        axis.scatter(points, [k] * len(points), color=line_colour, alpha=0.7, s=22, zorder=3)
        if points:
            axis.plot([np.mean(points)] * 2, [k - 0.3, k + 0.3], color=line_colour, linewidth=2)
    axis.set_yticks(range(len(groups)), groups)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.set_title(title, loc="left", fontsize=9.5)


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def _rank(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _aligned(rows: list[tuple[str, ...]]) -> str:
    """Columns of texts; the last one is as long as it is."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(f"{text:{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def write_summary(study: StudyResults) -> list[Path]:
    """Writes summary.txt, .csv and .json into the study's folder, and figures where matplotlib is there."""
    shown = ShownStudy(study)
    texts = {"txt": shown.text() + "\n", "csv": study.to_csv(), "json": study.to_json()}
    files = []
    for suffix, text in texts.items():
        files.append(study.path / f"summary.{suffix}")
        write_text(files[-1], text)
    # without the extra `report`, which `rfdarts show` will name
    with contextlib.suppress(ConfigError):
        files += write_figures(study.path / "figures", shown.figures())
    return files
