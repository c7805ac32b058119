"""Steps that are recorded once and replayed, with a recorder that needs no GPU."""

import warnings

import pytest
import torch

from rfdarts_fast.runs.graph import GraphedStep
from rfdarts_fast.search import run as search_run
from rfdarts_fast.search import search


def keep(work):
    """A recorder whose recording is the work itself."""
    return work


def test_recorded_steps_read_their_arguments_anew():
    seen, total = [], torch.zeros(1)

    def step(kind, x):
        seen.append(kind)
        total.add_(x.sum())

    graphed = GraphedStep(step, keep, warmup=2)
    for i in range(6):
        graphed("a", torch.full((2,), float(i)))
    graphed("a", torch.ones(3))
    graphed("b", torch.ones(2))
    assert total.item() == 2 * sum(range(6)) + 3 + 2
    assert seen == ["a"] * 7 + ["b"]


@pytest.mark.parametrize("required", [False, True])
def test_a_step_that_cannot_be_recorded(required):
    def refuse(work):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    total = torch.zeros(1)
    graphed = GraphedStep(lambda kind, x: total.add_(x), refuse, warmup=1, required=required)
    graphed("a", torch.ones(1))
    if required:
        with pytest.raises(RuntimeError, match="not permitted"):
            graphed("a", torch.ones(1))
        return
    with pytest.warns(RuntimeWarning, match="not permitted"):
        graphed("a", torch.ones(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        graphed("a", torch.ones(1))
    assert total.item() == 3


def test_a_search_in_recorded_steps_is_the_same_search(tiny_search, tmp_path, monkeypatch):
    alphas = []
    for graphed in (False, True):
        monkeypatch.setattr(search_run, "uses_graph", lambda *_, graphed=graphed: graphed)
        monkeypatch.setattr(search_run, "Recorder", lambda: keep)
        out = tmp_path / str(graphed)
        search(tiny_search(out=out, arch_warmup_epochs=1, epochs=3))
        alphas.append(torch.load(out / "checkpoint.pt", weights_only=False)["network"]["alphas"])
    torch.testing.assert_close(*alphas, rtol=1e-4, atol=1e-6)
