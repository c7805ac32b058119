"""Results of runs as arrays and tables, also while they are written."""

import json

import numpy as np
import pytest

from rfdarts_fast.results import load
from rfdarts_fast.retrain import train
from rfdarts_fast.runs.run_folder import RunFolderError
from rfdarts_fast.search import search


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_npz):
    from rfdarts_fast.search import SearchConfig

    config = SearchConfig(
        out=tmp_path_factory.mktemp("results") / "run", dataset="npz", data_root=tiny_npz, device="cpu",
        method="rf-pcdarts", space="s1", channels=4, layers=1, epochs=3, batch_size=4, edge_norm=True,
        validate_every=2,
    )  # fmt: skip
    search(config)
    return config.out


def test_a_search(finished):
    run = load(finished)
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert run.records == lines and run.finished and run.epochs == 3
    assert run.metrics["train/loss"].tolist() == [line["train"]["loss"] for line in lines]
    assert np.isnan(run.metrics["val/accuracy"]).tolist() == [True, False, True]
    assert run.alphas["alphas_normal"].shape == (3, 14, 2) and run.alphas["betas_reduce"].shape == (3, 14)
    assert str(run.genotype) == lines[-1]["genotype"]
    last = json.loads((finished / "alphas.jsonl").read_text().splitlines()[-1])
    assert run.alphas["alphas_reduce"][-1].tolist() == last["alphas_reduce"]
    weights = run.op_weights("normal")
    assert np.allclose(weights.sum(axis=-1), 1)
    powers = np.exp(run.alphas["alphas_normal"])
    assert np.allclose(weights[..., 0], powers[..., 0] / powers.sum(axis=-1))
    assert run.config["space"] == "s1" and len(run.starts) == 1


def test_tables(finished):
    pytest.importorskip("pandas", reason="needs the extra `report`")
    run = load(str(finished))
    frame = run.frame()
    assert frame.index.tolist() == [0, 1, 2]
    assert frame.loc[1, "val/accuracy"] == run.records[1]["val"]["accuracy"]
    alphas = run.alpha_frame()
    assert len(alphas) == 3 * 2 * 14 * 2
    row = alphas[(alphas.epoch == 2) & (alphas.cell == "normal") & (alphas.edge == 13)].iloc[1]
    assert row.primitive == "dil_conv_5x5"
    assert row.weight == run.op_weights("normal")[2, 13, 1]


def test_a_training(tiny_train):
    config = tiny_train(epochs=1)
    train(config)
    run = load(config.out)
    assert run.finished and run.alphas == {}
    assert run.result["test_accuracy"] == run.metrics["test/accuracy"][-1]
    assert str(run.genotype).startswith("Genotype(")


def test_a_run_that_is_still_written(finished, tmp_path):
    for name in ("config.json", "metrics.jsonl", "alphas.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    # the alphas of an epoch are written before its metrics
    (tmp_path / "metrics.jsonl").write_bytes(metrics[:-20])
    run = load(tmp_path)
    assert (len(run.records), len(run.alphas["alphas_normal"]), run.finished) == (2, 2, False)
    assert str(run.genotype) == run.records[1]["genotype"]
    for name in ("metrics.jsonl", "alphas.jsonl"):
        (tmp_path / name).unlink()
    run = load(tmp_path)
    assert (run.records, run.alphas, run.genotype, run.metrics) == ([], {}, None, {})


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{}", "expected the folder of a search or train run"),
        ("config.json", "[]", "expected the folder of a search or train run"),
        ("config.json", "{", "config.json is damaged"),
        ("metrics.jsonl", "{\n", "metrics.jsonl is damaged"),
        ("metrics.jsonl", "3\n", "metrics.jsonl is damaged: expected an object"),
        ("genotype.json", "{}", "genotype.json is damaged"),
    ],
)
def test_a_damaged_folder(finished, tmp_path, file, content, message):
    for name in ("config.json", "metrics.jsonl", "alphas.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(RunFolderError, match=message):
        load(tmp_path)


def test_no_folder(tmp_path):
    with pytest.raises(RunFolderError, match="expected the folder of a search or train run, got"):
        load(tmp_path / "absent")
