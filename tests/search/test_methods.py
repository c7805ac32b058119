"""All methods in all spaces at the tiniest size, from a config to a genotype that `train` can build."""

import json

import pytest
import torch

from rfdarts_fast.retrain import train
from rfdarts_fast.search import search
from rfdarts_fast.spaces import parse

PARTIAL = {"partial_channels": 2, "edge_norm": True}
SMALL = {"layers": 3, "epochs": 1, "batch_size": 12}
NASBENCH201 = {"step_order": "weights-first", "nesterov": True, "schedule_per_step": True}
NASBENCH201 |= {"space": "nasbench201", "track_running_stats": False}

RUNS = {
    "darts": {"method": "darts", "space": "darts", "affine": False, **SMALL},
    "darts-second": {"method": "darts", "space": "s2", "affine": False, "order": "second", **SMALL},
    "pc-darts": {"method": "pc-darts", "space": "s3", "affine": False, **PARTIAL, **SMALL},
    "rf-darts-s1-second": {"method": "rf-darts", "space": "s1", "order": "second", **SMALL},
    "rf-darts-s4": {"method": "rf-darts", "space": "s4", **SMALL},
    "rf-pcdarts": {"method": "rf-pcdarts", "space": "darts", **PARTIAL, **SMALL},
    "rf-pcdarts-imagenet": {
        "method": "rf-pcdarts", "space": "s2", "stem": "imagenet", "image_size": 32, **PARTIAL, **SMALL
    },
    "nasbench201-darts": {"method": "darts", "affine": False, **NASBENCH201},
    "nasbench201-rf-darts": {"method": "rf-darts", **NASBENCH201},
    "nasbench201-split-file": {"method": "rf-darts", "split": "nasbench201", **NASBENCH201},
}  # fmt: skip

ENTROPY = {"darts": 2.0794, "s1": 0.6931, "s2": 0.6931, "s3": 1.0986, "s4": 0.6931, "nasbench201": 1.6094}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS.keys())
def test_search_ends_with_a_genotype_that_trains(tiny_search, tiny_train, tmp_path, options):
    if options.get("split") == "nasbench201":
        file = tmp_path / "cifar-split.txt"
        halves = {
            name: ["int", [str(i) for i in range(n, 24, 2)]] for n, name in enumerate(("train", "valid"))
        }
        file.write_text(json.dumps(halves))
        options = {**options, "split_file": file}
    config = tiny_search(out=tmp_path / "search", **options)
    genotype = search(config)

    record = json.loads((config.out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["train"]["loss"] > 0
    assert record["arch"]["loss"] > 0
    assert 0 <= record["val"]["accuracy"] <= 100
    assert record["images_per_second"] > 0
    assert record["genotype"] == str(genotype)
    assert record["skip_connects"] == genotype.ops().count("skip_connect")
    # the alphas start near 0: all primitives weigh the same
    assert list(record["entropy"].values()) == pytest.approx(
        [ENTROPY[config.space]] * len(record["entropy"]), abs=1e-2
    )
    assert bool(record["gamma"]) == config.affine

    text = (config.out / "genotype.json").read_text()
    assert parse(text) == genotype
    alphas = [json.loads(line) for line in (config.out / "alphas.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in alphas] == list(range(config.epochs))

    result = train(
        tiny_train(
            out=tmp_path / "train",
            genotype=str(config.out / "genotype.json"),
            drop_path=0.0,
            layers=3,
            epochs=1,
            batch_size=12,
        )
    )
    assert 0 <= result["test_accuracy"] <= 100
    assert result["parameters"] > 0


def test_a_search_learns(tiny_search):
    """Brightness tells the classes apart; 12 images and frozen features suffice to see it."""
    config = tiny_search(epochs=12, learning_rate=0.2, channels=8, cells_per_stage=1, train_classifier=True)
    search(config)
    losses = [
        json.loads(line)["train"]["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert sum(losses[-3:]) / 3 < 0.8 * losses[0]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_search_in_bfloat16(tiny_search, tmp_path, backend):
    search(tiny_search(amp="bf16", space="darts", channels=4, backend=backend))
    state = torch.load(tmp_path / "run/checkpoint.pt", weights_only=False)["network"]
    parts = [x for x in state.values() if x.is_floating_point()]
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in parts)
