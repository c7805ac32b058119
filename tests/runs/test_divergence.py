"""A search whose loss is no longer a number stops and says so."""

import pytest
import torch

from rfdarts_fast.runs.run import Diverged
from rfdarts_fast.search import PRESETS, SearchConfig, search


def test_a_search_that_diverges_stops(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rfdarts_fast.search.architect.F.cross_entropy", lambda *_: torch.tensor(float("nan"))
    )
    monkeypatch.setattr("rfdarts_fast.search.run.gradients", lambda _, ps: [torch.zeros_like(p) for p in ps])
    tiny = {
        "channels": 4,
        "layers": 2,
        "image_size": 8,
        "batch_size": 512,
        "epochs": 2,
        "arch_warmup_epochs": 1,
    }
    with pytest.raises(Diverged, match="loss: became nan in epoch 0"):
        search(SearchConfig(out=tmp_path / "run", **{**PRESETS["quick"], **tiny}))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
