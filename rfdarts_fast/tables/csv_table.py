"""Tables in CSV files, plain or gzipped."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np

from rfdarts_fast.data import DataError
from rfdarts_fast.data.texts import read_unzipped
from rfdarts_fast.messages import reason, shown
from rfdarts_fast.spaces import NASBENCH201_PRIMITIVES, AnyGenotype
from rfdarts_fast.tables.table import Table

# the whole table takes a tenth
_MOST_BYTES = 32_000_000
_OP = f"(?:{'|'.join(NASBENCH201_PRIMITIVES)})"
_CELL = re.compile(
    r"\+".join(r"\|" + "".join(rf"{_OP}~{j}\|" for j in range(node)) for node in (1, 2, 3)), re.ASCII
)
# accuracies as they are written, without signs, inf and nan
_PERCENT = re.compile(r"[0-9]{1,3}(\.[0-9]*)?", re.ASCII)


class CsvTable(Table):
    """A CSV file with a column `arch` of cell strings and columns of accuracies.

    Columns whose name ends in _valid or _test are read; a column `index` has the cell's index in the
    benchmark, without it lines are counted from 0. Raises DataError that names the file and line.
    """

    def __init__(self, path: Path) -> None:
        expected = f"table: {path}: expected a CSV file of NAS-Bench-201"
        content = read_unzipped(path, expected, _MOST_BYTES)
        try:
            lines = csv.reader(content.decode().splitlines())
            header = next(lines, [])
            names = [name for name in header if name.endswith(("_valid", "_test"))]
            if "arch" not in header or not names or len(set(header)) < len(header):
                columns = "a column arch and some that end in _valid or _test, each once"
                raise DataError(f"{expected} with {columns}, got {shown(header)}")
            rows = self._rows(lines, header, names, f"table: {path}")
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(f"{expected}, got {reason(error)}") from error
        if not rows:
            raise DataError(f"{expected} with at least one cell, got none")
        super().__init__(path, {cell: index for cell, (index, _) in rows.items()})
        self._columns = dict(zip(names, np.array([values for _, values in rows.values()]).T, strict=True))

    @staticmethod
    def _rows(lines, header: list[str], names: list[str], where: str) -> dict[str, tuple[int, list[float]]]:
        rows: dict[str, tuple[int, list[float]]] = {}
        places = [header.index(name) for name in names]
        for number, line in enumerate(lines, 2):
            if len(line) != len(header):
                raise DataError(f"{where}, line {number}: expected {len(header)} values, got {len(line)}")
            cell = line[header.index("arch")]
            if not _CELL.fullmatch(cell) or cell in rows:
                raise DataError(f"{where}, line {number}: expected another cell string, got {shown(cell)}")
            values = [line[place] for place in places]
            wrong = next((v for v in values if not _PERCENT.fullmatch(v) or float(v) > 100), None)
            if wrong is not None:
                raise DataError(f"{where}, line {number}: expected percentages, got {shown(wrong)}")
            index = line[header.index("index")] if "index" in header else str(len(rows))
            if not re.fullmatch("[0-9]{1,9}", index):
                raise DataError(f"{where}, line {number}: index: expected a number, got {shown(index)}")
            rows[cell] = int(index), [float(value) for value in values]
        return rows

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self._columns)

    def accuracies(self, cell: str | AnyGenotype) -> dict[str, float]:
        place = self._place(cell)
        return {name: float(column[place]) for name, column in self._columns.items()}

    def column(self, name: str) -> np.ndarray:
        if name not in self._columns:
            raise DataError(f"table: {self.path}: expected a column {name}, got {', '.join(self._columns)}")
        return self._columns[name]
