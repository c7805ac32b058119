"""`rfdarts show`: counts against published ones, drawings with every edge, one page without a network."""

import re
import shutil
import subprocess
import sys
from functools import partial

import pytest

from rfdarts_fast.report.counts import count_genotype
from rfdarts_fast.retrain import train
from rfdarts_fast.search import search
from rfdarts_fast.spaces import PUBLISHED, parse

CELL = "|nor_conv_3x3~0|+|none~0|skip_connect~1|+|avg_pool_3x3~0|nor_conv_1x1~1|none~2|"


@pytest.fixture
def show(rfdarts):
    """Exit code, stdout and stderr of `rfdarts show`."""
    return partial(rfdarts, "show")


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="needs the extra `report`")


@pytest.fixture
def finished(tiny_search):
    config = tiny_search(diagnose_every=1, diagnose_images=6)
    search(config)
    return config.out


@pytest.mark.parametrize(
    ("name", "cifar", "imagenet"),
    [
        ("DARTS_V1", (3_169_414, 501.0), None),
        ("DARTS_V2", (3_349_342, 528.4), (4_718_752, 529.9)),
        ("PC_DARTS_cifar", (3_634_678, 556.7), (5_270_560, 571.1)),
        ("PC_DARTS_image", None, (5_342_464, 581.6)),
    ],
)
def test_published_counts(name, cifar, imagenet):
    for counts, expected in zip(count_genotype(PUBLISHED[name]), (cifar, imagenet), strict=True):
        if expected:
            assert (counts.parameters, round(counts.multiply_adds / 1e6, 1)) == expected


def test_counts_of_a_benchmark_cell():
    # 5 cells in each of 3 stages, whose C^2 times pixels is the same
    cells = CELL, CELL.replace("nor_conv_1x1", "none")
    both = [count_genotype(parse(text))[0].multiply_adds for text in cells]
    assert both[0] - both[1] == 5 * 3 * 16**2 * 32**2


def drawn(genotype):
    """The texts of each cell's drawing, and its number of arcs."""
    from matplotlib.patches import FancyArrowPatch

    from rfdarts_fast.report.cells import draw_genotype

    return [
        (
            [text.get_text() for text in axis.texts],
            sum(isinstance(patch, FancyArrowPatch) for patch in axis.patches),
        )
        for axis in draw_genotype(genotype).axes
    ]


def test_drawings_have_every_edge(matplotlib):
    for genotype in PUBLISHED.values():
        for (texts, arcs), genes in zip(drawn(genotype), (genotype.normal, genotype.reduce), strict=True):
            assert arcs == 8
            assert sorted(texts) == sorted([op for op, _ in genes] + ["c(k-2)", "c(k-1)", *"0123"])
    ((texts, arcs),) = drawn(parse(CELL))
    assert (arcs, "none" in texts) == (4, False)
    assert {"input", "output", "avg_pool_3x3", "skip_connect"} <= set(texts)


