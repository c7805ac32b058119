"""Cells trained at one equal protocol: random ones, and the table."""

import itertools
import sys

import pytest

from benchmarks import retrain_cells
from rfdarts_fast.spaces import parse


def test_random_cells_are_of_the_space_and_differ():
    cells = [parse(retrain_cells.random_cell(seed)) for seed in range(8)]
    assert cells[0] == parse(retrain_cells.random_cell(0))
    assert all(a != b for a, b in itertools.combinations(cells, 2))
    genes = [gene for cell in cells for gene in (*cell.normal, *cell.reduce)]
    assert len(genes) == 8 * 16
    assert {op for op, _ in genes} == {
        "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3",
        "dil_conv_5x5",
    }  # fmt: skip
    for cell in cells:
        for node, i in itertools.product(range(4), (cell.normal, cell.reduce)):
            (_, a), (_, b) = i[2 * node : 2 * node + 2]
            assert a != b and max(a, b) < node + 2


def test_a_table_of_all_cells(tmp_path, monkeypatch, capsys):
    options = ["--preset", "quick", "--epochs", "1", "--layers", "3", "--channels", "2"]
    own = ["--cell", "published=DARTS_V2", "--random", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["retrain_cells", *own, "--", *options])
    retrain_cells.main()
    table = (tmp_path / "table.txt").read_text()
    assert capsys.readouterr().out.endswith(table)
    rows = [line.split(" | ") for line in table.splitlines() if line.endswith("` |")]
    assert [row[0] for row in rows] == ["| published", "| random-1"]
    assert all(0 < float(row[2]) < 100 for row in rows)
    assert (tmp_path / "random-1-seed-1" / "result.json").exists()


def test_nothing_to_train_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["retrain_cells", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        retrain_cells.main()
