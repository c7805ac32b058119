"""Cheap diagnostics of every epoch, against sums by hand."""

import json

import pytest
import torch

from rfdarts_fast.search import search
from rfdarts_fast.search.diagnostics import AlphaGradients


def test_gradient_norms_by_primitive(start):
    network = start(space="s1", layers=1).network
    gradients = AlphaGradients(network)
    assert gradients.result() is None
    normal, reduce = torch.zeros(14, 2), torch.zeros(14, 2)
    # skip_connect comes first on edges 0 and 1 of the normal cell, dil_conv_5x5 second on edge 1
    normal[0, 0], normal[1, 0], normal[1, 1] = 3.0, 4.0, 1.0
    for factor in (1, 2):
        gradients.add([factor * normal, reduce])
    norms = gradients.result()
    assert norms["normal"]["skip_connect"] == pytest.approx(5 * (5 / 2) ** 0.5)
    assert norms["normal"]["dil_conv_5x5"] == pytest.approx((5 / 2) ** 0.5)
    assert set(norms["reduce"].values()) == {0.0}
    other = AlphaGradients(network)
    other.load(gradients.state())
    assert other.result() == norms
    gradients.reset()
    assert gradients.result() is None


def test_each_epoch_begins_anew(tiny_search, monkeypatch):
    monkeypatch.setattr(AlphaGradients, "add", lambda self, grads, add=AlphaGradients.add: add(self, [
        torch.ones_like(grad) for grad in grads
    ]))  # fmt: skip
    config = tiny_search(epochs=2)
    search(config)
    for line in (config.out / "metrics.jsonl").read_text().splitlines():
        norms = json.loads(line)["alpha_gradient"]["cell"]
        # six edges have each primitive
        assert norms == {name: pytest.approx(6**0.5) for name in norms} and len(norms) == 5
