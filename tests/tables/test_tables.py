"""Tables of NAS-Bench-201: the published numbers, both formats, `rfdarts query` and its errors."""

import gzip
import sys
from functools import partial

import pytest

from rfdarts_fast.data import DataError
from rfdarts_fast.tables import DATASETS, open_table

ALL_SKIP = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"
# the cell of the paper's 94.36, which RF-DARTS reports
PAPER = "|nor_conv_3x3~0|+|nor_conv_3x3~0|nor_conv_3x3~1|+|skip_connect~0|nor_conv_3x3~1|nor_conv_3x3~2|"
SMALL = f"arch,cifar10_test,cifar10_valid\n{ALL_SKIP},54.3,50\n{PAPER},94.3633,91\n"


@pytest.fixture(scope="module")
def all_cells():
    from tests.conftest import SHARED_DATA

    path = SHARED_DATA / "nb201.csv.gz"
    if not path.is_file():
        pytest.skip("needs shared/data/nb201.csv.gz beside the repository")
    return open_table(path)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.csv"
    path.write_text(SMALL)
    return path


@pytest.fixture
def nats(shared_data):
    pytest.importorskip("nats_bench", reason="needs the extra `nasbench`")
    return shared_data("nats_sample/NATS-tss-v1_0-3ffb9-simple/meta.pickle.pbz2").parent


@pytest.fixture
def query(rfdarts):
    """Exit code, stdout and stderr of `rfdarts query`."""
    return partial(rfdarts, "query")


@pytest.mark.parametrize(
    ("cell", "accuracies"), [(ALL_SKIP, (54.30, 15.61, 16.32)), (PAPER, (94.3633, 73.5133, 46.3444))]
)
def test_published_accuracies(all_cells, cell, accuracies):
    found = [all_cells.accuracies(cell)[f"{dataset}_test"] for dataset in DATASETS]
    assert found == pytest.approx(accuracies, abs=0.005)


def test_published_optima_and_means(all_cells):
    columns = {dataset: all_cells.column(f"{dataset}_test") for dataset in DATASETS}
    assert [round(columns[d].max(), 2) for d in DATASETS] == [94.37, 73.51, 47.31]
    means = [all_cells.column(f"nats_{d}_test").mean() for d in DATASETS]
    assert [round(mean, 2) for mean in means] == [87.06, 61.41, 33.59]
    assert [all_cells.cells[all_cells.best(d)] for d in DATASETS] == [6111, 9930, 857]
    assert len(all_cells.cells) == 15_625


def test_ranks(all_cells):
    assert all_cells.rank(all_cells.best("cifar10"), "cifar10") == 1
    entry = all_cells.entry(PAPER)
    assert {dataset: entry[dataset]["rank"] for dataset in DATASETS} == {
        "cifar10": 3, "cifar100": 1, "imagenet16": 24,
    }  # fmt: skip
    # cells without a path from input to output are at chance, and share the last rank
    ranks = [all_cells.rank(cell, "cifar10") for cell in list(all_cells.cells)[:50]]
    assert max(ranks) <= 15_625 and min(ranks) >= 1


def test_official_files_agree_with_the_csv(all_cells, nats):
    table = open_table(nats)
    assert sorted(table.cells.values()) == [0, 11, 284]
    for cell, index in table.cells.items():
        assert all_cells.cells[cell] == index
        expected = {name: all_cells.accuracies(cell)[name] for name in table.columns}
        assert table.accuracies(cell) == pytest.approx(expected, abs=1e-3)
    assert table.rank(table.best("cifar10"), "cifar10") == 1
    assert table.cells[table.best("imagenet16")] == 284


def test_a_table_may_be_gzipped(small):
    zipped = small.with_suffix(".csv.gz")
    zipped.write_bytes(gzip.compress(small.read_bytes()))
    assert open_table(zipped).accuracies(PAPER) == open_table(small).accuracies(PAPER)
    assert open_table(small).cells == {ALL_SKIP: 0, PAPER: 1}
    assert open_table(small).datasets == ("cifar10",)


