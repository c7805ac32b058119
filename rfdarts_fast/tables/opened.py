"""The table at a path, of whatever format."""

from __future__ import annotations

from pathlib import Path

from rfdarts_fast.data import DataError
from rfdarts_fast.messages import thing_at
from rfdarts_fast.tables.csv_table import CsvTable
from rfdarts_fast.tables.nats_table import NatsTable, is_nats
from rfdarts_fast.tables.table import Table


def open_table(path: Path) -> Table:
    """A table from a CSV file (plain or gzipped), or from NATS-Bench's official file or folder.

    Raises DataError that names the path and what was expected.
    """
    there = thing_at(path)
    if there not in ("a file", "a folder") or (there == "a folder" and not is_nats(path)):
        raise DataError(f"table: expected a CSV file or NATS-Bench's files, got {there}: {path}")
    return NatsTable(path) if is_nats(path) else CsvTable(path)
