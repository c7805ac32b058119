"""CONTRIBUTING's recipe for a backend, followed to the letter."""

import re
import time
from pathlib import Path

import pytest
import torch

from rfdarts_fast import cli, ops
from rfdarts_fast.nn import SearchNetwork, freeze_random_features
from rfdarts_fast.ops import contract
from rfdarts_fast.spaces import get_space

ROOT = Path(__file__).parents[2]
SECTION = (ROOT / "CONTRIBUTING.md").read_text().split("## Add a backend\n")[1].split("\n## ")[0]

pytestmark = pytest.mark.skipif(not ops.backends()["cpu"].status()["built"], reason="needs the CPU kernels")


@pytest.fixture
def timed(monkeypatch):
    """The backend of the recipe, registered for one test."""
    monkeypatch.setattr(contract, "_backends", dict(contract._backends))
    (code,) = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
    exec(code, {"ops": ops, "time": time})
    return ops.backends()["timed"]


def network(**options):
    torch.manual_seed(0)
    supernet = SearchNetwork(get_space("s2"), 4, 10, 3, **options)
    freeze_random_features(supernet)
    return supernet


def test_it_computes_what_the_cpu_backend_does(timed):
    x, results = torch.randn(2, 3, 8, 8), []
    for name in ("cpu", "timed"):
        with ops.use_backend(name):
            results.append(network()(x))
    assert torch.equal(*results)
    assert timed.seconds > 0


def test_it_is_asked_by_name_only_and_says_why_not(timed):
    x = torch.randn(2, 3, 8, 8)
    with ops.use_backend("auto"):
        network()(x)
    assert timed.seconds == 0
    with ops.use_backend("timed"), pytest.raises(ops.BackendError, match=r"timed cannot run: .*trained"):
        SearchNetwork(get_space("s2"), 4, 10, 3)(x)


def test_the_command_line_knows_it(timed, capsys):
    cli.run_env([])
    assert "timed" in capsys.readouterr().out