def test_arcs_lead_from_source_to_target(matplotlib):
    from matplotlib.patches import FancyArrowPatch

    from rfdarts_fast.report.cells import draw_genotype

    axis = draw_genotype(PUBLISHED["DARTS_V2"]).axes[0]
    ends = [patch._posA_posB for patch in axis.patches if isinstance(patch, FancyArrowPatch)]
    genes = PUBLISHED["DARTS_V2"].normal
    assert [(a[0], b[0]) for a, b in ends] == [(j, k // 2 + 2) for k, (_, j) in enumerate(genes)]


def test_a_search_is_shown(show, finished, tmp_path, matplotlib):
    code, out, _ = show(finished, "--html", tmp_path / "a" / "run.html", "--figures", tmp_path / "figures")
    assert code == 0
    for text in (
        "2 of 2, finished",
        "rule",
        "hessian eigenvalue",
        "C=16, N=5",
        "multiply-adds",
    ):
        assert text in out
    names = {"cell", "learning_curves", "weights", "weights_cell", "diagnostics"}
    files = {path.name for path in (tmp_path / "figures").iterdir()}
    assert files == {f"{name}.{suffix}" for name in names for suffix in ("svg", "png")}
    page = (tmp_path / "a" / "run.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(names)
    assert self_contained(page)
    assert "<td>rf-darts</td>" in page


def self_contained(page):
    """True if nothing of the page comes from elsewhere and nothing in it runs."""
    sources = re.findall(r"""(?:src|href)=["']?([^"'> ]+)""", page)
    outside = [source for source in sources if not source.startswith("data:")]
    return not outside and "<script" not in page and "@import" not in page and "url(" not in page


def test_the_check_of_pages_can_fail():
    assert not self_contained('<img src="https://a.b/c.png">')
    assert not self_contained("<script>1</script>")


def test_a_page_in_a_browser(show, finished, tmp_path, matplotlib):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("needs chromium")
    show(finished, "--html", tmp_path / "run.html")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    dom = subprocess.run(
        [*command, f"file://{tmp_path}/run.html"], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    assert "<h2>Diagnostics</h2>" in dom and "<td>rf-darts</td>" in dom


def test_a_run_that_goes_on(show, finished, tmp_path, matplotlib):
    (finished / "genotype.json").unlink()
    metrics = (finished / "metrics.jsonl").read_bytes()
    for left in (metrics[:-20], b""):
        (finished / "metrics.jsonl").write_bytes(left)
        code, out, err = show(finished, "--html", tmp_path / "run.html")
        assert code == 0, err
        assert f"{left.count(10)} of 2, not running; the same command resumes" in out


def test_a_training_is_shown(show, tiny_train, tmp_path, matplotlib):
    config = tiny_train(epochs=1)
    train(config)
    code, out, err = show(config.out, "--html", tmp_path / "run.html", "--figures", tmp_path)
    assert code == 0, err
    assert "test accuracy" in out and (tmp_path / "learning_curves.png").read_bytes()[:4] == b"\x89PNG"


def test_a_genotype_is_shown_with_its_entry_in_a_table(show, tmp_path, matplotlib):
    table = tmp_path / "table.csv"
    table.write_text(f"arch,cifar10_test\n{CELL},91.5\n")
    code, out, _ = show(CELL, "--table", table, "--html", tmp_path / "cell.html")
    assert code == 0
    assert "cifar10 91.50% test, rank 1 of 1" in out
    assert "2 none" in out and CELL in (tmp_path / "cell.html").read_text()


def test_values_are_text_in_a_page(finished, show, tmp_path, matplotlib):
    config = (finished / "config.json").read_text().replace('"npz"', '"<script>alert(1)</script>"')
    (finished / "config.json").write_text(config)
    show(finished, "--html", tmp_path / "run.html")
    assert "<script" not in (tmp_path / "run.html").read_text()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("DARTS_V9",), "genotype: expected one of DARTS_V1"),
        ((".",), "run: expected the folder of a search or train run, got ."),
        (("DARTS_V1", "--table", "x.csv"), "--table: expected a CSV file or NATS-Bench's files, got nothing"),
    ],
)
def test_refused(show, tmp_path, monkeypatch, args, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = show(*args)
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(("package", "what"), [("matplotlib", "figures"), ("jinja2", "html")])
def test_without_the_extra(show, tmp_path, monkeypatch, package, what):
    monkeypatch.setitem(sys.modules, package, None)
    code, out, err = show("DARTS_V1", "--html", tmp_path / "a.html")
    assert (code, out) == (2, "")
    assert f"package {package}, which is not installed (pip install 'rfdarts_fast[report]')" in err
    assert not (tmp_path / "a.html").exists()
    # the text needs none of it
    assert show("DARTS_V1")[0] == 0


def test_a_page_that_cannot_be_written(show, tmp_path, matplotlib):
    (tmp_path / "file").write_text("mine")
    code, _, err = show("DARTS_V1", "--html", tmp_path / "file" / "a.html")
    assert code in (1, 2) and err.count("\n") == 1 and str(tmp_path / "file") in err
