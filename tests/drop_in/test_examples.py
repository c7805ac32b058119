"""The example scripts run, and are plain search scripts but for one import."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from rfdarts_fast.drop_in import darts

from .architects import TrainableArchitect
from .common import batch, pair

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = {"epochs": 2, "init-channels": 4, "layers": 3, "batch-size": 8, "max-steps": 2, "device": "cpu"}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.mark.parametrize(
    "script, options",
    [
        ("train_search_darts", []),
        ("train_search_darts", ["--unrolled"]),
        ("train_search_pc_darts", ["--begin", "1"]),
    ],
)
def test_runs(example, script, options, capsys):
    model = example(script).main([f"--{name}={value}" for name, value in TINY.items()] + options)
    printed = capsys.readouterr().out
    assert printed.count("Genotype(normal=") == 3 and re.search(r"test accuracy \d+\.\d\d%", printed)
    torch.manual_seed(2)
    before = type(model)(4, 10, 3, None)
    # alphas and gammas moved, random features did not
    for (name, old), new in zip(before.named_parameters(), model.parameters(), strict=True):
        assert new.requires_grad or torch.equal(old, new), name
    assert all(
        not torch.equal(a, b) for a, b in zip(before.arch_parameters(), model.arch_parameters(), strict=True)
    )


@pytest.mark.parametrize("script", ["train_search_darts", "train_search_pc_darts"])
def test_one_import_line(script):
    text = (EXAMPLES / f"{script}.py").read_text()
    code = text.split('"""')[2]
    assert len(re.findall(r"drop_in|accelerate|freeze|random_features|rfdarts_fast\.(?!data)", code)) == 2
    assert len(re.findall(r"^from rfdarts_fast\.drop_in", code, re.MULTILINE)) == 1


def test_architect_is_the_published_one(example):
    """Second order with momentum and weight decay, in place instead of in a copy."""
    networks = pair("darts", 4, 3, nodes=2)[1], pair("darts", 4, 3, nodes=2)[1]
    networks[1].load_state_dict(networks[0].state_dict())
    states = []
    # drawn beforehand, as a network that is built on the way draws too
    batches = [(batch("darts"), batch("darts")) for _ in range(2)]
    for network, published in zip(networks, (True, False), strict=True):
        assert isinstance(network, darts.Network)
        optimizer = torch.optim.SGD(network.parameters(), 0.025, momentum=0.9, weight_decay=3e-4)
        if published:
            architect = TrainableArchitect(network)
        else:
            architect = example("architect").Architect(network, 0.9, 3e-4, 3e-4, 1e-3)
        for train, valid in batches:
            architect.step(train, valid, 0.025, optimizer, unrolled=True)
            optimizer.zero_grad()
            network._loss(*train).backward()
            optimizer.step()
        states.append([*network.state_dict().values()])
    torch.testing.assert_close(states[1], states[0], rtol=1e-5, atol=1e-8)
