"""Cells trained at one equal protocol: random ones, and the table."""

import itertools
import sys

import pytest

from benchmarks import retrain_cells
from rfdarts_fast.spaces import parse

pytestmark = pytest.mark.usefixtures("without_onednn")


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "expected --cell or --random, got no cell"),
        (["--cell", "DARTS_V2"], "--cell: expected NAME=GENOTYPE, got 'DARTS_V2'"),
        (["--cell", "a=DARTS_V1", "--cell", "a=DARTS_V2"], "--cell: expected each name once"),
    ],
)
def test_what_cannot_be_trained_is_refused(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["retrain_cells", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        retrain_cells.main()
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
