"""A run or a genotype shown: as text, as figures, as a page."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from rfdarts_fast.nn.counting import CONVENTION
from rfdarts_fast.report import curves
from rfdarts_fast.report.cells import draw_genotype
from rfdarts_fast.report.counts import count_genotype
from rfdarts_fast.report.page import Section, page
from rfdarts_fast.results import RunResults
from rfdarts_fast.runs.lock import HOLDER, describe
from rfdarts_fast.spaces import AnyGenotype, CellGenotype
from rfdarts_fast.tables import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = tuple[str, str]


def genotype_rows(genotype: AnyGenotype, table: Table | None = None) -> list[Row]:
    """The genotype, what is in it, its size, and its entry in a table."""
    ops = genotype.ops()
    counts = {op: ops.count(op) for op in sorted(set(ops), key=lambda op: (-ops.count(op), op))}
    rows = [
        ("genotype", str(genotype)),
        ("operations", ", ".join(f"{count} {op}" for op, count in counts.items())),
        *(("network", f"{count} multiply-adds") for count in count_genotype(genotype)),
        ("convention", CONVENTION),
    ]
    if table is not None and isinstance(genotype, CellGenotype):
        entry = table.entry(genotype)
        rows += [
            ("table", f"{dataset} {e['test']:.2f}% test, rank {e['rank']:,.0f} of {len(table.cells):,}")
            for dataset, e in entry.items()
        ]
    return rows


def run_rows(run: RunResults, table: Table | None = None) -> list[Row]:
    """A run in a few lines: what it is, how far it is, and the last epoch's measurements."""
    config = run.config
    what = [str(config[name]) for name in ("method", "space", "preset", "dataset") if config.get(name)]
    rows = [
        ("run", f"{run.path}: {run.command} {', '.join(what)}, seed {config.get('seed')}"),
        ("epochs", f"{len(run.records)} of {run.epochs}, {_state(run)}"),
    ]
    last = run.records[-1] if run.records else {}
    for part in ("train", "val", "test"):
        if last.get(part):
            values = f"accuracy {last[part]['accuracy']:.2f}%, loss {last[part]['loss']:.3f}"
            rows.append((part, f"{values} in epoch {last['epoch']}"))
    if run.result is not None:
        best = f"{run.result['best_accuracy']:.2f}% in epoch {run.result['best_epoch']}"
        rows.append(("result", f"test accuracy {run.result['test_accuracy']:.2f}%, best {best}"))
    for name, unit in _LAST.items():
        there = [(epoch, value) for epoch, value in enumerate(run.metrics.get(name, [])) if value == value]
        if there:
            epoch, value = there[-1]
            rows.append((name.rpartition("/")[2].replace("_", " "), f"{value:.4g}{unit} in epoch {epoch}"))
    if run.genotype is not None:
        rule = last.get("genotype_rule")
        rows += [("rule", rule)] if rule else []
        rows += genotype_rows(run.genotype, table)
        noted = None if table is not None else last.get("table")
        rows += [
            ("table", f"{d} {e['test']:.2f}% test, rank {e['rank']:,}") for d, e in (noted or {}).items()
        ]
    return rows


# metrics of searches whose last value is worth a line
_LAST = {
    "skip_connects": "",
    "parameter_free_ops": "",
    "diagnostics/hessian_eigenvalue": "",
    "diagnostics/discretisation_gap": "%",
    "diagnostics/kendall_tau": "",
}


def _state(run: RunResults) -> str:
    if run.finished:
        return "finished"
    if (run.path / HOLDER).exists():
        return f"run by {describe(run.path)}, if that still goes on"
    return "not running; the same command resumes"


class Shown(ABC):
    """Something that can be shown in three ways."""

    @abstractmethod
    def text(self) -> str:
        """Lines for a terminal."""

    @abstractmethod
    def figures(self) -> dict[str, Figure]:
        """All figures by name. Needs the extra `report`, as the page does."""

    @abstractmethod
    def page(self) -> str:
        """One HTML text."""


class ShownGenotype(Shown):
    """A genotype, drawn and counted."""

    def __init__(self, genotype: AnyGenotype, name: str, table: Table | None = None) -> None:
        self._genotype, self._name = genotype, name
        self._rows = genotype_rows(genotype, table)

    def text(self) -> str:
        return as_text(self._rows)

    def figures(self) -> dict[str, Figure]:
        return {"cell": draw_genotype(self._genotype)}

    def page(self) -> str:
        sections = [Section("Summary", table=self._rows), Section("Cell", figures=self.figures())]
        return page(self._name, "written by rfdarts show", sections)


class ShownRun(Shown):
    """A search or a training, finished or not."""

    def __init__(self, run: RunResults, table: Table | None = None) -> None:
        self._run = run
        self._rows = run_rows(run, table)

    def text(self) -> str:
        return as_text(self._rows)

    def figures(self) -> dict[str, Figure]:
        run, figures = self._run, {}
        if run.genotype is not None:
            figures["cell"] = draw_genotype(run.genotype)
        if run.records:
            figures["learning_curves"] = curves.learning_curves(run)
        if run.alphas:
            figures["weights"] = curves.mean_weights(run)
            figures |= {f"weights_{cell}": curves.edge_weights(run, cell) for cell in run.space.cells}
            figures["diagnostics"] = curves.diagnostics(run)
        return figures

    def page(self) -> str:
        run = self._run
        sections = [Section("Summary", table=self._rows)]
        for name, figure in self.figures().items():
            title = _TITLES.get(name, name.replace("weights_", "Weights on each edge: "))
            sections.append(Section(title, figures={name: figure}))
        options = [(name, "default" if value is None else str(value)) for name, value in run.config.items()]
        sections.append(Section("Options", table=options, folded=True))
        if run.starts:
            rows = [
                (name, ", ".join(map(str, value)) if isinstance(value, list) else value)
                for name, value in run.starts[-1].items()
            ]
            sections.append(Section("Environment of the last start", table=rows, folded=True))
        state = "finished" if run.finished else f"{len(run.records)} of {run.epochs} epochs so far"
        return page(f"{run.command}: {run.path.name}", f"{state}; written by rfdarts show", sections)


_TITLES = {
    "cell": "Cell",
    "learning_curves": "Learning curves",
    "weights": "Architecture weights",
    "diagnostics": "Diagnostics",
}


def as_text(rows: list[Row]) -> str:
    """The rows as lines of a terminal; a name that repeats is given once."""
    width = max(len(name) for name, _ in rows) + 2
    before = ["", *(name for name, _ in rows)]
    return "\n".join(
        f"{'' if name == last else name:{width}}{text}"
        for last, (name, text) in zip(before, rows, strict=False)
    )