def test_query_prints_accuracies_and_rank(query, small, tmp_path):
    code, out, _ = query(ALL_SKIP, "--table", small, "--rank")
    lines = out.splitlines()
    assert (code, lines[0]) == (0, f"{ALL_SKIP}  index 0")
    assert lines[2].split() == ["cifar10", "50.0000", "54.3000", "2"]
    assert "rank" not in query(ALL_SKIP, "--table", small)[1]
    assert PAPER in query("--best", "--table", small)[1]
    genotype = tmp_path / "genotype.json"
    genotype.write_text('{"edges": ["skip_connect", "skip_connect", "skip_connect", "skip_connect", '
                        '"skip_connect", "skip_connect"]}')  # fmt: skip
    assert query(genotype, "--table", small)[1].startswith(ALL_SKIP)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((PAPER, "--table", "absent.csv"), "--table: expected a CSV file or NATS-Bench's files, got nothing"),
        ((PAPER, "--table", "."), "--table: expected a CSV file or NATS-Bench's files, got a folder: ."),
        ((PAPER.replace("skip_connect", "none"), "--table", "{}"), "cell: expected one of the 2 in "),
        (("|skip_connect~0|+", "--table", "{}"), "genotype: expected inputs 0 to 1 at node 2, got ''"),
        ((PAPER.replace("skip_connect", "skip"), "--table", "{}"), "genotype.edges[3]: expected a primitive"),
        (("DARTS_V2", "--table", "{}"), "cell: expected a NAS-Bench-201 cell string, got \"Genotype("),
        (("--table", "{}"), "cell: expected either a cell or --best, got None"),
        ((PAPER, "--best", "--table", "{}"), "cell: expected either a cell or --best, got '|nor_conv"),
        (("--best", "--table", "{}", "--dataset", "cifar100"), "a column cifar100_test, got cifar10"),
        ((PAPER,), "Required options"),
    ],
)  # fmt: skip
def test_query_refuses(query, small, args, message):
    code, out, err = query(*(arg.format(small) if arg == "{}" else arg for arg in args))
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("rfdarts query: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("54.3", "1e3", "line 2: expected percentages, got '1e3'"),
        ("54.3", "nan", "line 2: expected percentages, got 'nan'"),
        ("54.3", "101", "line 2: expected percentages, got '101'"),
        ("54.3", "54.3,1", "line 2: expected 3 values, got 4"),
        (PAPER, ALL_SKIP, "line 3: expected another cell string"),
        (PAPER, PAPER + "x", "line 3: expected another cell string"),
        ("arch", "cell", "with a column arch and some that end in _valid or _test, each once"),
        ("_valid", "_test", "each once"),
        (SMALL.partition("\n")[2], "", "with at least one cell, got none"),
    ],
)
def test_a_damaged_table(small, old, new, message):
    small.write_text(SMALL.replace(old, new))
    with pytest.raises(DataError) as error:
        open_table(small)
    assert message in str(error.value) and str(small) in str(error.value)


def test_official_files_without_their_package(nats, monkeypatch):
    monkeypatch.setitem(sys.modules, "nats_bench", None)
    with pytest.raises(DataError, match=r"package nats_bench .*pip install 'rfdarts_fast\[nasbench\]'"):
        open_table(nats)


def test_official_files_that_are_damaged(nats, tmp_path):
    folder = tmp_path / "NATS-tss-v1_0-3ffb9-simple"
    folder.mkdir()
    (folder / "meta.pickle.pbz2").write_bytes((nats / "meta.pickle.pbz2").read_bytes())
    with pytest.raises(DataError, match="expected NATS-Bench files of the topology space, got no cell"):
        open_table(folder)
    (folder / "000000.pickle.pbz2").write_bytes(b"BZh9 and nothing else")
    table = open_table(folder)
    with pytest.raises(DataError, match="expected NATS-Bench files of the topology space, got "):
        table.accuracies(next(iter(table.cells)))
    (folder / "meta.pickle.pbz2").write_bytes(b"")
    with pytest.raises(DataError, match="expected NATS-Bench files of the topology space, got "):
        open_table(folder)
