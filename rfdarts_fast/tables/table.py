"""A table of accuracies, whatever file it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from rfdarts_fast.data import DataError
from rfdarts_fast.messages import shown
from rfdarts_fast.spaces import AnyGenotype

DATASETS = ("cifar10", "cifar100", "imagenet16")
"""Data sets of NAS-Bench-201; imagenet16 is ImageNet16-120."""


class Table(ABC):
    """Accuracies in percent of cells that the benchmark has trained: 200 epochs, mean over its seeds.

    Cells are looked up by their string, as the benchmark does: it trained isomorphic cells apart, so that
    each has accuracies of its own. Columns are named `<data set>_valid` and `<data set>_test`; what is for
    cifar10 was trained on all 50,000 images for test, and on the first part of its split for valid.

    Attributes:
        path: the file or folder.
        cells: the index of each cell in the benchmark, by its string; those that the table has.
    """

    def __init__(self, path: Path, cells: dict[str, int]) -> None:
        self.path = path
        self.cells = cells
        self._places = {cell: place for place, cell in enumerate(cells)}

    @abstractmethod
    def accuracies(self, cell: str | AnyGenotype) -> dict[str, float]:
        """The cell's accuracies by column; DataError for a cell that the table lacks."""

    @abstractmethod
    def column(self, name: str) -> np.ndarray:
        """The accuracies of all cells, in the order of `cells`; DataError for a column that it lacks."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """The data sets that the table has test accuracies of."""
        return tuple(dataset for dataset in DATASETS if f"{dataset}_test" in self.columns)

    def rank(self, cell: str | AnyGenotype, dataset: str) -> int:
        """1 + the number of cells whose test accuracy on the data set is higher."""
        column = self.column(f"{dataset}_test")
        return 1 + int((column > column[self._place(cell)]).sum())

    def best(self, dataset: str) -> str:
        """The cell of the highest test accuracy on the data set."""
        return list(self.cells)[int(self.column(f"{dataset}_test").argmax())]

    def entry(self, cell: str | AnyGenotype) -> dict[str, dict[str, float]]:
        """The cell's test accuracy and rank by data set, of those that the table has."""
        accuracies = self.accuracies(cell)
        return {
            dataset: {"test": accuracies[f"{dataset}_test"], "rank": self.rank(cell, dataset)}
            for dataset in self.datasets
        }

    def _index(self, cell: str | AnyGenotype) -> int:
        if str(cell) not in self.cells:
            raise DataError(
                f"cell: expected one of the {len(self.cells):,} in {self.path}, got {shown(str(cell), 120)}"
            )
        return self.cells[str(cell)]

    def _place(self, cell: str | AnyGenotype) -> int:
        self._index(cell)
        return self._places[str(cell)]
