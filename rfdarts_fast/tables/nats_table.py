"""The official files of NATS-Bench's topology space, read by their own package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rfdarts_fast.data import DataError
from rfdarts_fast.messages import reason
from rfdarts_fast.spaces import AnyGenotype
from rfdarts_fast.tables.table import Table

_META = "meta.pickle.pbz2"
# column -> the benchmark's name of the data set, and of the accuracy
_COLUMNS = {
    "cifar10_valid": ("cifar10-valid", "valid-accuracy"),
    "cifar10_test": ("cifar10", "test-accuracy"),
    "cifar100_valid": ("cifar100", "valid-accuracy"),
    "cifar100_test": ("cifar100", "test-accuracy"),
    "imagenet16_valid": ("ImageNet16-120", "valid-accuracy"),
    "imagenet16_test": ("ImageNet16-120", "test-accuracy"),
}


def is_nats(path: Path) -> bool:
    """True for a NATS-Bench file, or a folder that has one for each cell."""
    return path.name.endswith(".pickle.pbz2") or (path / _META).is_file()


class NatsTable(Table):
    """NATS-tss-v1_0-3ffb9-simple, a folder with a file for each cell, or NATS-tss-v1_0-3ffb9.pickle.pbz2.

    The files are pickles: nats_bench executes what they say. A folder is read cell by cell, and all of it (a
    fiftieth of a second a cell) for a rank. Raises DataError if the package is missing or a file is damaged.
    """

    def __init__(self, path: Path) -> None:
        try:
            from nats_bench import create
        except ImportError:
            raise DataError(
                "table: expected the package nats_bench for NATS-Bench files, which is not installed "
                "(pip install 'rfdarts_fast[nasbench]')"
            ) from None
        folder = path.is_dir()
        self._expected = f"table: {path}: expected NATS-Bench files of the topology space"
        self._api: Any = self._read(lambda: create(str(path), "tss", fast_mode=folder, verbose=False))
        there = {int(file.name.split(".")[0]) for file in path.glob("[0-9]*.pickle.pbz2")} if folder else None
        cells = {
            cell: index
            for index, cell in enumerate(self._api.meta_archs)
            if (index in there if there is not None else index in self._api.evaluated_indexes)
        }
        if not cells:
            raise DataError(f"{self._expected}, got no cell")
        super().__init__(path, cells)
        self._known: dict[str, dict[str, float]] = {}

    def _read(self, read: Any) -> Any:
        try:
            return read()
        except MemoryError:
            raise
        # whatever a damaged archive makes of the unpickler
        except Exception as error:
            raise DataError(f"{self._expected}, got {reason(error)}") from error

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(_COLUMNS)

    def accuracies(self, cell: str | AnyGenotype) -> dict[str, float]:
        index, name = self._index(cell), str(cell)
        if name not in self._known:
            # the mean over the seeds that were trained for 200 epochs
            results = {
                dataset: self._read(
                    lambda dataset=dataset: self._api.get_more_info(index, dataset, hp="200", is_random=False)
                )
                for dataset in dict.fromkeys(dataset for dataset, _ in _COLUMNS.values())
            }
            self._known[name] = {
                column: float(results[dataset][accuracy]) for column, (dataset, accuracy) in _COLUMNS.items()
            }
        return self._known[name]

    def column(self, name: str) -> np.ndarray:
        if name not in _COLUMNS:
            raise DataError(f"table: {self.path}: expected a column {name}, got {', '.join(_COLUMNS)}")
        return np.array([self.accuracies(cell)[name] for cell in self.cells])
