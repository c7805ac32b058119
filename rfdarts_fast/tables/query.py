"""The answer to a question about a table, as text."""

from __future__ import annotations

from collections.abc import Sequence

from rfdarts_fast.data import DataError
from rfdarts_fast.messages import shown
from rfdarts_fast.spaces import AnyGenotype, CellGenotype, parse
from rfdarts_fast.tables.table import Table


def described(table: Table, genotype: AnyGenotype, datasets: Sequence[str], ranked: bool) -> str:
    """A cell's accuracies, a line for each data set, with its ranks if so asked; DataError if it has none."""
    if not isinstance(genotype, CellGenotype):
        raise DataError(f"cell: expected a NAS-Bench-201 cell string, got {shown(str(genotype))}")
    accuracies = table.accuracies(genotype)
    lines = [f"{genotype}  index {table.cells[str(genotype)]}"]
    heading = f"{'percent':12}{'valid':>10}{'test':>10}"
    lines.append(heading + (f"    rank by test, of {len(table.cells):,}" if ranked else ""))
    for dataset in datasets:
        values = [accuracies.get(f"{dataset}_{part}") for part in ("valid", "test")]
        columns = "".join(f"{'-' if value is None else f'{value:.4f}':>10}" for value in values)
        rank = f"{table.rank(genotype, dataset):>8,}" if ranked else ""
        lines.append(f"{dataset:12}{columns}{rank}")
    return "\n".join(lines)


def best(table: Table, datasets: Sequence[str], ranked: bool) -> str:
    """The cell of the highest test accuracy on each of the data sets."""
    cells = {dataset: parse(table.best(dataset)) for dataset in datasets}
    return "\n\n".join(
        f"best on {dataset}\n{described(table, cell, datasets, ranked)}" for dataset, cell in cells.items()
    )
