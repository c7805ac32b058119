"""Ground truth of NAS-Bench-201: every cell's accuracy, from CSV or NATS-Bench's files."""

from rfdarts_fast.tables.opened import open_table
from rfdarts_fast.tables.table import DATASETS, Table

__all__ = ["DATASETS", "Table", "open_table"]
