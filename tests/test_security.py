"""Each promise of SECURITY.md has tests, and those that no other file has."""

import ast
import gzip
import hashlib
import pickle
import re
from pathlib import Path

import pytest
import torch
from PIL import EpsImagePlugin, Image

from rfdarts_fast.data import DataError, load, read_split_file
from rfdarts_fast.data.photo import check_photo, read_rgb
from rfdarts_fast.retrain import evaluate_run, train
from rfdarts_fast.runs.checkpoint import CheckpointError
from rfdarts_fast.runs.config import ConfigError
from rfdarts_fast.runs.options import read_yaml
from rfdarts_fast.search import SearchConfig
from rfdarts_fast.spaces import GenotypeError, parse

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "SECURITY.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)


def test_every_promise_names_tests_that_exist():
    for file, name in NAMED:
        tree = ast.parse((ROOT / file).read_text())
        assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, name
    promises = TEXT.partition("## What is not promised")[0]
    points = re.findall(r"^- (.*?)(?=^- |^$|\Z)", promises, re.MULTILINE | re.DOTALL)
    assert len(points) >= 10
    assert all("::test_" in point for point in points)


class Payload:
    """An object that leaves a mark when it is unpickled."""

    ran = False

    def __reduce__(self):
        return setattr, (Payload, "ran", True)


@pytest.fixture(autouse=True)
def unmarked():
    yield
    assert not Payload.ran


def test_a_checkpoint_executes_nothing(tiny_train):
    config = tiny_train(epochs=1)
    train(config)
    state = torch.load(config.out / "checkpoint.pt", weights_only=True)
    for content in (pickle.dumps({**state, "epoch": Payload()}), pickle.dumps(Payload())):
        (config.out / "best.pt").write_bytes(content)
        (config.out / "checkpoint.pt").write_bytes(content)
        with pytest.raises(CheckpointError):
            evaluate_run(config.out)
    torch.save({**state, "meter": Payload()}, config.out / "best.pt")
    with pytest.raises(CheckpointError) as error:
        evaluate_run(config.out)
    assert "weights_only" not in str(error.value)


def test_no_image_starts_a_program(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: started.append(a))
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    for read in (read_rgb, lambda path: check_photo(path, decode=True)):
        with pytest.raises(DataError, match=r"a\.png: expected a readable image"):
            read(path)
    assert not started
    # it is what Pillow would do
    with pytest.raises(AssertionError):
        Image.open(path).load()
    assert started


def test_pickles_of_cifar_are_read_after_their_checksum(tmp_path, monkeypatch):
    cifar = pytest.importorskip("torchvision.datasets.cifar", reason="torchvision not installed").CIFAR10
    folder = tmp_path / cifar.base_folder
    folder.mkdir()
    content = pickle.dumps(Payload())
    for name in [*(name for name, _ in cifar.train_list + cifar.test_list), cifar.meta["filename"]]:
        (folder / name).write_bytes(content)
    with pytest.raises(DataError, match="expected the files of cifar10"):
        load("cifar10", root=tmp_path)
    assert not Payload.ran
    # with checksums that fit they are unpickled
    checksum = hashlib.md5(content).hexdigest()
    for name in ("train_list", "test_list"):
        monkeypatch.setattr(cifar, name, [[file, checksum] for file, _ in getattr(cifar, name)])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": checksum})
    with pytest.raises(DataError):
        load("cifar10", root=tmp_path)
    assert Payload.ran
    Payload.ran = False


def test_texts_have_a_limit(tmp_path):
    (tmp_path / "a.yaml").write_text("#" * 1_000_000)
    assert read_yaml(tmp_path / "a.yaml", SearchConfig) == {}
    (tmp_path / "a.yaml").write_text("#" * 1_000_001)
    with pytest.raises(ConfigError, match="has more than 1000000 bytes"):
        read_yaml(tmp_path / "a.yaml", SearchConfig)
    assert parse("DARTS_V1".ljust(200_000)) == parse("DARTS_V1")
    with pytest.raises(GenotypeError, match="expected at most 200000 characters, got 200001"):
        parse("DARTS_V1".ljust(200_001))
    (tmp_path / "split.txt").write_bytes(gzip.compress(b" " * 64_000_001, 1))
    assert (tmp_path / "split.txt").stat().st_size < 10**6
    with pytest.raises(DataError, match="of at most 64,000,000 bytes, got more"):
        read_split_file(tmp_path / "split.txt", 6)
