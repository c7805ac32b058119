"""CONTRIBUTING's recipes for a primitive, a space and a data set, followed to the letter."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rfdarts_fast
from rfdarts_fast.data import DATASETS, default_augment, load
from rfdarts_fast.drop_in.recognise import Recognised, recognise
from rfdarts_fast.nn import PRIMITIVES
from rfdarts_fast.retrain import TrainConfig, train
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.search import SearchConfig, search
from rfdarts_fast.spaces import SPACES, derive, get_space, parse, to_json

ROOT = Path(__file__).parents[2]
# recipe -> the files that it names; what its code needs is imported there
HOMES = {
    "primitive": ["rfdarts_fast.nn.primitives"],
    "space": ["rfdarts_fast.spaces.space"],
    "data set": ["rfdarts_fast.data.sources.npz", "rfdarts_fast.data.sources"],
}
SECTIONS = re.split(r"^##+ ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
CODE = {
    recipe: block
    for recipe in HOMES
    for text in SECTIONS
    if text.startswith(f"Add a {recipe}\n")
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL)
}


@pytest.fixture(autouse=True)
def registries():
    """The registries are left as they were."""
    before = [(registry, dict(registry)) for registry in (PRIMITIVES, SPACES, DATASETS)]
    yield
    sys.modules.pop("extend", None)
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


def outside(monkeypatch):
    """The entries of examples/extend.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("extend").Blur


def inside(_):
    """The code of each recipe, run where the recipe puts it."""
    for recipe, homes in HOMES.items():
        names = {}
        for home in homes:
            names |= vars(importlib.import_module(home))
        exec(CODE[recipe], names)
        if recipe == "primitive":
            blur = names["Blur"]
    return blur


@pytest.mark.parametrize("follow", [outside, inside])
def test_the_entries_are_searched_derived_and_retrained(follow, monkeypatch, tmp_path):
    blur = follow(monkeypatch)
    common = {"dataset": "diagonals", "epochs": 1, "batch_size": 60, "layers": 3, "channels": 4}
    searched = search(SearchConfig(out=tmp_path / "search", method="rf-darts", space="blur", **common))
    record = json.loads((tmp_path / "search" / "metrics.jsonl").read_text())
    free = {"none", "skip_connect", "blur_3x3"}
    assert record["parameter_free_ops"] == sum(op in free for op in searched.ops())
    assert record["gamma"].keys() == {"skip_connect", "sep_conv_3x3", "blur_3x3"}

    genotype = derive(get_space("blur"), dict.fromkeys(("normal", "reduce"), [[0.3, 0.1, 0.2, 0.4]] * 14))
    assert set(genotype.ops()) == {"blur_3x3"}
    assert parse(to_json(genotype)) == parse(str(genotype)) == genotype
    options = {"auxiliary": False, "cutout": 0, "drop_path": 0.0}
    result = train(TrainConfig(out=tmp_path / "train", genotype=str(genotype), **common, **options))
    assert result["parameters"] > 0
    assert isinstance(PRIMITIVES["blur_3x3"].make(4, 2, True, True), blur)


def test_the_data_set_is_loaded_and_never_mirrored(monkeypatch):
    outside(monkeypatch)
    source = load("diagonals", image_size=8)
    assert (len(source.train), len(source.test), source.class_names) == (240, 60, ("rise", "fall"))
    assert source.image_size == 8
    assert not default_augment(source).flip
    assert not torch.equal(source.train.images[0], source.train.images[0].flip(-1))


def test_the_drop_in_reads_the_same_registry(monkeypatch):
    from tests.drop_in import forks

    blur = outside(monkeypatch)
    for stride in (1, 2):
        assert recognise(blur(stride)) == Recognised("blur_3x3", stride, None)
        behind = nn.Sequential(blur(stride), nn.BatchNorm2d(4, affine=False))
        assert recognise(behind) == Recognised("blur_3x3", stride, 4)
    monkeypatch.setitem(forks.OPS, "blur_3x3", lambda c, stride: blur(stride))
    edges = [("skip_connect", "sep_conv_3x3", "blur_3x3")] * 5
    network = forks.RobustNetwork(4, 10, 3, None, 2, 2, primitives={"normal": edges, "reduce": edges})
    report = rfdarts_fast.accelerate(network)
    assert network.cells[0]._ops[0].rfdarts.edges[0].primitives == edges[0]
    assert len([path for path in report.replaced if "_ops" in path]) == 15 and not report.left
    # without the entry nobody knows what it is
    del PRIMITIVES["blur_3x3"]
    network = forks.RobustNetwork(4, 10, 3, None, 2, 2, primitives={"normal": edges, "reduce": edges})
    with pytest.raises(ValueError, match=r"operation 2: Blur.* is none of the registered primitives"):
        rfdarts_fast.accelerate(network)


def test_the_example_has_the_code_of_the_recipes_and_runs(monkeypatch, tmp_path, capsys):
    text = (ROOT / "examples" / "extend.py").read_text()
    assert all(CODE[recipe] in text for recipe in HOMES)
    outside(monkeypatch)
    genotype, result = sys.modules["extend"].main([str(tmp_path), "--epochs=1"])
    assert f"{genotype}\ntest accuracy {result['test_accuracy']:.1f}%" in capsys.readouterr().out


@pytest.fixture
def rfdarts(rfdarts, monkeypatch, tmp_path):
    """Runs the command line beside an installed package whose plugin is the given module."""

    def run(plugin, *args):
        info = tmp_path / "site" / "mine-1.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mine\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[rfdarts_fast.plugins]\nmine = {plugin}\n")
        for path in (info.parent, ROOT / "examples"):
            monkeypatch.syspath_prepend(str(path))
        monkeypatch.setenv("COLUMNS", "300")
        return rfdarts(*args)

    return run


def test_the_command_line_has_the_entries_of_plugins(rfdarts):
    code, text, _ = rfdarts("extend", "search", "--help")
    assert code == 0
    assert re.search(r"--space \{darts,.*,nasbench201,blur\}", text)
    assert re.search(r"--dataset \{digits,.*,diagonals\}", text)
    code, _, error = rfdarts("extend_not", "env")
    assert code == 2
    assert error == "rfdarts env: plugin mine: extend_not cannot be loaded: No module named 'extend_not'\n"


@pytest.mark.parametrize("option", ["space", "dataset"])
def test_an_unknown_name_gets_one_error_that_lists_the_known_ones(rfdarts, tmp_path, option):
    known = {"space": SPACES, "dataset": DATASETS}[option]
    with pytest.raises(ConfigError, match=f"^{option}: expected one of {', '.join(known)}, got 'mine'$"):
        search(SearchConfig(out=tmp_path / "run", **{option: "mine"}))
    code, _, error = rfdarts("json", "search", f"--{option}", "mine", "--out", str(tmp_path / "run"))
    assert code == 2
    assert f"invalid choice 'mine' for argument '--{option}'. Expected one of {tuple(known)}." in error
    assert not (tmp_path / "run").exists()
